"""Files: whole or not there whatever dies meanwhile, bounded when read, logs of JSON lines.

What comes from outside is read up to a bound, and one line says what is wrong with it. A log is
written line by line, durably, and read whatever a kill left of it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from fedlora.common.errors import BadInput

MAX_FILE_BYTES = 1 << 20  # of a small file from outside
MOST_BYTES = 8 << 20  # of a log that makes room


def write_atomically(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Replace `path` by `data`: on disk before it is visible, and visible before this returns."""
    write_pieces(path, (data,), mode)


def write_pieces(path: Path, pieces: Iterable[bytes | memoryview], mode: int = 0o644) -> None:
    """As `write_atomically`, of what is too large to be put together first."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        with os.fdopen(descriptor, "wb") as stream:
            for piece in pieces:
                stream.write(piece)
            stream.flush()
            os.fsync(stream.fileno())
        scratch.replace(path)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        error.filename = str(path)  # a full disk has no name of its own
        raise
    sync_folder(path.parent)


def create_once(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Write a file that is whole from the first, or leave the one that was there before."""
    # not by process number, which two containers may have alike
    scratch = path.with_name(f".{path.name}.{os.urandom(8).hex()}")
    descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(descriptor)
        try:
            os.link(scratch, path)
        except FileExistsError:
            return
    finally:
        scratch.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make names that were created or replaced in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Replace a file by UTF-8, and make the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.encode())


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


@dataclass(frozen=True)
class Line:
    """One line of a log."""

    number: int  # from 1
    value: Any  # None where the line is no JSON
    ended: bool  # by a line end: a last line without one was cut short by a kill

    @property
    def table(self) -> dict[str, Any] | None:
        """What it holds where that is a table."""
        return self.value if isinstance(self.value, dict) else None


def append_line(path: Path, table: Mapping[str, Any], limit: int | None = MOST_BYTES) -> None:
    """Add one JSON line, durably; past `limit` bytes a log makes room, keeping one generation.

    None: it never makes room, for its writer bounds it or its lines must stay.
    """
    if limit is not None and path.exists() and path.stat().st_size > limit:
        path.replace(path.with_suffix(".1.jsonl"))
    line = json.dumps(table, sort_keys=True, ensure_ascii=True) + "\n"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
    with os.fdopen(descriptor, "ab") as stream:
        size = os.fstat(descriptor).st_size
        # by a kill: that line is lost, not this one
        cut_short = size and os.pread(descriptor, 1, size - 1) != b"\n"
        stream.write(b"\n" * bool(cut_short) + line.encode())
        stream.flush()
        os.fsync(descriptor)


def now() -> str:
    """UTC, to the second, as logs and signed texts have it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def lines_of(path: Path) -> Iterator[Line]:
    """The lines of a log that are not empty, oldest first; none where there is no file."""
    data = path.read_bytes() if path.is_file() else b""
    lines = data.split(b"\n")
    for number, line in enumerate(lines, 1):
        if line:
            yield Line(number, _parsed(line), number < len(lines))


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
