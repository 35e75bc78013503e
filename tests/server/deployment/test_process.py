"""One process carries a run out; one that another replaced ends, and says nothing in its name."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedlora.common.errors import Refused
from fedlora.server.deployment import process as outcome
from fedlora.server.deployment.process import SUPERSEDED, appoint, outcome_of, outcome_path

FOREVER = """
import sys, time
from pathlib import Path
from fedlora.server.deployment.process import outcome_of
folder = Path(sys.argv[1])
outcome_of(lambda: [(folder / "works").touch(), time.sleep(600)], folder, sys.argv[2])
"""


def test_a_process_that_was_replaced_ends_and_gives_the_run_up(tmp_path: Path) -> None:
    first = appoint(tmp_path)
    process = subprocess.Popen([sys.executable, "-c", FOREVER, str(tmp_path), first])
    end = time.monotonic() + 60
    while not (tmp_path / "works").exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    second = appoint(tmp_path)
    outcome_of(lambda: None, tmp_path, second)  # waits for the lock
    assert json.loads(outcome_path(tmp_path, second).read_text()) == {"code": 0, "message": ""}
    assert process.wait(10) == SUPERSEDED and not outcome_path(tmp_path, first).exists()


@pytest.mark.parametrize("gone", [False, True])
def test_who_is_appointed_is_looked_at_again_where_it_could_not_be_read(
    tmp_path: Path, gone: bool
) -> None:
    """A folder in the file's place can't be read; a file that is gone says that the run is."""
    process = subprocess.Popen([sys.executable, "-c", FOREVER, str(tmp_path), appoint(tmp_path)])
    end = time.monotonic() + 60
    while not (tmp_path / "works").exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    (tmp_path / outcome.APPOINTED).unlink()
    if not gone:
        (tmp_path / outcome.APPOINTED).mkdir()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(2.5)
        (tmp_path / outcome.APPOINTED).rmdir()
        appoint(tmp_path)
    try:
        assert process.wait(10) == SUPERSEDED
    finally:
        process.kill()


def test_what_went_wrong_is_one_line_and_a_code(tmp_path: Path) -> None:
    def refuse() -> None:
        raise Refused("budget spent")

    def fail() -> None:
        raise ValueError("odd")

    for work, expected in (
        (refuse, {"code": 3, "message": "budget spent"}),
        (fail, {"code": 1, "message": "ValueError: odd"}),
    ):
        token = appoint(tmp_path)
        outcome_of(work, tmp_path, token)
        assert json.loads(outcome_path(tmp_path, token).read_text()) == expected


def test_a_run_that_is_held_is_not_carried_out_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outcome, "LOCK_SECONDS", 0.05)
    token = appoint(tmp_path)
    worked: list[int] = []
    with outcome._only_process(tmp_path):
        outcome_of(lambda: worked.append(1), tmp_path, token)
    assert "another process" in outcome_path(tmp_path, token).read_text() and not worked
