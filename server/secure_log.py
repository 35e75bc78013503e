"""What a coordinator learnt under masks: one line for each attempt, on disk before its masks are asked for.

A line says what may have been learnt, also where the sum was thrown away afterwards or the process died: summary and
card count these lines, and not the committed rounds. A second line of an attempt, with its end, replaces the first.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedlora.common.errors import BadInput
from fedlora.common.files import append_line
from fedlora.server.rounds import SecureRecord

log = logging.getLogger(__name__)

SUMS = "sums.jsonl"
UNLIMITED = 1 << 62


def note_in(folder: Path) -> Callable[[SecureRecord], None]:
    """Writes into a run's folder."""

    def note(record: SecureRecord) -> None:
        append_line(folder / SUMS, asdict(record), UNLIMITED)

    return note


def liars_in(folder: Path) -> set[str]:
    """Who was proven to lie in this run."""
    return {str(name) for each in sums_of(folder) for name in each["liars"]}


def sums_of(folder: Path) -> list[Mapping[str, Any]]:
    """The last line of each attempt, in order. BadInput for a line that a kill did not cut short and that is none.

    What was cut short is said in the log: the masks of that attempt were not asked for, or it has a line before.
    """
    path = folder / SUMS
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    found: dict[int, Mapping[str, Any]] = {}
    cut_short = 0
    for number, line in enumerate(lines, 1):
        try:
            table = json.loads(line) if line else None
        except ValueError:
            cut_short += 1
            continue
        if table is not None and not isinstance(table, dict):
            raise BadInput(f"{path} line {number}: found {str(table)[:40]}, expected a table")
        if table is not None:
            found[int(table["attempt"])] = table
    if cut_short:
        log.warning("%s: found %d lines that can't be read, and counted the others", path, cut_short)
    return [found[attempt] for attempt in sorted(found)]
