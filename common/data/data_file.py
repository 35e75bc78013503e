"""Data files: JSON lines, CSV and Parquet as columns, within bounds, and the digest of their bytes.

Every fault is one line that names file, and row or line.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fedlora.common.config.toml import shown
from fedlora.common.errors import BadInput

Values = list[Any]
Reader = Callable[[Path, Sequence[str], str], dict[str, Values]]

MAX_LINE_BYTES = 10 << 20
MAX_FILE_BYTES = 8 << 30  # of Parquet, once unpacked, too


def columns_of(path: Path, wanted: Sequence[str], root: Path | None) -> dict[str, Values]:
    """The wanted columns as they stand in the file: name to one value a record, in its order.

    BadInput where the file can't be read, lacks a column, or, `root` given, lies outside of it.
    """
    where = path.name
    if path.suffix not in READERS:
        raise BadInput(
            f"{where}: found {path.suffix or 'no ending'}, expected one of {', '.join(READERS)}"
        )
    if root is not None and not path.resolve().is_relative_to(root.resolve()):
        raise BadInput(f"{where}: leads to a place outside {root.name}, expected a file inside it")
    if not path.is_file():
        raise BadInput(f"{path}: found no such file, expected one of {', '.join(READERS)}")
    _check_size(path.stat().st_size, where)
    try:
        return READERS[path.suffix](path, wanted, where)
    except OSError as error:
        reason = error.strerror or str(error).splitlines()[0]
        raise BadInput(f"{path}: can't be read ({reason}), expected a data file") from error


def _check_size(size: int, where: str) -> None:
    if size > MAX_FILE_BYTES:
        raise BadInput(f"{where}: found {size} bytes, expected at most {MAX_FILE_BYTES}")


def _read_parquet(path: Path, wanted: Sequence[str], where: str) -> dict[str, Values]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _need(wanted, file.schema_arrow.names, where)
            groups = (
                file.metadata.row_group(group) for group in range(file.metadata.num_row_groups)
            )
            _check_size(sum(group.total_byte_size for group in groups), where)
            table = file.read(columns=list(wanted))
            return {name: table[name].to_pylist() for name in wanted}
    except UnicodeDecodeError as error:
        raise BadInput(f"{where}: found text that is not UTF-8, expected UTF-8") from error
    except pyarrow.ArrowException as error:
        reason = str(error).splitlines()[0][:200]
        raise BadInput(f"{where}: can't be read ({reason}), expected Parquet") from error


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
        if not isinstance(record, dict):
            raise BadInput(
                f"{where} line {number}: found {type(record).__name__}, expected an object"
            )
        _need(wanted, list(record), f"{where} row {row}")
        for name in wanted:
            table[name].append(record[name])
    return table


def _read_csv(path: Path, wanted: Sequence[str], where: str) -> dict[str, Values]:
    """RFC 4180 with a header; fields up to 128 KiB: no unclosed quote swallows the file."""
    table: dict[str, Values] = {name: [] for name in wanted}
    reader = csv.reader(_lines(path, where), strict=True)
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


READERS: dict[str, Reader] = {".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}


def _lines(path: Path, where: str) -> Iterator[str]:
    with path.open("rb") as stream:
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


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes."""
    try:
        with path.open("rb") as stream:
            return "sha256:" + hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise BadInput(f"{path}: can't be read ({error.strerror}), expected a data file") from error
