"""An attack of one's own: an institution that sends its update against its sense, nine times over.

It shows where a hostile institution stands in a simulation: in the cohort that answers a round. All
others train as they always do. Whether a rule bears it, the same federation shows with another
strategy; `simulations/benchmarks/hostile.py` has more attacks, and what they did.

    python -m fedlora.simulations.examples.own_attack
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fedlora.simulations import Cohort, Options, Result, SimulatedRun, sequential, simulate
from fedlora.simulations.examples.private_federation import federation

HOSTILE = 0  # of the institutions, the first
FACTOR = -9.0


@dataclass(frozen=True)
class Reversed:
    """An institution's trainer whose updates are turned round on their way."""

    honest: Any

    def train(self, plan: Any, state: Any) -> Any:
        """What it sends in place of what it trained."""
        update = self.honest.train(plan, state)
        return replace(update, delta=(FACTOR * update.delta).astype(np.float32))


@dataclass(frozen=True)
class Attacked:
    """A federation whose institution `HOSTILE` is hostile."""

    honest: Any

    def __getattr__(self, name: str) -> Any:
        return getattr(self.honest, name)

    def trainer(self, client: int, *given: Any) -> Any:
        """Whoever trains for `client`."""
        trainer = self.honest.trainer(client, *given)
        return Reversed(trainer) if client == HOSTILE else trainer


def attacked(run: SimulatedRun) -> Cohort:
    """The cohort of a run with one hostile institution."""
    federation: Any = Attacked(run.federation)
    return sequential(replace(run, federation=federation))


def main(folder: Path, base: str = "minilm", rounds: int = 20) -> dict[str, Result]:
    """The same attack on the mean of the updates, and on the mean of those near each other."""
    config, results = federation(folder, base, rounds), {}
    config = replace(config, privacy=replace(config.privacy, mode="none"))  # no noise beside it
    for strategy in ("fedavg", "multi-krum"):
        ruled = replace(config, aggregation=replace(config.aggregation, strategy=strategy))
        results[strategy] = simulate(ruled, folder / strategy, Options(threads=2), cohort=attacked)
        print(f"{strategy}: accuracy {results[strategy].summary['accuracy']:.3f}")
    return results


if __name__ == "__main__":
    main(Path(sys.argv[1] if sys.argv[1:] else "runs/own_attack"))
