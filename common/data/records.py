"""Records, and which of them form one unit of privacy.

A unit has one spelling: names that differ in white space, case or Unicode's forms are one unit, of
which each would else have had the whole ε. Every fault names file, row and column. Row numbers
count a file's records from 1, also in the part of a file that `take` picked. No training file
decides what labels exist: the label set is public and fixed.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedlora.common.config.toml import shown
from fedlora.common.data.data_file import Values, columns_of
from fedlora.common.errors import BadInput

Ints = npt.NDArray[np.int64]
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_INVISIBLE = re.compile(  # what Unicode lets a program ignore when it shows a text
    "[\u00ad\u034f\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff]"
)

MAX_LABELS = 100_000


@dataclass(frozen=True)
class Columns:
    """Which columns of a file hold what; "" where there is no such column."""

    text: str
    response: str = ""
    label: str = ""
    unit: str = ""
    more: tuple[str, ...] = ()  # read as they are

    @property
    def wanted(self) -> tuple[str, ...]:
        """The names that are not empty, each once: the columns that are read."""
        names = (self.text, self.response, self.label, self.unit, *self.more)
        return tuple(dict.fromkeys(name for name in names if name))


@dataclass(frozen=True, eq=False)
class Records:
    """Rows of one file. `labels` are indices into the public label set."""

    texts: Sequence[str]
    responses: Sequence[str] | None
    labels: Ints | None
    units: Sequence[str] | None
    columns: Mapping[str, Sequence[str]]
    where: str
    rows: Ints | None = None  # where each record stood in its file, from 0; None: in this order
    respelled: int = 0  # units of the file that were spelled in more than one way

    def __len__(self) -> int:
        return len(self.texts)

    def place(self, record: int) -> str:
        """File and row of a record, as a person finds it."""
        return f"{self.where} row {(record if self.rows is None else int(self.rows[record])) + 1}"

    def take(self, rows: Ints, where: str = "") -> Records:
        """The records at `rows`, in that order."""

        def pick(values: Sequence[Any] | None) -> Any:
            return None if values is None else [values[row] for row in rows]

        return Records(
            texts=pick(self.texts),
            responses=pick(self.responses),
            labels=None if self.labels is None else self.labels[rows],
            units=pick(self.units),
            columns={name: pick(values) for name, values in self.columns.items()},
            where=where or self.where,
            rows=np.asarray(rows, dtype=np.int64) if self.rows is None else self.rows[rows],
            respelled=self.respelled,
        )

    @property
    def spellings(self) -> str:
        """What the owner of the file should look at in its units, or "". Never for anybody else."""
        if not self.respelled:
            return ""
        return (
            f"{self.where}: {self.respelled} units were spelled in several ways (white space, case"
            " or Unicode form); each is one unit"
        )


@dataclass(frozen=True, eq=False)
class UnitIndex:
    """Units as ragged lists: unit u owns records[offsets[u]:offsets[u + 1]]."""

    offsets: Ints
    records: Ints

    def __len__(self) -> int:
        return len(self.offsets) - 1


def read_records(
    path: Path, columns: Columns, labels: Sequence[str] = (), root: Path | None = None
) -> Records:
    """Read a file whole. `labels` is the public label set, against which every label is checked.

    With `root` given, a path that leads out of it (through a symbolic link too) is refused.
    """
    where = path.name
    table = columns_of(path, columns.wanted, root)
    texts = _strings(table[columns.text], where, columns.text)
    if not texts:
        raise BadInput(f"{where}: found no records, expected at least one")
    units, respelled = None, 0
    if columns.unit:
        units, respelled = _units(table[columns.unit], where, columns.unit)
    return Records(
        texts=texts,
        responses=_strings(table[columns.response], where, columns.response)
        if columns.response
        else None,
        labels=_labels(table[columns.label], labels, where, columns.label)
        if columns.label
        else None,
        units=units,
        columns={name: _names(table[name], where, name) for name in columns.more},
        where=where,
        respelled=respelled,
    )


def unit_name(name: str) -> str:
    """The one spelling of a unit: NFKC, case folded, white space single, nothing invisible."""
    folded, before = name, ""
    while folded != before:  # one step may make room for another: what is canonical stays so
        before = folded
        folded = unicodedata.normalize("NFKC", _INVISIBLE.sub("", folded)).casefold()
    return " ".join(folded.split())


def read_label_set(path: Path, column: str) -> tuple[str, ...]:
    """The labels that occur in a *public* file: 0..k-1 for integers, else the sorted strings."""
    where = path.name
    values = columns_of(path, (column,), None)[column]
    strings = _names(values, where, column)
    if not strings:
        raise BadInput(f"{where}: found no records, expected at least one")
    labels = sorted(set(strings))
    if all(isinstance(value, int) for value in values):
        for row, value in enumerate(values, start=1):
            if not 0 <= value < MAX_LABELS:
                expected = f"expected an integer >= 0 and < {MAX_LABELS}"
                raise BadInput(f"{where} row {row} {column}: found {shown(value)}, {expected}")
        labels = [str(number) for number in range(max(values) + 1)]
    if not 2 <= len(labels) <= MAX_LABELS:
        raise BadInput(f"{where} {column}: found {len(labels)} labels, expected 2 to {MAX_LABELS}")
    return tuple(labels)


def unit_groups(units: Sequence[str] | None, records: int | None = None) -> UnitIndex:
    """Units in order of first appearance; `units` None: each of `records` records is its own."""
    if units is None:
        count = records or 0
        return UnitIndex(np.arange(count + 1, dtype=np.int64), np.arange(count, dtype=np.int64))
    numbers: dict[str, int] = {}
    owner = np.array([numbers.setdefault(unit, len(numbers)) for unit in units], dtype=np.int64)
    sizes = np.bincount(owner, minlength=len(numbers))
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    return UnitIndex(offsets, np.argsort(owner, kind="stable").astype(np.int64))


def split_validation(units: UnitIndex, share: float, seed: int) -> tuple[Ints, Ints]:
    """Records of the training and of the validation part; no unit is in both."""
    order = np.random.Generator(np.random.Philox(seed)).permutation(len(units))
    aside = max(1, round(share * len(units)))
    if aside >= len(units):
        raise BadInput(f"[data] validation = {share}: leaves no unit of {len(units)} for training")
    return _records_of(units, np.sort(order[aside:])), _records_of(units, np.sort(order[:aside]))


def _records_of(units: UnitIndex, chosen: Ints) -> Ints:
    picked = np.zeros(len(units), dtype=bool)
    picked[chosen] = True
    return np.sort(units.records[np.repeat(picked, np.diff(units.offsets))])


def _no_nulls(values: Values, where: str, column: str) -> None:
    for row, value in enumerate(values, start=1):
        # NaN is how pandas writes a missing value
        if value is None or value == "" or value != value:
            raise BadInput(f"{where} row {row} {column}: found nothing, expected a value")


def _strings(values: Values, where: str, column: str) -> list[str]:
    """Text, where an integer stands for its digits. What no file could hold as UTF-8 is refused."""
    for row, value in enumerate(values, start=1):
        if not isinstance(value, str | int) or isinstance(value, bool):
            found = "nothing" if value is None else type(value).__name__
            raise BadInput(
                f"{where} row {row} {column}: found {found}, expected text or an integer"
            )
        if isinstance(value, str) and not value.isascii() and _SURROGATE.search(value):
            raise BadInput(
                f"{where} row {row} {column}: found half a surrogate pair, expected text"
            )
    return [str(value) for value in values]


def _names(values: Values, where: str, column: str) -> list[str]:
    """Units or institutions: strings or integers, none missing."""
    _no_nulls(values, where, column)
    return _strings(values, where, column)


def _units(values: Values, where: str, column: str) -> tuple[list[str], int]:
    """Units in their one spelling, and how many of them had several."""
    names = _names(values, where, column)
    spelled = {name: unit_name(name) for name in dict.fromkeys(names)}
    if "" in spelled.values():
        row = next(row for row, name in enumerate(names, start=1) if not spelled[name])
        raise BadInput(f"{where} row {row} {column}: found nothing visible, expected a value")
    several = sum(count > 1 for count in Counter(spelled.values()).values())
    return [spelled[name] for name in names], several


def _labels(values: Values, labels: Sequence[str], where: str, column: str) -> Ints:
    if not labels:
        raise BadInput(
            f"{where} {column}: found no public label set, expected one to read labels against"
        )
    _no_nulls(values, where, column)
    place = {label: index for index, label in enumerate(labels)}
    for row, value in enumerate(values, start=1):
        if str(value) not in place:
            known = ", ".join(labels[:5]) + (", …" if len(labels) > 5 else "")
            raise BadInput(
                f"{where} row {row} {column}: found {shown(value)}, "
                f"expected one of the {len(labels)} public labels {known}"
            )
    return np.array([place[str(value)] for value in values], dtype=np.int64)
