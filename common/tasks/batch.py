"""Records as a network reads them: one row each, and some of them filled up to a batch.

Every value of a record follows from that record alone; what fills a batch up is nobody's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from fedlora.common.data.records import UnitIndex

Ints = npt.NDArray[np.int64]
Targets = npt.NDArray[Any]
# By name. Two batches' arrays are added up; under a name that ends in EACH they hold one value for
# each record, and are put one behind the other.
Totals = dict[str, npt.NDArray[np.float64]]
EACH = "_each"
IGNORED = -100  # the target of a token that nothing is learnt from


class Encoded(Protocol):
    """Records of one data file, as one kind of base reads them."""

    @property
    def targets(self) -> Targets:
        """(n, …), what each record should be answered with."""

    @property
    def by_token(self) -> bool:
        """Whether each token has a target of its own."""

    @property
    def truncated(self) -> Mapping[str, int]:
        """How many records lost something, by part."""

    @property
    def lengths(self) -> Ints:
        """(n,) tokens of each record, or what else a network has a place for: its cost."""

    def __len__(self) -> int: ...

    def content(self, row: int) -> bytes:
        """All that a network reads of a record, as bytes."""

    def scored(self, rows: Ints) -> UnitIndex:
        """For each record of `rows`, the places in `targets` of what a head answers."""

    def take(self, rows: Sequence[int]) -> Encoded:
        """The records `rows`, in that order."""

    def batch(
        self, rows: Ints, pad: int, device: torch.device, shape: tuple[int, int] | None = None
    ) -> Batch:
        """The records `rows` side by side, or filled up to `shape`: (records, length)."""

    def told(self, most: int) -> str:
        """How long records are beside `most`, and what was cut, in words for their owner."""


@dataclass(frozen=True, eq=False)
class Tokenised:
    """Texts, ragged: record i is tokens[offsets[i]:offsets[i + 1]].

    `targets` is (n, …), what each record should be answered with; where `by_token`, (tokens,) with
    a target for each token, or IGNORED. Where `apart`, each of a record's two texts is laid into a
    half of its row, which holds one place of padding at least: whether a network is given a mask
    must not depend on who is beside a record.
    """

    tokens: npt.NDArray[np.int32]
    offsets: Ints
    targets: Targets
    truncated: Mapping[str, int]  # how many records lost tokens, by part
    by_token: bool = False
    # (n,) the place in its row where each record's second text begins; None: there is but one
    second: Ints | None = None
    apart: bool = False

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Ints:
        """(n,) tokens of each record; where `apart`, the places that two halves of its row take."""
        tokens = np.diff(self.offsets)
        if self.second is None or not self.apart:
            return tokens
        return 2 * np.maximum(self.second, tokens - self.second) + 2

    def tokens_of(self, row: int) -> npt.NDArray[np.int32]:
        """(length,) int32: the tokens of record `row`, a view."""
        return self.tokens[self.offsets[row] : self.offsets[row + 1]]

    def scored(self, rows: Ints) -> UnitIndex:
        """For each record of `rows`, the places in `targets` of what a head answers.

        Its own; where `by_token`, those of its tokens that have a target.
        """
        if not self.by_token:
            return UnitIndex(np.arange(len(rows) + 1, dtype=np.int64), rows)
        tokens = UnitIndex(self.offsets, np.arange(len(self.tokens), dtype=np.int64)).take(rows)
        kept = self.targets[tokens.records] != IGNORED
        before = np.concatenate([[0], np.cumsum(kept)])
        return UnitIndex(before[tokens.offsets], tokens.records[kept])

    def content(self, row: int) -> bytes:
        """Its tokens, and where its second text begins, or which of them are scored."""
        more = b"" if self.second is None else self.second[row].tobytes() + bytes([self.apart])
        if self.by_token:
            targets = self.targets[self.offsets[row] : self.offsets[row + 1]]
            more = (targets != IGNORED).tobytes()
        return self.tokens_of(row).tobytes() + more

    def take(self, rows: Sequence[int]) -> Tokenised:
        """The records `rows`, in that order."""
        places = [np.arange(self.offsets[row], self.offsets[row + 1]) for row in rows]
        every, chosen = np.concatenate(places), np.asarray(rows, dtype=np.int64)
        return Tokenised(
            self.tokens[every],
            np.concatenate([[0], np.cumsum(np.diff(self.offsets)[chosen])]).astype(np.int64),
            self.targets[every if self.by_token else chosen],
            self.truncated,
            self.by_token,
            None if self.second is None else self.second[chosen],
            self.apart,
        )

    def told(self, most: int) -> str:
        """Their lengths in tokens."""
        lengths = self.lengths
        cut = [f"the {part} of {count}" for part, count in self.truncated.items() if count]
        return (
            f"tokens: {lengths.min()} to {lengths.max()} of at most {most}, in the middle"
            f" {int(np.median(lengths))}; "
            + (f"cut to fit: {', '.join(cut)}" if cut else "nothing is cut")
        )

    def batch(
        self, rows: Ints, pad: int, device: torch.device, shape: tuple[int, int] | None = None
    ) -> Batch:
        """Pad the records `rows` to the longest of them, or fill up to `shape`: (records, tokens).

        What fills up is a text of padding that is read like any other; its target is 0, or IGNORED.
        """
        longest = int(self.lengths[rows].max())
        count, width = (len(rows), longest) if shape is None else shape
        source, text = self._laid_out(rows, width)
        ids, mask = np.full((count, width), pad, dtype=np.int64), np.ones((count, width), np.int64)
        ids[: len(rows)], mask[: len(rows)] = np.where(text > 0, self.tokens[source], pad), text
        if self.by_token:
            targets = np.full((count, width), IGNORED, dtype=np.int64)
            targets[: len(rows)] = np.where(text > 0, self.targets[source], IGNORED)
        else:
            targets = np.zeros((count, *self.targets.shape[1:]), dtype=self.targets.dtype)
            targets[: len(rows)] = self.targets[rows]
        tokens, texts, aims = (torch.from_numpy(each).to(device) for each in (ids, mask, targets))
        return Batch(tokens, texts, aims, shape is not None)

    def _laid_out(self, rows: Ints, width: int) -> tuple[Ints, Ints]:
        """(rows, width) places in `tokens`, and the text that is there as in `Batch.mask`."""
        columns, starts = np.arange(width)[None, :], self.offsets[rows][:, None]
        sizes = self.offsets[rows + 1][:, None] - starts
        if self.second is None:
            places, text = columns, (columns < sizes).astype(np.int64)
        elif self.apart:
            begins, half = self.second[rows][:, None], width // 2
            first, other = columns < half, columns - half
            places = np.where(first, columns, begins + other)
            text = np.where(first, columns < begins, 2 * (other < sizes - begins))
        else:
            places, begins = columns, self.second[rows][:, None]
            text = np.where(columns < sizes, 1 + (columns >= begins), 0)
        return np.minimum(starts + places, len(self.tokens) - 1), text


@dataclass(frozen=True, eq=False)
class Batch:
    """Model inputs: `ids` and `mask` are (n, length), `targets` is (n, …) or (n, length).

    Of another medium than text `ids` are (n, …) values, and `mask` (n, 1) is 1.

    `mask` is 0 where nothing is, else the number of the text that a token is of: 1, or 2 for the
    second of a pair. `fixed`: the shape was given, and no product may have one that follows from
    the targets.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    targets: torch.Tensor
    fixed: bool = False


def in_rows(
    outputs: torch.Tensor, targets: torch.Tensor, records: torch.Tensor, count: int
) -> tuple[torch.Tensor, Batch]:
    """What a head gives for words alone, (words, outputs), as for `count` records, filled up.

    `targets` and `records` are (words,): its tag, and which record a word is of, which never
    decreases.
    """
    sizes = torch.bincount(records, minlength=count)
    starts = torch.cumsum(sizes, dim=0) - sizes
    column = torch.arange(len(records), device=records.device) - starts[records]
    shape = (count, int(sizes.max()) if count else 0)
    aims = targets.new_full(shape, IGNORED).index_put((records, column), targets)
    filled = outputs.new_zeros(*shape, outputs.shape[1]).index_put((records, column), outputs)
    return filled, Batch(aims, (aims != IGNORED).long(), aims)


def rows_of(
    rows: Sequence[Sequence[int]],
    targets: Targets,
    truncated: Mapping[str, int],
    by_token: bool = False,
    second: Sequence[int] | None = None,
    apart: bool = False,
) -> Tokenised:
    """Tokens of records, one row each."""
    offsets = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    tokens = np.fromiter(
        (token for row in rows for token in row), dtype=np.int32, count=int(offsets[-1])
    )
    begins = None if second is None else np.array(second, dtype=np.int64)
    aims = np.ascontiguousarray(targets)
    return Tokenised(tokens, offsets, aims, truncated, by_token, begins, apart)


def add_totals(totals: Sequence[Totals]) -> Totals:
    """The totals of several batches as one's; at least one is needed."""
    return {
        name: np.concatenate([each[name] for each in totals])
        if name.endswith(EACH)
        else np.sum([each[name] for each in totals], axis=0)
        for name in totals[0]
    }
