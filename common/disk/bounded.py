"""Small files from outside: a bound on what is read, and one line that says what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

from fedlora.common.errors import BadInput

MAX_FILE_BYTES = 1 << 20


def read_bytes(
    path: Path, limit: int = MAX_FILE_BYTES, expected: str = "", where: str = ""
) -> bytes:
    """The bytes of a file; BadInput where it can't be read, or has more than `limit`.

    `expected` says what belongs there; `where` is the file's name, if not its path.
    """
    try:
        with path.open("rb") as stream:
            return bounded(stream, where or path.name, limit)
    except (OSError, ValueError) as error:  # ValueError: a path that no file can have
        reason = error.strerror if isinstance(error, OSError) else error
        raise BadInput(f"{where or path}: can't be read ({reason}){_end(expected)}") from error


def read_text(
    path: Path,
    limit: int = MAX_FILE_BYTES,
    expected: str = "",
    where: str = "",
    encoding: str = "utf-8",
) -> str:
    """A file of UTF-8; BadInput as from `read_bytes`, or where a byte is not that."""
    return text_of(read_bytes(path, limit, expected, where), where or path.name, expected, encoding)


def bounded(stream: BinaryIO, where: str, limit: int) -> bytes:
    """What is left of a stream; BadInput where it is more than `limit` bytes."""
    data = stream.read(limit + 1)  # never more, whatever kind of file this is
    if len(data) > limit:
        most = f"{limit >> 20} MiB" if limit >= 1 << 20 else f"{limit} bytes"
        raise BadInput(f"{where}: found more than {limit} bytes, expected at most {most}")
    return data


def text_of(data: bytes, where: str, expected: str = "", encoding: str = "utf-8") -> str:
    """UTF-8 as text; BadInput names the first byte that is not."""
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        found = f"found a byte that is not UTF-8 at {error.start}"
        raise BadInput(f"{where}: {found}{_end(expected)}") from error


def _end(expected: str) -> str:
    return f", expected {expected}" if expected else ""
