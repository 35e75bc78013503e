"""Locks between processes: a file's flock, which ends with its holder, however that ends."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedlora.common.errors import FedloraError

SECONDS = 30.0  # that anybody may take under a lock that others wait for
PAUSE = 0.01


@contextmanager
def exclusive(path: Path, held: FedloraError, seconds: float) -> Iterator[None]:
    """Hold the lock of `path` alone; raises `held` where it is not free within `seconds`."""
    end = time.monotonic() + seconds
    with path.open("a", encoding="utf-8") as lock:
        while not _taken(lock.fileno(), fcntl.LOCK_EX):
            if time.monotonic() >= end:
                raise held
            time.sleep(PAUSE)
        yield


def is_held(path: Path) -> bool:
    """Whether a process holds the lock of `path` alone just now."""
    if not path.exists():
        return False
    with path.open("r", encoding="utf-8") as lock:
        return not _taken(lock.fileno(), fcntl.LOCK_SH)


def _taken(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
