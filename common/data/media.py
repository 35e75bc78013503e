"""A column of records that are no text: their bytes, files beside the table, or both in one.

A value is bytes, a path relative to the table's folder, or the `{"bytes", "path"}` that `datasets`
writes. A path may not lead out of the table's folder, nor through a link. Files are read here, once
and whole: what is trained on later is what was there then.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.common.config.toml import shown
from fedlora.common.data.formats import MAX_FILE_BYTES, Values
from fedlora.common.disk.files import read_bytes
from fedlora.common.errors import BadInput

MAX_MEDIUM_BYTES = 64 << 20  # of one record


@dataclass(frozen=True)
class MediaFile:
    """A record's bytes as they lay, and what a person calls it."""

    name: str
    data: bytes

    @property
    def digest(self) -> str:
        """Of its bytes: what two records that are alike have in common."""
        return f"sha256:{hashlib.sha256(self.data).hexdigest()}"


def media_files(values: Values, folder: Path | None, where: str, column: str) -> list[MediaFile]:
    """Each record's bytes; BadInput names the row of what is missing, outside or too large.

    `folder` None: whoever names a path is its owner, and it may lead anywhere.
    """
    found, total = [], 0
    for row, value in enumerate(values, start=1):
        found.append(_media_file(value, folder, f"{where} row {row} {column}"))
        total += len(found[-1].data)
        if total > MAX_FILE_BYTES:
            raise BadInput(
                f"{where} row {row} {column}: found more than {MAX_FILE_BYTES} bytes in all,"
                " expected fewer"
            )
    return found


def media_file(path: Path) -> MediaFile:
    """A file that its owner named; BadInput where it can't be read, or is too large."""
    return MediaFile(path.name, read_bytes(path, MAX_MEDIUM_BYTES, "a file"))


def _media_file(value: Any, folder: Path | None, place: str) -> MediaFile:
    data, path = value, value
    if isinstance(value, Mapping):
        data, path = value.get("bytes"), value.get("path")
    if isinstance(data, bytes | bytearray | memoryview):
        if not 0 < len(data) <= MAX_MEDIUM_BYTES:
            raise BadInput(f"{place}: found {len(data)} bytes, expected 1 to {MAX_MEDIUM_BYTES}")
        name = Path(path).name if isinstance(path, str) else f"{len(data):,} bytes"
        return MediaFile(name, bytes(data))
    if isinstance(path, Path) or (isinstance(path, str) and path):
        return MediaFile(str(path), _inside(str(path), folder, place))
    kind = "nothing" if path is None or path == "" else type(value).__name__
    raise BadInput(f"{place}: found {kind}, expected bytes, or the path of a file")


def _inside(path: str, folder: Path | None, place: str) -> bytes:
    """The bytes of a file in `folder`."""
    root = Path("/") if folder is None else folder.resolve()
    try:
        real = ((folder or Path()) / path).resolve()
        there = real.is_relative_to(root)
        if there and real.is_file():
            return read_bytes(real, MAX_MEDIUM_BYTES, "a file", f"{place} {shown(path)}")
    except (OSError, ValueError) as error:  # a name that no system takes
        raise BadInput(f"{place}: found {shown(path[:200])}, which can't be read") from error
    expected = "a file" if there else f"one inside {root.name}, the table's folder"
    raise BadInput(f"{place}: found {shown(path[:200])}, expected {expected}")
