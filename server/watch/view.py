"""What is known of a run while it goes on, from the files of its folder alone: public figures."""

from __future__ import annotations

import json
import time
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from fedlora.common.disk.files import lines_of
from fedlora.common.errors import BadInput
from fedlora.common.manifest.manifest import RunManifest
from fedlora.common.privacy.figures import shown_epsilon
from fedlora.common.privacy.modes import guarantee_of
from fedlora.server.rounds.checkpoint import Standing, standing
from fedlora.server.runs.metrics import METRICS, lost_attempts

SERIES = ("accuracy", "perplexity", "loss", "epsilon", "seconds")
POINTS = 1000  # of a curve; more are thinned out
LISTED = 200  # institutions, lost attempts
QUIET = 3.0  # times as long as a round took at most: then a run that says nothing has stopped
# of a line, to be shown at all
NEEDED = {"round", "asked", "replies", "seconds", "elapsed_seconds", "examples_per_second"}
Table = Mapping[str, Any]


def view(folder: Path) -> dict[str, Any]:
    """A run's state as a table for a page; BadInput where `folder` holds no run."""
    found = standing(folder / "checkpoint")
    if found is None:
        raise BadInput(f"{folder}: found no run that was begun, expected a run's folder")
    lines = rounds_of(folder)
    manifest = found.manifest
    attempts = sum(phase.attempts for phase in manifest.accounted)
    return {
        "name": folder.resolve().name,
        "state": _state(folder, found, lines),
        "round": found.round,
        "rounds": manifest.rounds,
        "attempts": [sum(found.begun), attempts],
        "phases": [[phase.name, phase.rounds] for phase in manifest.phases],
        "epsilon": _shown(lines[-1].get("epsilon") if lines else None),
        "promised": _shown(_promised(manifest)),
        "unit": guarantee_of(manifest).unit,
        "series": _series(lines),
        "institutions": _institutions(folder, lines),
        "answered": [lines[-1]["replies"], lines[-1]["asked"]] if lines else None,
        "lost": [list(each) for each in lost_attempts(folder)[-LISTED:]],
        "resources": _resources(folder, found, lines),
    }


@lru_cache(maxsize=4)
def _promised(manifest: RunManifest) -> float | None:
    """ε of the whole schedule, which takes a while; None without privacy."""
    guarantee = guarantee_of(manifest)
    return guarantee.stated_epsilon() if guarantee.private else None


def _shown(epsilon: float | None) -> str | None:
    return None if epsilon is None else shown_epsilon(epsilon)


def rounds_of(folder: Path) -> list[dict[str, Any]]:
    """The committed rounds so far; a last line without an end is half written."""
    found = (line.table for line in lines_of(folder / METRICS) if line.ended)
    return [line for line in found if line is not None and line.keys() >= NEEDED]


def _state(folder: Path, found: Standing, lines: Sequence[Table]) -> str:
    if (folder / "summary.json").is_file():
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        return f"ended early: {summary['ended']}" if summary.get("ended") else "done"
    longest = max((line["seconds"] for line in lines), default=0.0)
    silent = time.time() - max(path.stat().st_mtime for path in _signs(folder))
    return "running" if silent <= 60.0 + QUIET * longest else f"silent for {silent / 60:.0f} min"


def _signs(folder: Path) -> list[Path]:
    """Files that a run which goes on writes."""
    named = (folder / METRICS, folder / "lost.jsonl", *(folder / "checkpoint").iterdir())
    return [path for path in named if path.is_file()]


def _series(lines: Sequence[Table]) -> dict[str, list[Any]]:
    """Each figure that any round has, over `round`; every n-th where there are many."""
    step = -(-len(lines) // POINTS) or 1
    kept = [line for number, line in enumerate(reversed(lines)) if number % step == 0][::-1]
    named = [name for name in SERIES if any(line.get(name) is not None for line in kept)]
    return {name: [line.get(name) for line in kept] for name in ("round", *named)}


def _institutions(folder: Path, lines: Sequence[Table]) -> list[dict[str, Any]]:
    """Who there is, how often each failed, and why the last time; those that failed come first."""
    failed: Counter[str] = Counter()
    last: dict[str, str] = {}
    for line in lines:
        for name, reason in line.get("failures") or ():
            failed[name] += 1
            last[name] = f"round {line['round']}: {reason}"
    names = dict.fromkeys((*failed, *_members(folder)))
    ordered = sorted(names, key=lambda name: -failed[name])[:LISTED]
    return [{"name": name, "failed": failed[name], "last": last.get(name, "")} for name in ordered]


def _members(folder: Path) -> list[str]:
    """Of a simulation, by the number that its configuration has; a coordinator knows its own."""
    try:
        config = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))
        return [f"client-{number}" for number in range(int(config["federation"]["clients"]))]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _resources(folder: Path, found: Standing, lines: Sequence[Table]) -> dict[str, Any]:
    """What the run takes of its machine, as its last rounds say."""
    if not lines:
        return {}
    recent = lines[-10:]
    each = sum(line["seconds"] for line in recent) / len(recent)
    return {
        "seconds a round": each,
        "seconds left": each * (found.manifest.rounds - found.round),
        "examples a second": lines[-1]["examples_per_second"],
        "CPUs": _cpus(recent),
        "peak memory": lines[-1].get("peak_rss_bytes"),
        "folder": sum(path.stat().st_size for path in folder.iterdir() if path.is_file()),
    }


def _cpus(lines: Sequence[Table]) -> float | None:
    """Processors at work on average; None where the lines don't say, or a resume lies between."""
    first, last = lines[0].get("cpu_seconds"), lines[-1].get("cpu_seconds")
    passed = lines[-1]["elapsed_seconds"] - lines[0]["elapsed_seconds"]
    if first is None or last is None or passed <= 0 or last < first:
        return None
    return float((last - first) / passed)
