"""Records that are no text: values of one shape, so that a batch of them has no padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fedlora.common.data.medium import Floats
from fedlora.common.data.records import UnitIndex
from fedlora.common.tasks.batch import Batch, Ints, Targets


@dataclass(frozen=True, eq=False)
class Values:
    """`values` are (n, …), `targets` (n, …); `length` is what a network has places for, of each.

    `sizes` say in words how large the records were before.
    """

    values: Floats
    targets: Targets
    length: int
    sizes: str = ""
    by_token: bool = False

    def __len__(self) -> int:
        return len(self.values)

    @property
    def truncated(self) -> Mapping[str, int]:
        """None: a processor brings each to its shape."""
        return {}

    @property
    def lengths(self) -> Ints:
        """(n,) the same for all: their micro-batches have a fixed number of records."""
        return np.full(len(self), self.length, dtype=np.int64)

    def content(self, row: int) -> bytes:
        """Its values."""
        return bytes(self.values[row].tobytes())

    def scored(self, rows: Ints) -> UnitIndex:
        """Each record's own."""
        return UnitIndex(np.arange(len(rows) + 1, dtype=np.int64), rows)

    def take(self, rows: Sequence[int]) -> Values:
        """The records `rows`, in that order."""
        chosen = np.asarray(rows, dtype=np.int64)
        return Values(self.values[chosen], self.targets[chosen], self.length, self.sizes)

    def told(self, most: int) -> str:
        """Their sizes before, and the shape that all of them have now."""
        return f"{self.sizes}; each is read as {' × '.join(map(str, self.values.shape[1:]))} values"

    def batch(
        self, rows: Ints, pad: int, device: torch.device, shape: tuple[int, int] | None = None
    ) -> Batch:
        """The records `rows`, and zeros up to shape[0] records: read like any other, target 0."""
        count = len(rows) if shape is None else shape[0]
        values = np.zeros((count, *self.values.shape[1:]), dtype=np.float32)
        targets = np.zeros((count, *self.targets.shape[1:]), dtype=self.targets.dtype)
        values[: len(rows)], targets[: len(rows)] = self.values[rows], self.targets[rows]
        ids, aims = (torch.from_numpy(each).to(device) for each in (values, targets))
        mask = torch.ones((count, 1), dtype=torch.int64, device=device)
        return Batch(ids, mask, aims, shape is not None)
