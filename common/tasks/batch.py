"""Records as a network reads them: tokens in rows, and padded to a batch.

Every value of a record follows from that record alone; what fills a batch up is nobody's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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


@dataclass(frozen=True, eq=False)
class Encoded:
    """Tokenised records, ragged: record i is tokens[offsets[i]:offsets[i + 1]].

    `targets` is (n, …), what each record should be answered with; where `by_token`, (tokens,) with
    a target for each token, or IGNORED.
    """

    tokens: npt.NDArray[np.int32]
    offsets: Ints
    targets: Targets
    truncated: Mapping[str, int]  # how many records lost tokens, by part
    by_token: bool = False
    # (n,) the place in its row where each record's second text begins; None: there is but one
    second: Ints | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Ints:
        """(n,) tokens of each record."""
        return np.diff(self.offsets)

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

    def batch(
        self, rows: Ints, pad: int, device: torch.device, shape: tuple[int, int] | None = None
    ) -> Batch:
        """Pad the records `rows` to the longest of them, or fill up to `shape`: (records, tokens).

        What fills up is a text of padding that is read like any other; its target is 0, or IGNORED.
        """
        lengths = self.offsets[rows + 1] - self.offsets[rows]
        count, width = (len(rows), int(lengths.max())) if shape is None else shape
        columns = np.arange(width)[None, :]
        inside = columns < lengths[:, None]
        source = np.minimum(self.offsets[rows][:, None] + columns, len(self.tokens) - 1)
        ids, mask = np.full((count, width), pad, dtype=np.int64), np.ones((count, width), np.int64)
        ids[: len(rows)], mask[: len(rows)] = np.where(inside, self.tokens[source], pad), inside
        if self.second is not None:
            mask[: len(rows)] += inside & (columns >= self.second[rows][:, None])
        if self.by_token:
            targets = np.full((count, width), IGNORED, dtype=np.int64)
            targets[: len(rows)] = np.where(inside, self.targets[source], IGNORED)
        else:
            targets = np.zeros((count, *self.targets.shape[1:]), dtype=self.targets.dtype)
            targets[: len(rows)] = self.targets[rows]
        tokens, texts, aims = (torch.from_numpy(each).to(device) for each in (ids, mask, targets))
        return Batch(tokens, texts, aims, shape is not None)


@dataclass(frozen=True, eq=False)
class Batch:
    """Model inputs: `ids` and `mask` are (n, length), `targets` is (n, …) or (n, length).

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
) -> Encoded:
    """Tokens of records, one row each, as `Encoded`."""
    offsets = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    tokens = np.fromiter(
        (token for row in rows for token in row), dtype=np.int32, count=int(offsets[-1])
    )
    begins = None if second is None else np.array(second, dtype=np.int64)
    return Encoded(tokens, offsets, np.ascontiguousarray(targets), truncated, by_token, begins)


def add_totals(totals: Sequence[Totals]) -> Totals:
    """The totals of several batches as one's; at least one is needed."""
    return {
        name: np.concatenate([each[name] for each in totals])
        if name.endswith(EACH)
        else np.sum([each[name] for each in totals], axis=0)
        for name in totals[0]
    }
