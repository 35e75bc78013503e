"""What a node refused, so kept that nobody whose requests are refused can push older ones out.

The first refusal of a run for a reason is a line of refusals.jsonl, which never rotates; what is
refused again is counted in refusals.json. Where a run has `MOST_OF_A_RUN` lines, or the file is
full, further reasons are counted by kind alone: the manifest's field, or the first words, with the
first and the last time. So the disk is bounded, the oldest lines stay, and how many were not kept
is known.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedlora.common.disk.files import append_line, lines_of, write_atomically

log = logging.getLogger(__name__)

MOST_OF_A_RUN = 100
MOST_LINES = 2_000
MOST_BYTES = 8 << 20
MOST_KINDS = 100
OTHER = "other"
_KIND = re.compile(r"[A-Za-z_.]+(?: [A-Za-z_.]+)?")

Line = dict[str, Any]


class RefusalLog:
    """The refusals of one node, one writer; `path` is refusals.jsonl, counts lie beside it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._counts_path = path.with_suffix(".json")
        lines = list(read_lines(path, "time", "manifest", "reason"))
        self._known = {_key(line) for line in lines}
        self._lines = len(lines)
        self._of_run = Counter(line["manifest"] for line in lines)
        self._counts = _read_counts(self._counts_path)

    def add(self, line: Mapping[str, Any]) -> None:
        """Note a refusal, durably; OSError where the disk does not take it."""
        key = _key(line)
        if key not in self._known and self._has_room(line["manifest"]):
            append_line(self._path, line, limit=None)
            self._known.add(key)
            self._lines += 1
            self._of_run[line["manifest"]] += 1
            return
        if key in self._known:
            _count(self._counts["again"], key, line["time"])
        else:
            self._counts["not_kept"] += 1
            for kind in _kinds(line["reason"]):
                room = kind in self._counts["kinds"] or len(self._counts["kinds"]) < MOST_KINDS
                _count(self._counts["kinds"], kind if room else OTHER, line["time"])
        write_atomically(self._counts_path, json.dumps(self._counts).encode(), mode=0o600)

    def _has_room(self, manifest: str) -> bool:
        size = self._path.stat().st_size if self._path.exists() else 0
        return (
            self._lines < MOST_LINES
            and size < MOST_BYTES
            and self._of_run[manifest] < MOST_OF_A_RUN
        )


def read_refusals(path: Path) -> tuple[list[Line], Line]:
    """Each refusal that is kept, with how often and when last; of the others the count by kind.

    Without the log's `detail`, which may quote a record; a policy's `verdict` never does.
    """
    counts = _read_counts(path.with_suffix(".json"))
    lines = []
    for line in read_lines(path, "time", "reason"):
        again = counts["again"].get(_key(line), {"count": 0, "last": line["time"]})
        told = {name: value for name, value in line.items() if name != "detail"}
        lines.append({**told, "times": 1 + again["count"], "last": again["last"]})
    return lines, {"count": counts["not_kept"], "kinds": counts["kinds"]}


def read_lines(path: Path, *keys: str) -> Iterator[Line]:
    """A log's lines; one that a kill or a fault spoilt says so, where `keys` should be."""
    for line in lines_of(path):
        table = line.table
        if table is not None and all(isinstance(table.get(key), str) for key in keys):
            yield table
        else:
            yield dict.fromkeys(keys or ("line",), "unreadable")


def _read_counts(path: Path) -> Line:
    """The counts; anew, and said so, where the file is not what this module writes."""
    empty: Line = {"again": {}, "kinds": {}, "not_kept": 0}
    if not path.is_file():
        return empty
    try:
        found = json.loads(path.read_bytes())
        counts = [*found["again"].values(), *found["kinds"].values()]
        if type(found["not_kept"]) is not int or not all(
            (type(each["count"]), type(each["first"]), type(each["last"])) == (int, str, str)
            for each in counts
        ):
            raise ValueError("no counts")
        return {name: found[name] for name in empty}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        log.error("%s: found no counts; refusals are counted from 0 again", path)
        return empty | {"kinds": {"unreadable": {"count": 1, "first": "", "last": ""}}}


def _key(line: Mapping[str, Any]) -> str:
    text = "\n".join(str(line.get(name, "")) for name in ("manifest", "reason", "detail"))
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()[:32]


def _kinds(reason: str) -> set[str]:
    """The fields, or first words, of a reason: one for each of its parts."""
    found = (_KIND.match(part.strip()) for part in reason.split(";"))
    return {match.group()[:60] if match else OTHER for match in found}


def _count(table: dict[str, Line], name: str, time: str) -> None:
    known = table.setdefault(name, {"count": 0, "first": time, "last": time})
    known["count"] += 1
    known["last"] = time
