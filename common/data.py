"""Reading records, and which of them form one unit of privacy.

JSON lines, CSV and Parquet; every fault names file, row and column. Row numbers count records from 1.
Nothing here looks at labels to decide what labels exist: the label set is public and fixed.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedlora.common.errors import BadInput

Ints = npt.NDArray[np.int64]

MAX_LINE_BYTES = 10 << 20
MAX_FILE_BYTES = 8 << 30


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
        return tuple(dict.fromkeys(name for name in (self.text, self.response, self.label, self.unit, *self.more) if name))


@dataclass(frozen=True, eq=False)
class Records:
    """Rows of one file. `labels` are indices into the public label set."""

    texts: Sequence[str]
    responses: Sequence[str] | None
    labels: Ints | None
    units: Sequence[str] | None
    columns: Mapping[str, Sequence[Any]]
    where: str

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: Ints, where: str = "") -> Records:
        """The records at `rows`, in that order."""

        def pick(values: Sequence[Any] | None) -> Any:
            return None if values is None else [values[row] for row in rows]

        columns = {name: pick(values) for name, values in self.columns.items()}
        labels = None if self.labels is None else self.labels[rows]
        return Records(
            pick(self.texts), pick(self.responses), labels, pick(self.units), columns, where or self.where
        )


@dataclass(frozen=True, eq=False)
class UnitIndex:
    """Units as ragged lists: unit u owns records[offsets[u]:offsets[u + 1]]."""

    offsets: Ints
    records: Ints

    def __len__(self) -> int:
        return len(self.offsets) - 1


def read_records(path: Path, columns: Columns, labels: Sequence[str] = (), root: Path | None = None) -> Records:
    """Read a file whole. `labels` is the public label set, against which every label is checked.

    With `root` given, a path that leads out of it (through a symbolic link too) is refused.
    """
    where = path.name
    table = _table(_inside(path, root), columns.wanted, where)
    rows = len(next(iter(table.values()))) if table else 0
    if rows == 0:
        raise BadInput(f"{where}: found no records, expected at least one")
    return Records(
        texts=_strings(table[columns.text], where, columns.text),
        responses=_strings(table[columns.response], where, columns.response) if columns.response else None,
        labels=_labels(table[columns.label], labels, where, columns.label) if columns.label and labels else None,
        units=_units(table[columns.unit], where, columns.unit) if columns.unit else None,
        columns={name: table[name] for name in columns.more},
        where=where,
    )


def read_label_set(path: Path, column: str) -> tuple[str, ...]:
    """The labels that occur in a *public* file: 0..k-1 for integers, the sorted strings otherwise."""
    values = _table(path, (column,), path.name)[column]
    _no_nulls(values, path.name, column)
    if all(isinstance(value, int) and not isinstance(value, bool) for value in values) and values:
        return tuple(str(number) for number in range(max(values) + 1))
    return tuple(sorted({str(value) for value in values}))


def unit_groups(units: Sequence[str] | None, records: int | None = None) -> UnitIndex:
    """Units in order of first appearance; with `units` None, each of `records` records is its own."""
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


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as stream:
        return "sha256:" + hashlib.file_digest(stream, "sha256").hexdigest()


def check_unchanged(path: Path, digest: str) -> None:
    """BadInput where a data file is not what it was when the run began."""
    found = file_digest(path)
    if found != digest:
        raise BadInput(f"{path.name}: found {found}, expected {digest}: the data changed during the run")


def _records_of(units: UnitIndex, chosen: Ints) -> Ints:
    parts = [units.records[units.offsets[unit] : units.offsets[unit + 1]] for unit in chosen]
    return np.sort(np.concatenate(parts))


def _inside(path: Path, root: Path | None) -> Path:
    if root is not None and not path.resolve().is_relative_to(root.resolve()):
        raise BadInput(f"{path.name}: leads to a place outside {root.name}, expected a file inside it")
    if not path.is_file():
        raise BadInput(f"{path}: found no such file")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise BadInput(f"{path.name}: found {path.stat().st_size} bytes, expected at most {MAX_FILE_BYTES}")
    return path


def _table(path: Path, wanted: Sequence[str], where: str) -> dict[str, list[Any]]:
    readers = {".parquet": _read_parquet, ".jsonl": _read_jsonl, ".csv": _read_csv}
    if path.suffix not in readers:
        raise BadInput(f"{where}: found {path.suffix or 'no ending'}, expected one of {', '.join(readers)}")
    if not path.is_file():
        raise BadInput(f"{path}: found no such file")
    return readers[path.suffix](path, wanted, where)


def _read_parquet(path: Path, wanted: Sequence[str], where: str) -> dict[str, list[Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        _need(wanted, file.schema_arrow.names, where)
        table = file.read(columns=list(wanted))
        return {name: table[name].to_pylist() for name in wanted}
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{where}: can't be read as Parquet ({str(error).splitlines()[0]})") from error


def _read_jsonl(path: Path, wanted: Sequence[str], where: str) -> dict[str, list[Any]]:
    table: dict[str, list[Any]] = {name: [] for name in wanted}
    row = 0
    for number, line in enumerate(_lines(path, where), start=1):
        if not line.strip():
            continue
        row += 1
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{where} line {number}: found no JSON ({error})") from error
        if not isinstance(record, dict):
            raise BadInput(f"{where} line {number}: found {type(record).__name__}, expected an object")
        _need(wanted, list(record), f"{where} row {row}")
        for name in wanted:
            table[name].append(record[name])
    return table


def _read_csv(path: Path, wanted: Sequence[str], where: str) -> dict[str, list[Any]]:
    table: dict[str, list[Any]] = {name: [] for name in wanted}
    reader = csv.DictReader(_lines(path, where))
    try:
        if reader.fieldnames is None:
            return table
        _need(wanted, list(reader.fieldnames), where)
        for record in reader:
            for name in wanted:
                table[name].append(_number_or_text(record[name]))
    except csv.Error as error:
        raise BadInput(f"{where} line {reader.line_num}: {error}") from error
    return table


def _lines(path: Path, where: str) -> Iterator[str]:
    with path.open("rb") as stream:
        number = 0
        while line := stream.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                raise BadInput(f"{where} line {number}: longer than {MAX_LINE_BYTES} bytes")
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise BadInput(f"{where} line {number}: found a byte that is not UTF-8 at {error.start}") from error


def _number_or_text(value: str | None) -> Any:
    """CSV has no types: an integer is what reads as one and nothing more."""
    if value is not None and (value.isdecimal() and value.isascii()) and str(int(value)) == value:
        return int(value)
    return value


def _need(wanted: Sequence[str], found: Sequence[str], where: str) -> None:
    missing = [name for name in wanted if name not in found]
    if missing:
        raise BadInput([f"{where}: found no column {name!r}, but {', '.join(sorted(found))}" for name in missing])


def _no_nulls(values: Sequence[Any], where: str, column: str) -> None:
    for row, value in enumerate(values, start=1):
        if value is None or value == "":
            raise BadInput(f"{where} row {row} {column}: found nothing, expected a value")


def _strings(values: Sequence[Any], where: str, column: str) -> list[str]:
    for row, value in enumerate(values, start=1):
        if value is None or (isinstance(value, bool | float | list | dict)):
            raise BadInput(f"{where} row {row} {column}: found {type(value).__name__}, expected text")
    return [str(value) for value in values]


def _units(values: Sequence[Any], where: str, column: str) -> list[str]:
    _no_nulls(values, where, column)
    return [str(value) for value in values]


def _labels(values: Sequence[Any], labels: Sequence[str], where: str, column: str) -> Ints:
    _no_nulls(values, where, column)
    place = {label: index for index, label in enumerate(labels)}
    for row, value in enumerate(values, start=1):
        if str(value) not in place:
            shown = ", ".join(labels[:5]) + (", …" if len(labels) > 5 else "")
            raise BadInput(f"{where} row {row} {column}: found {value!r}, expected one of the {len(labels)} labels {shown}")
    return np.array([place[str(value)] for value in values], dtype=np.int64)
