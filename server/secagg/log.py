"""What a coordinator learnt under masks: a line an attempt, on disk before masks are asked for.

A line says what may have been learnt, also where the sum was thrown away afterwards or the process
died: summary and card count these lines, and not the committed rounds. A second line of an attempt,
with its end, replaces the first.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedlora.common.disk.files import append_line
from fedlora.common.errors import BadInput
from fedlora.common.manifest.manifest import RunManifest
from fedlora.server.rounds.cohort import SecureRecord

log = logging.getLogger(__name__)

SUMS = "sums.jsonl"
KEYS = "keys.jsonl"  # `server.secagg.seen_keys`
UNLIMITED = 1 << 62
# At each stage of an attempt: who was there before it, and who after it.
DROP_OUTS = (
    ("keys", "asked", "cohort"),
    ("shares", "cohort", "dealt"),
    ("input", "dealt", "members"),
    ("confirm", "members", "confirmed"),
    ("open", "confirmed", "opened"),
)


def note_in(folder: Path) -> Callable[[SecureRecord], None]:
    """Writes into a run's folder."""

    def note(record: SecureRecord) -> None:
        append_line(folder / SUMS, asdict(record), UNLIMITED)

    return note


def liars_in(folder: Path) -> set[str]:
    """Who was proven to lie in this run.

    By what it opened or dealt, or by a key that it signed for two epochs.
    """
    by_keys = {str(each["liar"]) for each in tables_of(folder / KEYS) if "liar" in each}
    return by_keys | {str(name) for each in sums_of(folder) for name in each["liars"]}


def sums_of(folder: Path) -> list[Mapping[str, Any]]:
    """The last line of each attempt, in order.

    Of one that was cut short the masks were not asked for, or another is.
    """
    found = {int(each["attempt"]): each for each in tables_of(folder / SUMS)}
    return [found[attempt] for attempt in sorted(found)]


def secure_summary(
    manifest: RunManifest, sums: Sequence[Mapping[str, Any]], liars: Iterable[str] = ()
) -> dict[str, Any] | None:
    """How a run was aggregated, from what was noted of each sum that was or may have been learnt.

    A sum that did not count in the end is one of them. `liars` were proven before there was a sum.
    None where the run was not aggregated securely.
    """
    if manifest.secure is None:
        return None
    return {
        "minimum_cohort": manifest.minimum_cohort,
        "colluders": manifest.secure.max_colluders,
        "threshold_rule": manifest.secure.threshold,
        "cohort": _range(sums, "cohort"),
        "threshold": _range(sums, "threshold"),
        "smallest_sum": _range(sums, "members")[0],
        "dropouts": {
            stage: sum(_lost(each, before, after) for each in sums)
            for stage, before, after in DROP_OUTS
        },
        "liars": sorted({*liars, *(name for each in sums for name in each["liars"])}),
        "suspected": sorted({name for each in sums for name in each.get("suspected", ())}),
        "sums": len(sums),
        "bits": manifest.secure.bits,
    }


def _lost(each: Mapping[str, Any], before: str, after: str) -> int:
    """Drop-outs of a stage; none are known where a coordinator stopped before it knew them."""
    return 0 if each[after] is None else max(each[before] - each[after], 0)


def _range(sums: Sequence[Mapping[str, Any]], name: str) -> list[int]:
    values = [each[name] for each in sums] or [0]
    return [min(values), max(values)]


def tables_of(path: Path) -> list[Mapping[str, Any]]:
    """A log's lines; BadInput for one that a kill did not cut short and that is none.

    The log counts what was cut.
    """
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    found: list[Mapping[str, Any]] = []
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
            found.append(table)
    if cut_short:
        log.warning(
            "%s: found %d lines that can't be read, and counted the others", path, cut_short
        )
    return found
