"""FedAvg (McMahan et al. 2017), its mean update taken through the server's optimiser.

The mean is a pseudo-gradient, and a step along it post-processing of what the nodes released, so
none of it costs privacy. The optimisers' source: Reddi et al. 2021, "Adaptive federated
optimization".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedlora.common.disk.mapped import STRETCH, alike, let_go
from fedlora.common.errors import BadInput
from fedlora.common.model.state import AdapterState, Vector
from fedlora.server.strategies.strategy import ServerState

Floats = npt.NDArray[np.float64]
# τ of Reddi et al.; their second moment starts at τ², and neither moment is bias-corrected
ADAPTIVITY = 1e-3


@dataclass(frozen=True)
class ServerOptimizer:
    """`name` is none, momentum, adam or yogi; `momentum` is β1 of the adaptive ones.

    BadInput when it is made, not when it is used: by then a round's budget would be spent.
    """

    name: str
    learning_rate: float
    momentum: float
    beta2: float

    def __post_init__(self) -> None:
        faults = []
        if self.name not in RULES:
            faults.append(
                f"[server] optimizer: found {self.name!r}, expected one of {', '.join(RULES)}"
            )
        if not 0 < self.learning_rate < math.inf:
            faults.append(
                f"[server] learning_rate: found {self.learning_rate}, expected a finite number > 0"
            )
        for field in ("momentum", "beta2"):
            if not 0 <= getattr(self, field) < 1:
                faults.append(
                    f"[server] {field}: found {getattr(self, field)}, expected 0 <= {field} < 1"
                )
        if faults:
            raise BadInput(faults)

    def step(self, memory: ServerState, mean: Floats) -> tuple[Floats, ServerState]:
        """How far to move at rate 1 along `mean`, float64 (size,), and the memory after it."""
        return RULES[self.name](self, memory, mean)


Rule = Callable[[ServerOptimizer, ServerState, Floats], tuple[Floats, ServerState]]


def _plain(
    optimizer: ServerOptimizer, memory: ServerState, mean: Floats
) -> tuple[Floats, ServerState]:
    return mean, memory


def _momentum(
    optimizer: ServerOptimizer, memory: ServerState, mean: Floats
) -> tuple[Floats, ServerState]:
    velocity = optimizer.momentum * remembered(memory, "velocity", mean) + mean
    return velocity, kept(memory, velocity=velocity)


def _adam(
    optimizer: ServerOptimizer, memory: ServerState, mean: Floats
) -> tuple[Floats, ServerState]:
    return _adaptive(
        optimizer,
        memory,
        mean,
        lambda second, square: second + (1 - optimizer.beta2) * (square - second),
    )


def _yogi(
    optimizer: ServerOptimizer, memory: ServerState, mean: Floats
) -> tuple[Floats, ServerState]:
    def second_moment(second: Floats, square: Floats) -> Floats:
        return second - (1 - optimizer.beta2) * square * np.sign(second - square)

    return _adaptive(optimizer, memory, mean, second_moment)


def _adaptive(
    optimizer: ServerOptimizer,
    memory: ServerState,
    mean: Floats,
    second_moment: Callable[[Floats, Floats], Floats],
) -> tuple[Floats, ServerState]:
    first = optimizer.momentum * remembered(memory, "first", mean) + (1 - optimizer.momentum) * mean
    second = second_moment(remembered(memory, "second", mean, start=ADAPTIVITY**2), mean**2)
    return first / (np.sqrt(second) + ADAPTIVITY), kept(memory, first=first, second=second)


RULES: dict[str, Rule] = {"none": _plain, "momentum": _momentum, "adam": _adam, "yogi": _yogi}


def remembered(
    memory: ServerState, name: str, like: npt.NDArray[np.floating], start: float = 0.0
) -> Floats:
    """The vector `name` of the memory, float64; `start` everywhere where there is none yet."""
    stored = memory.vectors.get(name)
    return np.full(like.shape, start) if stored is None else stored.astype(np.float64)


def kept(memory: ServerState, **vectors: Floats) -> ServerState:
    """The memory with these vectors, as float32."""
    changed = {name: value.astype(np.float32) for name, value in vectors.items()}
    return ServerState({**memory.vectors, **changed}, memory.counts)


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
        """The state after a step of the server's optimiser along `mean` (size,), and memory.

        By stretches: an optimiser looks at each coordinate by itself, and a large adapter's float64
        is not needed at once.
        """
        done, size = memory.counts.get("steps", 0), state.spec.size
        rate = self.optimizer.learning_rate * self.schedule.share(done)
        vector, changed = alike(state.vector, np.float32), dict[str, Vector]()
        for start in range(0, size, STRETCH):
            place = slice(start, start + STRETCH)
            before = {name: value[place] for name, value in memory.vectors.items()}
            step, after = self.optimizer.step(ServerState(before, memory.counts), mean[place])
            vector[place] = state.vector[place].astype(np.float64) + rate * step
            for name, value in after.vectors.items():
                if value is not before.get(name):
                    if name not in changed:
                        changed[name] = alike(state.vector, np.float32)
                    changed[name][place] = value
            held = (vector, mean, state.vector, *memory.vectors.values(), *changed.values())
            let_go(*(each[place] for each in held))
        vectors, counts = {**memory.vectors, **changed}, {**memory.counts, "steps": done + 1}
        return AdapterState(state.spec, vector), ServerState(vectors, counts)
