"""What becomes of a cohort's updates as they come in clear: a sum, or what a robust mean needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fedlora.common.config.schema import FLEXLORA, AggregationConfig
from fedlora.common.disk.mapped import alike, by_stretches
from fedlora.common.model.state import AdapterSpec, AdapterState, Vector
from fedlora.server.strategies.flexlora import mean_of_products
from fedlora.server.strategies.robust import ROBUST_MEANS

Floats = npt.NDArray[np.float64]


class Gathered(Protocol):
    """The updates of one attempt."""

    def add(self, update: Vector, name: str = "") -> None:
        """One more, (size,), of an institution."""

    @property
    def count(self) -> int:
        """How many there are."""

    @property
    def each(self) -> Mapping[str, Vector]:
        """By institution, where each is kept apart."""

    def total(self) -> Floats:
        """(size,): `count` times what stands for their mean."""


class Summed:
    """Their sum: one float64 vector, whatever the number of updates; in a file where the state is
    in one.
    """

    def __init__(self, state: AdapterState) -> None:
        self._total = alike(state.vector, np.float64)
        self.count = 0
        self.each: dict[str, Vector] = {}

    def add(self, update: Vector, name: str = "") -> None:
        """One more, (size,)."""
        for total, part in by_stretches(self._total, update):
            np.add(total, part, out=total)
        self.count += 1

    def total(self) -> Floats:
        """Their sum, (size,)."""
        return self._total


class Apart(Summed):
    """The same, and each by itself: counts are few."""

    def add(self, update: Vector, name: str = "") -> None:
        """One more, (size,), of an institution."""
        super().add(update, name)
        self.each[name] = update


class Kept:
    """All of them, for what needs each: 4 bytes a coordinate and update, in files where they are.

    `mean` writes what stands for the mean of n updates, (size,), to its second argument.
    """

    def __init__(
        self, state: AdapterState, mean: Callable[[Sequence[Vector], Floats], None], fewest: int = 1
    ) -> None:
        self._total, self._mean, self._fewest = alike(state.vector, np.float64), mean, fewest
        self._updates: list[Vector] = []
        self.each: Mapping[str, Vector] = {}

    def add(self, update: Vector, name: str = "") -> None:
        """One more, (size,)."""
        self._updates.append(update)

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self._updates)

    def total(self) -> Floats:
        """`count` times that mean, (size,); 0 of too few, which make no quorum either."""
        if self.count >= self._fewest:
            self._mean(self._updates, self._total)
            for (mean,) in by_stretches(self._total):
                mean *= self.count
        return self._total


Gather = Callable[[AdapterState], Gathered]  # by the state that the updates start from


def gathering(asked: AggregationConfig) -> Gather:
    """How a run with that configuration takes the updates of an attempt."""
    if asked.strategy == FLEXLORA:
        return lambda state: Kept(state, partial(mean_of_products, state))
    robust = ROBUST_MEANS.get(asked.strategy)
    if robust is None:
        return Summed

    def mean(updates: Sequence[Vector], out: Floats) -> None:
        robust(updates, asked.hostile, out)

    return lambda state: Kept(state, mean, asked.fewest)


def gathering_of(gather: Gather, answers: AdapterSpec, state: AdapterState) -> Gathered:
    """What takes answers of that spec: counts, which are no adapter's, are each kept apart."""
    return gather(state) if answers is state.spec else Apart(AdapterState.zeros(answers))
