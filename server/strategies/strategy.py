"""Two kinds of strategy, told apart by type.

A `SumStrategy` sees the sum of a cohort's updates and how many there were: it composes with secure
aggregation, which can give nothing else. An `EachStrategy` needs every update in clear.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fedlora.common.manifest.plan import Update
from fedlora.common.model.state import AdapterState, Vector


@dataclass(frozen=True, eq=False)
class ServerState:
    """What a strategy keeps between rounds: float32 vectors of the adapter's size, and counts."""

    vectors: Mapping[str, Vector] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)


class SumStrategy(Protocol):
    """Aggregates from the mean of the updates alone."""

    def apply(
        self, state: AdapterState, memory: ServerState, mean: npt.NDArray[np.float64]
    ) -> tuple[AdapterState, ServerState]:
        """The next state and memory from the mean update, float64 (size,)."""


class EachStrategy(Protocol):
    """Aggregates from every single update; excludes secure aggregation."""

    def apply_each(
        self, state: AdapterState, memory: ServerState, updates: Iterator[Update]
    ) -> tuple[AdapterState, ServerState, int]:
        """The next state and memory, and how many updates counted."""


Strategy = SumStrategy | EachStrategy
