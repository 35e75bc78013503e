"""A strategy of one's own: Nesterov's momentum at the server (Sutskever et al. 2013).

It shows the one method that a strategy has, where it keeps what it remembers, and that a run names
it. A strategy sees the mean of the updates and nothing else. So it costs no privacy, and composes
with secure aggregation; what it remembers lies in the checkpoint, so that a killed run goes on with
the same bits.

    python -m fedlora.simulations.examples.own_strategy
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedlora.simulations import AdapterState, Options, Result, ServerState, simulate
from fedlora.simulations.examples.private_federation import federation


@dataclass(frozen=True)
class Nesterov:
    """x ← x + η (β v + mean), with v ← β v + mean: the step looks ahead of the velocity."""

    learning_rate: float = 0.5
    momentum: float = 0.9

    def apply(
        self, state: AdapterState, memory: ServerState, mean: npt.NDArray[np.float64]
    ) -> tuple[AdapterState, ServerState]:
        """The next adapter and memory, from the mean update, float64 (size,)."""
        velocity = self.momentum * memory.vectors.get("velocity", np.zeros_like(mean)) + mean
        step = self.learning_rate * (self.momentum * velocity + mean)
        vector = (state.vector.astype(np.float64) + step).astype(np.float32)
        kept = {**memory.vectors, "velocity": velocity.astype(np.float32)}
        return AdapterState(state.spec, vector), ServerState(kept, memory.counts)


def main(folder: Path, base: str = "minilm", rounds: int = 20) -> Result:
    """Train with `Nesterov` in the configured strategy's place."""
    config = federation(folder, base, rounds)
    result = simulate(config, folder / "run", Options(threads=2), strategy=Nesterov())
    print(f"{result.summary['strategy']}: accuracy {result.summary['accuracy']:.3f}")
    return result


if __name__ == "__main__":
    main(Path(sys.argv[1] if sys.argv[1:] else "runs/own_strategy"))
