"""A whole private federation: five institutions, one classifier, ε = 3 for each message.

It shows what a configuration says, what is known before anything is spent, what is told while a run
goes on, and what is left when it has ended: an adapter, its ε, and the statement that goes with it.
The messages are made up on the spot, and nobody's data.

    python -m fedlora.simulations.examples.private_federation
"""

from __future__ import annotations

import sys
from pathlib import Path

from fedlora.simulations import Config, Result, load_config, plan, simulate
from fedlora.simulations.federation.corpus import generate, write


def federation(folder: Path, base: str = "minilm", rounds: int = 20) -> Config:
    """Messages to five service desks; who may not share them trains a linear head on `base`."""
    train, test = write(generate(seed=7), folder / "data")
    return load_config(
        seed=7,
        model={"base": base, "max_length": 24, "pooling": "mean"},
        data={"train": train, "test": test, "validation": 0.1},
        federation={
            # each institution keeps what its column says is its own
            "clients": 5,
            "partition": "by-column",
            "column": "institution",
            "rounds": rounds,
            # attempts that may fail: the noise is calibrated for them too
            "spare_rounds": 2,
        },
        training={
            # the head alone, on features that the frozen base computes once
            "head_rounds": rounds,
            "head_sampling_rate": 0.5,
            "head_expected_units": 360,
            "head_learning_rate": 1.0,
        },
        # for each record: what leaves an institution hardly depends on any single message
        privacy={"epsilon": 3.0, "delta": 1e-5, "head_phase_clip": 1.0},
        server={"head_optimizer": "momentum", "head_learning_rate": 0.5, "average_last": 0.3},
    )


def main(folder: Path, base: str = "minilm", rounds: int = 20) -> Result:
    """Plan, train and use: what a run costs, what it learns, what it states."""
    config = federation(folder, base, rounds)
    print(plan(config), end="\n\n")

    def watch(number: int, figures: object) -> None:
        print(f"round {number:3d}  {figures}")

    result = simulate(config, folder / "run", on_round=watch)
    print(f"accuracy {result.summary['accuracy']:.3f} at ε = {result.epsilon:.3f}", end="\n\n")
    print(*result.statement, sep="\n")
    messages = ["my laptop does not switch on any more", "the VPN drops every few minutes"]
    print(*zip(messages, result.adapter.predict(messages), strict=True), sep="\n")
    return result


if __name__ == "__main__":
    main(Path(sys.argv[1] if sys.argv[1:] else "runs/private_federation"))
