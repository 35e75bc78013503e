"""FedAvg with a server optimiser (Reddi et al. 2021), and the average of a phase's last states.

The mean update is a pseudo-gradient: x ← x + step(mean). All of it is post-processing of what the
nodes released, so none of it costs privacy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedlora.common.errors import BadInput
from fedlora.common.model.state import AdapterState
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


@dataclass(frozen=True)
class FedAvg:
    """Equal weights: the mean update, through the server optimiser.

    With `decay_rounds` not 0 the learning rate falls linearly, to reach 0 after that many rounds.
    """

    optimizer: ServerOptimizer
    decay_rounds: int = 0

    def apply(
        self, state: AdapterState, memory: ServerState, mean: Floats
    ) -> tuple[AdapterState, ServerState]:
        """The state after a step of the server's optimiser along `mean` (size,), and memory."""
        step, memory = RULES[self.optimizer.name](self.optimizer, memory, mean)
        done = memory.counts.get("steps", 0)
        left = max(0.0, 1 - done / self.decay_rounds) if self.decay_rounds else 1.0
        vector = state.vector.astype(np.float64) + self.optimizer.learning_rate * left * step
        counted = ServerState(memory.vectors, {**memory.counts, "steps": done + 1})
        return AdapterState(state.spec, vector.astype(np.float32)), counted


Rule = Callable[[ServerOptimizer, ServerState, Floats], tuple[Floats, ServerState]]


def _plain(
    optimizer: ServerOptimizer, memory: ServerState, mean: Floats
) -> tuple[Floats, ServerState]:
    return mean, memory


def _momentum(
    optimizer: ServerOptimizer, memory: ServerState, mean: Floats
) -> tuple[Floats, ServerState]:
    velocity = optimizer.momentum * _vector(memory, "velocity", mean) + mean
    return velocity, _kept(memory, velocity=velocity)


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
    first = optimizer.momentum * _vector(memory, "first", mean) + (1 - optimizer.momentum) * mean
    second = second_moment(_vector(memory, "second", mean, start=ADAPTIVITY**2), mean**2)
    return first / (np.sqrt(second) + ADAPTIVITY), _kept(memory, first=first, second=second)


RULES: dict[str, Rule] = {"none": _plain, "momentum": _momentum, "adam": _adam, "yogi": _yogi}


def add_to_average(state: AdapterState, memory: ServerState) -> tuple[AdapterState, ServerState]:
    """The mean of this state and all added since the phase's averaging began; and the memory."""
    count = memory.counts.get("averaged", 0)
    before = _vector(memory, "average", state.vector)
    average = before + (state.vector - before) / (count + 1)
    kept = _kept(memory, average=average)
    counted = ServerState(kept.vectors, {**memory.counts, "averaged": count + 1})
    return AdapterState(state.spec, average.astype(np.float32)), counted


def _vector(
    memory: ServerState, name: str, like: npt.NDArray[np.floating], start: float = 0.0
) -> Floats:
    stored = memory.vectors.get(name)
    return np.full(like.shape, start) if stored is None else stored.astype(np.float64)


def _kept(memory: ServerState, **vectors: Floats) -> ServerState:
    changed = {name: value.astype(np.float32) for name, value in vectors.items()}
    return ServerState({**memory.vectors, **changed}, memory.counts)
