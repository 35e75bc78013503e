"""Processes that outlived a killed starter: known by number and birth, and ended by the next one.

A number alone may be another process's by now. Where /proc does not tell births (not Linux),
nothing is ended.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from fedlora.common.disk.files import write_atomically

PATIENCE = 10.0  # seconds between SIGTERM and SIGKILL
LOOK = 0.05


def note(path: Path, started: Sequence[int]) -> None:
    """Write down who started what, each as its number and its birth."""
    table = {"starter": _mark(os.getpid()), "started": [_mark(number) for number in started]}
    write_atomically(path, json.dumps(table).encode())


def end(path: Path) -> None:
    """End what lives of what was noted, unless its starter lives; the note goes."""
    try:
        table = json.loads(path.read_bytes())
        starter, started = tuple(table["starter"]), [tuple(each) for each in table["started"]]
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError):
        path.unlink(missing_ok=True)
        return
    if _lives(starter):
        return
    for number, kill_after in ((signal.SIGTERM, PATIENCE), (signal.SIGKILL, PATIENCE)):
        living = [each for each in started if _lives(each)]
        for pid, _ in living:
            with suppress(ProcessLookupError):
                os.killpg(pid, number)
        until = time.monotonic() + kill_after
        while any(map(_lives, living)) and time.monotonic() < until:
            time.sleep(LOOK)
    path.unlink(missing_ok=True)


def _mark(number: int) -> tuple[int, str]:
    return number, _born(number)


def _lives(mark: tuple[int, str]) -> bool:
    number, born = mark
    return bool(born) and _born(number) == born


def _born(number: int) -> str:
    """When a living process began, as the kernel counts; "" where none is there, or told."""
    try:
        text = Path(f"/proc/{number}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    state, *fields = text.rpartition(")")[2].split()
    return "" if state == "Z" else fields[18]
