"""What a strategy is: the next adapter from the mean update, and what it remembers between rounds.

It sees no single update: a sum is all that secure aggregation can give.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fedlora.common.model.state import AdapterState, Vector


@dataclass(frozen=True, eq=False)
class ServerState:
    """What a strategy keeps between rounds: float32 vectors of the adapter's size, and counts."""

    vectors: Mapping[str, Vector] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)


class Strategy(Protocol):
    """Aggregates from the mean of the updates alone."""

    def apply(
        self, state: AdapterState, memory: ServerState, mean: npt.NDArray[np.float64]
    ) -> tuple[AdapterState, ServerState]:
        """The next state and memory from the mean update, float64 (size,)."""
