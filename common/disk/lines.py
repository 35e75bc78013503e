"""Logs of JSON lines: written one by one, durably, and read whatever a kill left of them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MOST_BYTES = 8 << 20  # of a log that makes room


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
