"""FedAvg (McMahan et al. 2017), its mean update taken through the server's optimiser."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedlora.common.model.state import AdapterState, Vector
from fedlora.server.strategies.optimizers import Floats, ServerOptimizer
from fedlora.server.strategies.strategy import ServerState


@dataclass(frozen=True)
class RateSchedule:
    """The share of the learning rate that a step has, by the steps that were done before it.

    It rises linearly over the first `warmup` steps, and the one after them has all of it. Then,
    where `decay` is not 0, it falls linearly, to be 0 from step `decay` on. Steps are rounds.
    """

    warmup: int = 0
    decay: int = 0

    def share(self, done: int) -> float:
        """In [0, 1]."""
        if done < self.warmup:
            return (done + 1) / (self.warmup + 1)
        if not self.decay:
            return 1.0
        if done >= self.decay:
            return 0.0
        return (self.decay - done) / (self.decay - self.warmup)


STRETCH = 1 << 20  # coordinates
CONSTANT = RateSchedule()


@dataclass(frozen=True)
class FedAvg:
    """Equal weights: the mean update, through the server optimiser."""

    optimizer: ServerOptimizer
    schedule: RateSchedule = CONSTANT

    def apply(
        self, state: AdapterState, memory: ServerState, mean: Floats
    ) -> tuple[AdapterState, ServerState]:
        """The state after a step of the server's optimiser along `mean` (size,), and memory.

        By stretches: an optimiser looks at each coordinate by itself, and a large adapter's float64
        is not needed at once.
        """
        done, size = memory.counts.get("steps", 0), state.spec.size
        rate = self.optimizer.learning_rate * self.schedule.share(done)
        vector, changed = np.empty(size, dtype=np.float32), dict[str, Vector]()
        for start in range(0, size, STRETCH):
            place = slice(start, start + STRETCH)
            before = {name: value[place] for name, value in memory.vectors.items()}
            step, after = self.optimizer.step(ServerState(before, memory.counts), mean[place])
            vector[place] = state.vector[place].astype(np.float64) + rate * step
            for name, value in after.vectors.items():
                if value is not before.get(name):
                    changed.setdefault(name, np.empty(size, dtype=np.float32))[place] = value
        vectors, counts = {**memory.vectors, **changed}, {**memory.counts, "steps": done + 1}
        return AdapterState(state.spec, vector), ServerState(vectors, counts)
