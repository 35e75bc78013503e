"""How a run's process ended, left in the run's folder for who started it; and that there is one such process."""

from __future__ import annotations

import fcntl
import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fedlora.common.errors import FedloraError
from fedlora.common.files import write_atomically

log = logging.getLogger(__name__)

OUTCOME = "outcome.json"  # of the last process that somebody waited for
LOCK_TRIES, LOCK_PAUSE = 60, 1.0  # looks at a run that another process still holds, and seconds between them


def outcome_path(folder: Path, token: str) -> Path:
    """Where the process that was started with `token` leaves its ending: one whose SuperLink was killed ends late."""
    return folder / f"outcome-{token}.json"


def outcome_of(work: Callable[[], object], folder: Path, token: str) -> None:
    """Run `work`, alone in its folder, and leave how it ended: the exit code, and one line to a fault."""
    try:
        with _only_process(folder):
            work()
        found = {"code": 0, "message": ""}
    except FedloraError as error:
        found = {"code": error.exit_code, "message": str(error)}
    except BaseException as error:
        log.exception("the run ended unexpectedly")
        found = {"code": 1, "message": f"{type(error).__name__}: {error}"}
    write_atomically(outcome_path(folder, token), json.dumps(found).encode())


@contextmanager
def _only_process(folder: Path) -> Iterator[None]:
    """The run's own lock; FedloraError where another process does not give it up."""
    with (folder / "lock").open("a") as lock:
        for _ in range(LOCK_TRIES):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(LOCK_PAUSE)
        else:
            raise FedloraError(f"{folder}: found another process that carries this run out, expected none")
        yield
