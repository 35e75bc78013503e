"""A lock that another process does not give up ends the wait with one line that names it."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedlora.common.disk import locks
from fedlora.common.errors import FedloraError, Refused
from fedlora.common.ledger.ledger import Ledger
from fedlora.common.trust.identity import Identity
from fedlora.server.coordinator.members import Registry

SECONDS = 5.0  # that the other process holds it
HOLD = """
import fcntl, sys, time
with open(sys.argv[1], "a") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


@contextmanager
def held(path: Path, seconds: float = SECONDS) -> Iterator[None]:
    """By another process."""
    command = [sys.executable, "-c", HOLD, str(path), str(seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline()
        try:
            yield
        finally:
            process.kill()


def test_a_ledgers_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "SECONDS", 0.2)
    files = (tmp_path / "ledger.sqlite", tmp_path / "head.json", tmp_path / "key")
    ledger = Ledger.open(*files)
    with held(tmp_path / "ledger.sqlite.lock"):
        for step in (ledger.entries, lambda: Ledger.open(*files)):
            with pytest.raises(
                Refused, match=r"ledger\.sqlite\.lock held by another process for 0\.2 s"
            ):
                step()
    assert len(ledger.entries()) == 1
    ledger.close()


def test_a_registrys_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "SECONDS", 0.2)
    registry = Registry.create(tmp_path / "members.json", Identity.generate())
    with (
        held(tmp_path / "members.lock"),
        pytest.raises(
            FedloraError, match=r"members\.lock: found it held by another process for 0\.2 s"
        ),
    ):
        registry.revoke("north")


def test_a_lock_that_is_given_up_in_time_is_taken(tmp_path: Path) -> None:
    started = time.monotonic()
    with (
        held(tmp_path / "lock", 0.3),
        locks.exclusive(tmp_path / "lock", FedloraError("held"), 30.0),
    ):
        assert 0.2 < time.monotonic() - started < 20.0
        with (
            pytest.raises(FedloraError, match="held"),
            locks.exclusive(tmp_path / "lock", FedloraError("held"), 0),
        ):
            pass
