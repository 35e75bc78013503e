"""Records given as Python objects instead of files: lists, frames, datasets.

They are written as JSON lines where the run keeps everything else, so that every engine, `--resume`
and the command line read what Python gave. The same records give the same file, and others never
take its place.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedlora.common.config.schema import Config
from fedlora.common.config.toml import shown
from fedlora.common.data.media import MediaFile, media_files
from fedlora.common.disk.files import create_once, write_atomically
from fedlora.common.errors import BadInput
from fedlora.server.runs.public_data import columns_of
from fedlora.simulations.experiments.configuration import TEST_SHARE

# Rows (mappings), columns by name, or whatever has columns that can be listed: a frame of pandas or
# polars, a table of pyarrow, a dataset of Hugging Face.
Table = Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Any]] | Any
FOLDER = "data"  # in a run's folder


def with_records(
    config: Config, folder: Path, train: Table | None = None, test: Table | None = None
) -> Config:
    """`config`, which reads what is given from files in `folder`/data that only its owner reads.

    Of a table the columns that `config` names are kept. Without any test records a tenth of the
    training part is set aside as public. BadInput says which column or row is missing.
    """
    given = {"train": train, "test": test}
    media = columns_of(config.data, config.model.task).media
    paths: dict[str, Any] = {
        name: _write(folder / FOLDER, table, _wanted(config, name), name, media)
        for name, table in given.items()
        if table is not None
    }
    data = replace(config.data, **paths)
    if train is not None and data.test == "":
        data = replace(data, test=TEST_SHARE)
    return replace(config, data=data)


def _wanted(config: Config, name: str) -> tuple[str, ...]:
    """What a run reads: only training records have a unit, and are dealt out by a column."""
    columns = columns_of(config.data, config.model.task)
    if name == "train":
        dealt = (config.federation.column,) if config.federation.column else ()
        columns = replace(columns, unit=config.data.unit, more=dealt)
    return columns.wanted


def _write(folder: Path, table: Table, wanted: Sequence[str], name: str, media: str) -> str:
    """The file's path; its name ends with the digest of its bytes.

    What is in the column `media` lies in files beside it, each under the digest of its own.
    """
    columns = _columns(table, wanted, name)
    folder.mkdir(parents=True, exist_ok=True)
    if media:
        place = list(wanted).index(media)
        files = media_files(columns[place], None, name, media)
        columns[place] = [_kept(folder, each) for each in files]
    rows = (dict(zip(wanted, row, strict=True)) for row in zip(*columns, strict=True))
    lines = "".join(json.dumps(row, default=_plain) + "\n" for row in rows).encode()
    path = folder / f"{name}-{hashlib.sha256(lines).hexdigest()[:16]}.jsonl"
    write_atomically(path, lines, 0o600)
    return str(path)


def _kept(folder: Path, file: MediaFile) -> str:
    name = file.digest.removeprefix("sha256:")
    create_once(folder / name, file.data, 0o600)
    return name


def _columns(table: Table, wanted: Sequence[str], name: str) -> list[list[Any]]:
    """The wanted columns, each as long as the table."""
    if isinstance(table, Sequence) and not isinstance(table, str | bytes):
        rows = [_row(row, wanted, f"{name} row {number}") for number, row in enumerate(table, 1)]
        return [list(column) for column in zip(*rows, strict=True)] or [[] for _ in wanted]
    names = getattr(table, "column_names", getattr(table, "columns", table))
    if isinstance(table, str | bytes | Path) or not hasattr(table, "__getitem__"):
        raise BadInput(f"{name}: found {type(table).__name__}, expected rows or columns of records")
    _need(wanted, list(names), name)
    columns = [_listed(table[column]) for column in wanted]
    if len({len(column) for column in columns}) > 1:
        raise BadInput(f"{name}: found columns of {[*map(len, columns)]} rows, expected one length")
    return columns


def _row(row: object, wanted: Sequence[str], where: str) -> list[Any]:
    if not isinstance(row, Mapping):
        raise BadInput(f"{where}: found {type(row).__name__}, expected a value for each column")
    _need(wanted, list(row), where)
    return [row[column] for column in wanted]


def _need(wanted: Sequence[str], found: Sequence[object], where: str) -> None:
    if missing := [column for column in wanted if column not in found]:
        raise BadInput(
            f"{where}: found columns {shown(sorted(map(str, found)))}, expected"
            f" {shown(missing[0])} among them"
        )


def _listed(column: Any) -> list[Any]:
    """A column as Python values, by the method that its library has for it."""
    for method in ("to_pylist", "tolist", "to_list"):
        if hasattr(column, method):
            return list(getattr(column, method)())
    return list(column)


def _plain(value: Any) -> Any:
    """A NumPy scalar as Python's, an array as a list: pandas has lists of Parquet as arrays."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise BadInput(f"found {type(value).__name__}, expected text or a number in each column")
