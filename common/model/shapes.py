"""Batches in which what a record gives depends on that record alone, to the last bit.

The clip bounds what a unit adds to a sum. That is worth nothing where its presence also moves what
*others* add: a matrix product rounds by the shape of its batch, padding changes the order of sums,
a batch in which nobody is padded goes through other code, and an adapter that a coordinator chose
can make such a rounding error as large as a gradient. So every private batch has a shape, that of
each of its records:

    tokens    more than the record's own length, up to a multiple of its device's BUCKETS, or the
              model's longest
    full      whether the record is as long as that: it has company of its own kind only
    records   fixed for these two; a batch is filled up with rows that are nobody's

Then rows do not mix, and arithmetic is a function of a row's own values and of its place. That the
place does not matter is seen by trying (`Shapes`): a record goes alone where it does.

Small batches are dear. So more records of one width go together in a larger shape where trying
shows that each gives there, to the last bit, what it gives in its own: a product often adds a row
up in one order whatever stands beside it. Of several widths none go together: what padding adds is
0 in every try, but not where a coordinator's adapter makes it overflow, or outweigh the mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from fedlora.common.model.inputs import Inputs
from fedlora.common.tasks.batch import Encoded
from fedlora.common.tasks.task import Task

# Tokens. On a GPU a batch costs its launches, hardly what it holds: few are best.
BUCKETS = {"cpu": 8, "cuda": 32}
# What tries in a lower precision look at: tokens of one place, of all; and an adapter's values.
SEEN, TRIED, DRAWN = 512, 1 << 14, 1 << 26
Ints = npt.NDArray[np.int64]
# of the next batch, by its tokens, whether they are all the records' own, and how many are left
Records = Callable[[int, bool, int], int]


@dataclass(frozen=True)
class Shape:
    """What a batch is filled up to."""

    records: int
    tokens: int
    full: bool  # no row has padding; else each record has at least one token of it


@dataclass(eq=False)
class Shapes:
    """Which kinds of work give a row the same bits wherever, and beside whatever, it stands.

    None does where `routed`: products that words share as they choose experts have no shape of
    their own, and one try says nothing of the next. Nor where they are `mixed`: then what rounds by
    place can't be given one record at a time (`common.model.elementwise`).
    """

    routed: bool = False
    mixed: bool = False
    _alike: dict[object, bool] = field(default_factory=dict)
    _asked: dict[object, int] = field(default_factory=dict)

    @property
    def apart(self) -> bool:
        """Whether no two records go together."""
        return self.routed or self.mixed

    def records(self, kind: object, wanted: int, alike: Callable[[], bool]) -> int:
        """`wanted`, or 1 where `alike`, tried once a `kind`, says rows differ by place."""
        if wanted <= 1 or self.apart:
            return 1
        key = (kind, torch.get_num_threads())  # a product is cut up among threads
        if key not in self._alike:
            self._alike[key] = alike()
        return wanted if self._alike[key] else 1

    def keeps(self, kind: object, asking: int, cost: int, alike: Callable[[], bool]) -> bool:
        """Whether rows give in a larger shape what they give in their own, tried once a `kind`.

        Not before as many records have asked as a try costs: what is seldom wanted is not tried.
        """
        key = (kind, torch.get_num_threads())
        if self.apart:
            return False
        if key not in self._alike:
            self._asked[key] = self._asked.get(key, 0) + asking
            if self._asked[key] < cost:
                return False
            self._alike[key] = alike()
        return self._alike[key]


def padded(lengths: Ints, longest: int, device: str) -> Ints:
    """Tokens that each length is filled up to.

    More than it, but not more than `longest`, what the model is built for.
    """
    bucket = BUCKETS[device]
    return np.minimum((lengths // bucket + 1) * bucket, np.maximum(lengths, longest))


def shaped(lengths: Ints, padded: Ints, records: Records) -> Iterator[tuple[Ints, Shape]]:
    """Places of `lengths`, each once, longest first, with the shape each batch is filled to."""
    kinds = 2 * padded + (lengths == padded)
    for kind in np.unique(kinds)[::-1]:
        tokens, full = int(kind) // 2, bool(kind % 2)
        places = np.flatnonzero(kinds == kind)
        while len(places):
            shape = Shape(records(tokens, full, len(places)), tokens, full)
            yield places[: shape.records], shape
            places = places[shape.records :]


def tries(shape: Shape, precision: torch.dtype, values: int) -> int:
    """How often it takes to see whether rows of that shape differ.

    float32 shows nearly every sum that is added up in another order. What is rounded to fewer bits
    shows one in ten thousand or so, and a short record perhaps none: `SEEN` tokens of each place
    are looked at there, and no more than `TRIED` in all. Large adapters, of so many `values`, have
    large bases, of which one record shows more.
    """
    if precision == torch.float32:
        return 1
    most = min(TRIED // (shape.records * shape.tokens), DRAWN // max(1, values))
    return max(1, min(-(-SEEN // shape.tokens), most))


def probes(shape: Shape, inputs: Inputs, task: Task, seed: int = 0) -> tuple[Encoded, Encoded]:
    """One record of nobody's in every row.

    And once more in the first, beside others, of other lengths where it is padded.
    """
    rng, most = np.random.default_rng(seed), shape.tokens - (not shape.full)
    lengths = (
        np.full(shape.records, most) if shape.full else rng.integers(1, most + 1, shape.records)
    )
    lengths[0] = most
    beside = inputs.nobodys(task, lengths, rng)
    return beside.take([0] * shape.records), beside


def alike(same: Iterable[torch.Tensor], beside: Iterable[torch.Tensor]) -> bool:
    """Whether each (records, …) tensor has equal rows in the first probe, its first in the second.

    What is not finite is not equal: then records go alone.
    """
    pairs = zip(same, beside, strict=True)
    return all(
        bool((one == one[:1]).all()) and bool((one[0] == other[0]).all()) for one, other in pairs
    )
