"""Batches in which what a record gives depends on that record alone, to the last bit.

The clip bounds what a unit adds to a sum. That is worth nothing where its presence also moves what *others* add: a
matrix product rounds by the shape of its batch, padding changes the order of sums, and an adapter that a coordinator
chose can make such a rounding error as large as a gradient. So every private batch has a shape, (records, tokens):

    tokens    the record's own length, up to a multiple of its device's BUCKETS
    records   fixed for that length; a batch is filled up with rows that are nobody's

Then rows do not mix, and arithmetic is a function of a row's own values and of its place. That the place does not
matter is seen by trying (`Shapes`): a record goes alone where it does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from fedlora.common.tasks import Encoded

BUCKETS = {
    "cpu": 8,
    "cuda": 32,
}  # tokens; on a GPU a batch costs its launches, hardly what it holds: few are best
Ints = npt.NDArray[np.int64]
Records = Callable[[int], int]  # of a batch whose records are padded to so many tokens


@dataclass(frozen=True)
class Shape:
    """What a batch is filled up to."""

    records: int
    tokens: int


@dataclass(eq=False)
class Shapes:
    """Which kinds of work give each row of a shape the same bits wherever it stands and whatever stands beside it."""

    _alike: dict[object, bool] = field(default_factory=dict)

    def records(self, kind: object, wanted: int, alike: Callable[[], bool]) -> int:
        """`wanted`, or 1 where `alike`, which is tried once for each `kind`, says that rows differ by place."""
        if wanted <= 1:
            return 1
        if kind not in self._alike:
            self._alike[kind] = alike()
        return wanted if self._alike[kind] else 1


def padded(lengths: Ints, longest: int, device: str) -> Ints:
    """Tokens that each length is filled up to: at most `longest`, what the model was built for, unless it is longer."""
    bucket = BUCKETS[device]
    return np.minimum(-(-lengths // bucket) * bucket, np.maximum(lengths, longest))


def shaped(padded: Ints, records: Records) -> Iterator[tuple[Ints, Shape]]:
    """Places of `padded` lengths, each once, the longest first, with the shape that each batch is filled to."""
    for tokens in np.unique(padded)[::-1]:
        places = np.flatnonzero(padded == tokens)
        shape = Shape(records(int(tokens)), int(tokens))
        for start in range(0, len(places), shape.records):
            yield places[start : start + shape.records], shape


def probes(shape: Shape, vocabulary: int) -> tuple[Encoded, Encoded]:
    """One text of nobody's in every row; and once more in the first, beside others."""
    others = np.random.default_rng(0).integers(0, vocabulary, (shape.records, shape.tokens)).astype(np.int32)
    offsets = np.arange(shape.records + 1, dtype=np.int64) * shape.tokens
    targets = np.zeros(shape.records, dtype=np.int64)
    same = np.tile(others[0], shape.records)
    return Encoded(same, offsets, targets, {}), Encoded(others.ravel(), offsets, targets, {})


def alike(same: Iterable[torch.Tensor], beside: Iterable[torch.Tensor]) -> bool:
    """Whether each (records, …) tensor of the first probe has equal rows, and the second the same first row.

    What is not finite is not equal: then records go alone.
    """
    pairs = zip(same, beside, strict=True)
    return all(bool((one == one[:1]).all()) and bool((one[0] == other[0]).all()) for one, other in pairs)
