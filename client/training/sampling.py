"""Which privacy units a step uses, and in which micro-batches they are computed.

The draw is Poisson: each unit joins with the public probability `rate`, independently of all others
and of all earlier steps. That, and nothing else, is what the accountant amplifies. Length sorting
happens *inside* one draw, where the order of a sum is all that it changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedlora.common.data.records import UnitIndex
from fedlora.common.model.shapes import Shape

Ints = npt.NDArray[np.int64]
# places of so long records, each once, with the shape of each batch of theirs
Fixed = Callable[[Ints], Iterable[tuple[Ints, Shape]]]


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Records that go through the model together.

    `rows` (m,) index the encoded records, `owners` (m,) count the units of the draw from 0 and
    never decrease. The last unit may go on in the next micro-batch: then `unfinished` is true.
    """

    rows: Ints
    owners: Ints
    unfinished: bool
    shape: tuple[int, int] | None = None  # (records, tokens) to fill up to; None: as it comes


def micro_batches(
    units: UnitIndex, drawn: Ints, lengths: Ints, tokens: int
) -> Iterator[MicroBatch]:
    """Cut a draw into micro-batches of at most `tokens` padded tokens (one record at the least).

    Units are ordered by their longest record and keep their records together, so at most one unit
    is open between two micro-batches. `lengths` is (records,), the tokens of every encoded record.
    """
    rows, owners = _ordered(units, drawn, lengths)
    widths, start = lengths[rows], 0
    while start < len(rows):
        stop = _fits(widths, start, tokens)
        unfinished = stop < len(rows) and owners[stop] == owners[stop - 1]
        yield MicroBatch(rows[start:stop], owners[start:stop], bool(unfinished))
        start = stop


def private_batches(
    units: UnitIndex, drawn: Ints, lengths: Ints, tokens: int, fixed: Fixed
) -> Iterator[MicroBatch]:
    """Micro-batches in which no unit's gradient depends on another (`common.model.shapes`).

    Units of one record go together in batches of fixed shapes. A unit of several records goes by
    itself, in micro-batches of its own records and at most `tokens` padded tokens.
    """
    sizes = units.offsets[drawn + 1] - units.offsets[drawn]
    single = units.records[units.offsets[drawn[sizes == 1]]]
    for chosen, shape in fixed(lengths[single]):
        owners = np.arange(len(chosen), dtype=np.int64)
        yield MicroBatch(single[chosen], owners, False, (shape.records, shape.tokens))
    for unit in drawn[sizes > 1]:
        yield from micro_batches(units, np.array([unit]), lengths, tokens)


def unit_records(units: UnitIndex, drawn: Ints) -> tuple[Ints, Ints]:
    """Places in `units.records` of the drawn units' records, and the drawn unit of each."""
    sizes = units.offsets[drawn + 1] - units.offsets[drawn]
    owners = np.repeat(np.arange(len(drawn), dtype=np.int64), sizes)
    within = np.arange(len(owners), dtype=np.int64) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return units.offsets[drawn][owners] + within, owners


def _ordered(units: UnitIndex, drawn: Ints, lengths: Ints) -> tuple[Ints, Ints]:
    """Records of the drawn units, longest unit first (memory fails at once), and owners."""
    places, owners = unit_records(units, drawn)
    longest = np.zeros(len(drawn), dtype=np.int64)
    np.maximum.at(longest, owners, lengths[units.records[places]])
    order = np.argsort(-longest, kind="stable")
    places, owners = unit_records(units, drawn[order])
    return units.records[places], owners


def _fits(lengths: Ints, start: int, tokens: int) -> int:
    """The end of the micro-batch that begins at `start`."""
    longest, stop = int(lengths[start]), start + 1
    while stop < len(lengths):
        longest = max(longest, int(lengths[stop]))
        if longest * (stop + 1 - start) > tokens:
            break
        stop += 1
    return stop
