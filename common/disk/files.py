"""Files that are whole or not there, and logs whose lines are, whatever dies while writing."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedlora.common.errors import BadInput


def write_atomically(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Replace `path` by `data`: on disk before it is visible, and visible before this returns."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        scratch.replace(path)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        error.filename = str(path)  # a full disk has no name of its own
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make names that were created or replaced in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append_line(path: Path, table: Mapping[str, Any], limit: int | None = 8 << 20) -> None:
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


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.encode())


def read_text(path: Path, limit: int = 1 << 20) -> str:
    """A file from outside, of at most `limit` bytes; BadInput where it is none, or no UTF-8."""
    try:
        with path.open("rb") as stream:
            data = stream.read(limit + 1)
    except OSError as error:
        raise BadInput(f"{path}: can't be read ({error.strerror})") from error
    if len(data) > limit:
        raise BadInput(f"{path}: found more than {limit} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: found bytes that are not UTF-8") from error
