"""What becomes of a cohort's updates as they come in clear: a sum, or what a robust mean needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fedlora.common.config.schema import AggregationConfig
from fedlora.common.model.state import Vector
from fedlora.server.strategies.robust import ROBUST_MEANS, RobustMean

Floats = npt.NDArray[np.float64]


class Gathered(Protocol):
    """The updates of one attempt."""

    def add(self, update: Vector) -> None:
        """One more, (size,)."""

    @property
    def count(self) -> int:
        """How many there are."""

    def total(self) -> Floats:
        """(size,): `count` times what stands for their mean."""


class Summed:
    """Their sum: one float64 vector, whatever the number of updates."""

    def __init__(self, size: int) -> None:
        self._total = np.zeros(size, dtype=np.float64)
        self.count = 0

    def add(self, update: Vector) -> None:
        """One more, (size,)."""
        self._total += update
        self.count += 1

    def total(self) -> Floats:
        """Their sum, (size,)."""
        return self._total


class Kept:
    """All of them, for a mean that compares them: 4 bytes a coordinate and update, and copies."""

    def __init__(self, size: int, mean: RobustMean, hostile: int, fewest: int) -> None:
        self._size, self._mean, self._hostile, self._fewest = size, mean, hostile, fewest
        self._updates: list[Vector] = []

    def add(self, update: Vector) -> None:
        """One more, (size,)."""
        self._updates.append(update)

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self._updates)

    def total(self) -> Floats:
        """`count` times the robust mean, (size,); 0 of too few, which make no quorum either."""
        if self.count < self._fewest:
            return np.zeros(self._size, dtype=np.float64)
        stacked = np.stack(self._updates).astype(np.float64)
        return self.count * self._mean(stacked, self._hostile)


Gather = Callable[[int], Gathered]  # by the size of an update


def gathering(asked: AggregationConfig) -> Gather:
    """How a run with that configuration takes the updates of an attempt."""
    mean = ROBUST_MEANS.get(asked.strategy)
    return Summed if mean is None else lambda size: Kept(size, mean, asked.hostile, asked.fewest)
