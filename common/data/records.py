"""Records, and which of them form one unit of privacy.

Every fault names file, row and column. Row numbers count a file's records from 1, also in the part
of a file that `take` picked. No training file decides what labels exist: the label set is public
and fixed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedlora.common.data.conversations import conversations
from fedlora.common.data.data_file import columns_of
from fedlora.common.data.formats import Values
from fedlora.common.data.media import media_files
from fedlora.common.data.tagged import WORDS, tagged_words
from fedlora.common.data.values import (
    label_lists,
    labels_of,
    lists_of,
    names_of,
    numbers,
    refuse_alike,
    refuse_fractions,
    strings,
    units_of,
)
from fedlora.common.errors import BadInput

Ints = npt.NDArray[np.int64]

MAX_LABELS = 100_000
MEDIA = "media"  # of `Records.parts`: what is no text, as `data.media.MediaFile`


@dataclass(frozen=True)
class Columns:
    """Which columns of a file hold what; "" where there is no such column."""

    text: str
    second: str = ""  # the other text of a pair
    response: str = ""
    label: str = ""  # one of the public label set
    labels: str = ""  # a list of it
    score: str = ""  # a number
    tokens: str = ""  # a list of words; "": the words of the text
    tags: str = ""  # a list of their tags, or of spans of the text
    messages: str = ""  # a list of messages
    media: str = ""  # bytes, or paths of files: of records that are no text
    unit: str = ""
    more: tuple[str, ...] = ()  # read as they are

    @property
    def wanted(self) -> tuple[str, ...]:
        """The names that are not empty, each once: the columns that are read."""
        names = [self.text, self.second, self.response, self.label, self.labels, self.score]
        names += [self.tokens, self.tags, self.messages, self.media, self.unit, *self.more]
        return tuple(dict.fromkeys(name for name in names if name))


@dataclass(frozen=True, eq=False)
class Records:
    """Rows of one file. `labels` are indices into the public label set.

    The text of a record that is none is the digest of its bytes.
    """

    texts: Sequence[str]
    responses: Sequence[str] | None
    labels: Ints | None
    units: Sequence[str] | None
    columns: Mapping[str, Sequence[str]]
    where: str
    rows: Ints | None = None  # where each record stood in its file, from 0; None: in this order
    respelled: int = 0  # units of the file that were spelled in more than one way
    unanswered: bool = False  # nobody's: there is nothing to learn from them
    # what only some tasks read: a list by name, as long as `texts`
    parts: Mapping[str, Sequence[Any]] = field(default_factory=dict)

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
            unanswered=self.unanswered,
            parts={name: pick(values) for name, values in self.parts.items()},
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

    def take(self, units: Ints) -> UnitIndex:
        """Some of the units, in the order given, over the same records."""
        sizes = self.offsets[units + 1] - self.offsets[units]
        offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        starts = np.repeat(self.offsets[units] - offsets[:-1], sizes)
        return UnitIndex(offsets, self.records[starts + np.arange(offsets[-1])])


def read_records(
    path: Path, columns: Columns, labels: Sequence[str] = (), root: Path | None = None
) -> Records:
    """Read a file whole. `labels` is the public label set, against which every label is checked.

    With `root` given, a path that leads out of it (through a symbolic link too) is refused.
    """
    where = path.name
    table = columns_of(path, columns.wanted, root)
    parts = _parts(table, columns, labels, where)
    if columns.media:
        folder = path if path.is_dir() else path.parent
        parts[MEDIA] = media_files(table[columns.media], folder, where, columns.media)
    texts = _texts(table, columns, parts, where)
    if not texts:
        raise BadInput(f"{where}: found no records, expected at least one")
    units, respelled = None, 0
    if columns.unit:
        units, respelled = units_of(table[columns.unit], where, columns.unit)
    return Records(
        texts=texts,
        responses=strings(table[columns.response], where, columns.response)
        if columns.response
        else None,
        labels=labels_of(table[columns.label], labels, where, columns.label)
        if columns.label
        else None,
        units=units,
        columns={name: names_of(table[name], where, name) for name in columns.more},
        where=where,
        respelled=respelled,
        parts=parts,
    )


def read_label_set(path: Path, column: str) -> tuple[str, ...]:
    """The labels that occur in a *public* file: numbers by size, else strings sorted.

    BadInput where two are one but for white space, case or Unicode's forms, or all are numbers and
    not all of them integers.
    """
    where = path.name
    values = columns_of(path, (column,), None)[column]
    found = set(names_of(values, where, column))
    if not found:
        raise BadInput(f"{where}: found no records, expected at least one")
    numbered = all(isinstance(value, int) for value in values)
    refuse_fractions(sorted(found), f"{where} {column}")
    return _label_set(sorted(found, key=int if numbered else None), where, column)


def read_label_lists(path: Path, column: str) -> tuple[str, ...]:
    """The labels that occur in the lists of a *public* file, sorted."""
    where = path.name
    found = lists_of(columns_of(path, (column,), None)[column], where, column)
    return _label_set(sorted({name for names in found for name in names}), where, column)


def _label_set(labels: Sequence[str], where: str, column: str) -> tuple[str, ...]:
    if not 2 <= len(labels) <= MAX_LABELS:
        raise BadInput(f"{where} {column}: found {len(labels)} labels, expected 2 to {MAX_LABELS}")
    refuse_alike(labels, f"{where} {column}")
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


def _texts(
    table: Mapping[str, Values], columns: Columns, parts: Mapping[str, Sequence[Any]], where: str
) -> list[str]:
    """A text of each record: its own, what was said, its words, or the digest of its bytes."""
    if columns.text:
        return strings(table[columns.text], where, columns.text)
    if columns.messages:
        return ["\n".join(each["content"] for each in own) for own in parts["messages"]]
    if columns.media:
        return [each.digest for each in parts[MEDIA]]
    return [" ".join(words) for words in parts[WORDS]]


def _parts(
    table: Mapping[str, Values], columns: Columns, labels: Sequence[str], where: str
) -> dict[str, Sequence[Any]]:
    """What only some tasks read, by name."""
    found: dict[str, Sequence[Any]] = {}
    if columns.second:
        found["second"] = strings(table[columns.second], where, columns.second)
    if columns.score:
        found["score"] = numbers(table[columns.score], where, columns.score)
    if columns.labels:
        found["labels"] = label_lists(table[columns.labels], labels, where, columns.labels)
    if columns.messages:
        found["messages"] = conversations(table[columns.messages], where, columns.messages)
    if columns.tags:
        words = columns.tokens or columns.text
        given = table[words] if columns.tokens else strings(table[words], where, words)
        found |= tagged_words(given, table[columns.tags], labels, where, (words, columns.tags))
    return found
