"""Formats of data files: lines of JSON, CSV, Parquet, Arrow and SQLite as columns, within bounds.

Every fault is one line that names file, and row or line.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedlora.common.config.toml import shown
from fedlora.common.data.database import ENDINGS, read_database
from fedlora.common.errors import BadInput

Values = list[Any]
Reader = Callable[[Path, Sequence[str], str], dict[str, Values]]

MAX_LINE_BYTES = 10 << 20
MAX_FILE_BYTES = 8 << 30  # once unpacked, too
MAX_JSON_BYTES = 1 << 30  # of one value that holds all records
ZIPPED = ".gz"


def kind_of(path: Path) -> str:
    """The ending that says how a file is read, in lower case and without .gz."""
    name = Path(path.stem) if path.suffix.lower() == ZIPPED else path
    return name.suffix.lower()


def check_size(size: int, where: str) -> None:
    """BadInput where files are larger than may be read."""
    if size > MAX_FILE_BYTES:
        raise BadInput(f"{where}: found {size} bytes, expected at most {MAX_FILE_BYTES}")


def _read_parquet(path: Path, wanted: Sequence[str], where: str) -> dict[str, Values]:
    import pyarrow
    import pyarrow.parquet

    with (
        _arrow(where, "Parquet"),
        _opened(path) as stream,
        pyarrow.parquet.ParquetFile(pyarrow.PythonFile(stream, mode="r")) as file,
    ):
        _need(wanted, file.schema_arrow.names, where)
        groups = (file.metadata.row_group(group) for group in range(file.metadata.num_row_groups))
        check_size(sum(group.total_byte_size for group in groups), where)
        table = file.read(columns=list(wanted))
        return {name: table[name].to_pylist() for name in wanted}


def _read_arrow(path: Path, wanted: Sequence[str], where: str) -> dict[str, Values]:
    """Arrow's file or stream format: the second is what `datasets` saves."""
    import pyarrow
    import pyarrow.ipc

    with (
        _arrow(where, "Arrow"),
        _opened(path) as stream,
        pyarrow.PythonFile(stream, mode="r") as whole,
    ):
        try:
            table = pyarrow.ipc.open_file(whole).read_all()
        except pyarrow.ArrowInvalid:
            whole.seek(0)
            table = pyarrow.ipc.open_stream(whole).read_all()
        _need(wanted, table.column_names, where)
        return {name: table[name].to_pylist() for name in wanted}


@contextmanager
def _arrow(where: str, expected: str) -> Iterator[None]:
    """What Arrow can't read is one line: BadInput."""
    import pyarrow

    try:
        yield
    except UnicodeDecodeError as error:
        raise BadInput(f"{where}: found text that is not UTF-8, expected UTF-8") from error
    # the others are of times that Python has no value for
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:
        reason = str(error).splitlines()[0][:200]
        raise BadInput(f"{where}: can't be read ({reason}), expected {expected}") from error


def _read_json(path: Path, wanted: Sequence[str], where: str) -> dict[str, Values]:
    """A list of objects, or one object to a line."""
    with _opened(path) as stream:
        begin = stream.read(64).decode("utf-8-sig", "replace").lstrip()
    if not begin.startswith("["):
        return _read_jsonl(path, wanted, where)
    with _opened(path) as stream:
        data = stream.read(MAX_JSON_BYTES + 1)
    if len(data) > MAX_JSON_BYTES:
        raise BadInput(
            f"{where}: found more than {MAX_JSON_BYTES} bytes in one list, expected JSON lines"
        )
    try:
        found = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise BadInput(f"{where}: found no JSON ({reason}), expected a list of objects") from error
    table: dict[str, Values] = {name: [] for name in wanted}
    for row, record in enumerate(found, start=1):
        _add(table, record, f"{where} row {row}", f"{where} row {row}")
    return table


def _read_jsonl(path: Path, wanted: Sequence[str], where: str) -> dict[str, Values]:
    table: dict[str, Values] = {name: [] for name in wanted}
    row = 0
    for number, line in enumerate(_lines(path, where), start=1):
        if not line.strip():
            continue
        row += 1
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = str(error).splitlines()[0]
            raise BadInput(
                f"{where} line {number}: found no JSON ({reason}), expected an object"
            ) from error
        _add(table, record, f"{where} line {number}", f"{where} row {row}")
    return table


def _add(table: Mapping[str, Values], record: Any, line: str, row: str) -> None:
    """The wanted values of an object, each to its column."""
    if not isinstance(record, dict):
        raise BadInput(f"{line}: found {type(record).__name__}, expected an object")
    _need(list(table), list(record), row)
    for name, column in table.items():
        column.append(record[name])


def _read_csv(path: Path, wanted: Sequence[str], where: str) -> dict[str, Values]:
    """RFC 4180 with a header, tabs for commas in a .tsv.

    Fields up to 128 KiB: no unclosed quote swallows the file.
    """
    table: dict[str, Values] = {name: [] for name in wanted}
    mark = "\t" if kind_of(path) == ".tsv" else ","
    reader = csv.reader(_lines(path, where), strict=True, delimiter=mark)
    try:
        header = next(reader, [])
        _need(wanted, header, where)
        places = [(table[name], header.index(name)) for name in wanted]
        for fields in reader:
            if len(fields) not in (0, len(header)):
                found = f"found {len(fields)} fields, expected {len(header)} as in the header"
                raise BadInput(f"{where} line {reader.line_num}: {found}")
            for column, place in places if fields else ():
                column.append(_number_or_text(fields[place]))
    except csv.Error as error:
        raise BadInput(
            f"{where} line {reader.line_num}: found no CSV ({error}), expected fields"
        ) from error
    return table


READERS: dict[str, Reader] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    **dict.fromkeys(ENDINGS, read_database),
}


def _opened(path: Path) -> io.BufferedIOBase:
    """The bytes of a file, unpacked where it is zipped: then all at once, within bounds."""
    if path.suffix.lower() != ZIPPED:
        return path.open("rb")
    try:
        with gzip.open(path) as stream:
            data = stream.read(MAX_FILE_BYTES + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise BadInput(f"{path.name}: can't be unpacked ({error}), expected gzip") from error
    check_size(len(data), f"{path.name}, unpacked")
    return io.BytesIO(data)


def _lines(path: Path, where: str) -> Iterator[str]:
    with _opened(path) as stream:
        number = 0
        while line := stream.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                raise BadInput(
                    f"{where} line {number}: found more than {MAX_LINE_BYTES} bytes, expected fewer"
                )
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                found = f"found a byte that is not UTF-8 at {error.start}, expected UTF-8"
                raise BadInput(f"{where} line {number}: {found}") from error


def _number_or_text(value: str) -> int | str:
    """CSV has no types: an integer is what reads as one and nothing more."""
    if len(value) <= 18 and value.isdecimal() and str(int(value)) == value:
        return int(value)
    return value


def _need(wanted: Sequence[str], found: Sequence[str], where: str) -> None:
    faults = []
    for name in wanted:
        if name not in found:
            faults.append(
                f"{where}: found columns {shown(sorted(found))}, expected {shown(name)} among them"
            )
        elif list(found).count(name) > 1:
            faults.append(f"{where}: found column {shown(name)} twice, expected it once")
    if faults:
        raise BadInput(faults)
