"""Which process carries a run out, and how it ended: files in the run's folder, for who started it.

A process whose SuperLink or whose starter was killed may live on, and find its way back to a
SuperLink that is started again. So each is appointed by name, one works at a time, and one that is
no longer appointed ends itself.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedlora.common.disk import locks
from fedlora.common.disk.files import write_atomically
from fedlora.common.errors import BadInput, FedloraError

log = logging.getLogger(__name__)

OUTCOME = "outcome.json"  # of the last process that somebody waited for
APPOINTED = "appointed"
LOCK = "lock"
LOCK_SECONDS = 60.0  # for a process that another one was appointed for to end
PAUSE = 1.0  # seconds between two looks at who is appointed
SUPERSEDED = 75  # exit status of a process that another one replaced


def appoint(folder: Path) -> str:
    """A new token: whoever was started with another one ends."""
    token = secrets.token_hex(8)
    write_atomically(folder / APPOINTED, token.encode())
    return token


def outcome_path(folder: Path, token: str) -> Path:
    """Where the process that was started with `token` leaves its ending."""
    return folder / f"outcome-{token}.json"


@dataclass(frozen=True)
class Outcome:
    """How a run's process ended: the exit code, and one line to a fault."""

    code: int
    message: str


def read_outcome(folder: Path) -> Outcome | None:
    """Of the last process somebody waited for to its end; BadInput where it is no outcome."""
    path = folder / OUTCOME
    if not path.exists():
        return None
    try:
        table = json.loads(path.read_bytes())
        return Outcome(int(table["code"]), str(table["message"]))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadInput(f"{path}: found no outcome of a run") from error


def outcome_of(work: Callable[[], object], folder: Path, token: str) -> None:
    """Run `work`, alone in its folder, and leave its end: exit code, and one line to a fault."""
    try:
        with _only_while_appointed(folder, token), _only_process(folder):
            work()
        found = {"code": 0, "message": ""}
    except FedloraError as error:
        found = {"code": error.exit_code, "message": str(error)}
    except BaseException as error:
        log.exception("the run ended unexpectedly")
        found = {"code": 1, "message": f"{type(error).__name__}: {error}"}
    write_atomically(outcome_path(folder, token), json.dumps(found).encode())


def is_held(folder: Path) -> bool:
    """Whether a process carries the run out just now."""
    return locks.is_held(folder / LOCK)


@contextmanager
def _only_while_appointed(folder: Path, token: str) -> Iterator[None]:
    """End this process once another is appointed.

    All that it writes is whole or absent, so any moment will do.
    """
    done = threading.Event()

    def watch() -> None:
        while not done.wait(PAUSE):
            if _superseded(folder / APPOINTED, token):
                log.warning("%s: another process was appointed; this one ends", folder)
                os._exit(SUPERSEDED)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def _superseded(path: Path, token: str) -> bool:
    """Whether another process is appointed, or the run is gone.

    Where the file can't be read, the next look tells.
    """
    try:
        return path.read_bytes() != token.encode()
    except FileNotFoundError:
        return True
    except OSError:
        return False


def _only_process(folder: Path) -> AbstractContextManager[None]:
    """The run's own lock; FedloraError where another process does not give it up."""
    held = FedloraError(f"{folder}: found another process that carries this run out, expected none")
    return locks.exclusive(folder / LOCK, held, LOCK_SECONDS)
