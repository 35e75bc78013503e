"""FedAvg (McMahan et al. 2017), its mean update taken through the server's optimiser."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedlora.common.model.state import AdapterState
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


CONSTANT = RateSchedule()


@dataclass(frozen=True)
class FedAvg:
    """Equal weights: the mean update, through the server optimiser."""

    optimizer: ServerOptimizer
    schedule: RateSchedule = CONSTANT

    def apply(
        self, state: AdapterState, memory: ServerState, mean: Floats
    ) -> tuple[AdapterState, ServerState]:
        """The state after a step of the server's optimiser along `mean` (size,), and memory."""
        step, memory = self.optimizer.step(memory, mean)
        done = memory.counts.get("steps", 0)
        rate = self.optimizer.learning_rate * self.schedule.share(done)
        vector = state.vector.astype(np.float64) + rate * step
        counted = ServerState(memory.vectors, {**memory.counts, "steps": done + 1})
        return AdapterState(state.spec, vector.astype(np.float32)), counted
