"""What a killed starter left running is ended by the next one; nothing else ever is."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedlora.server.deployment import orphans

STARTER = """
import subprocess, sys, time
from pathlib import Path
from fedlora.server.deployment import orphans
stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
words = [[sys.executable, "-c", "import time; time.sleep(600)"], [sys.executable, "-c", stubborn]]
made = [subprocess.Popen(each, start_new_session=True) for each in words]
time.sleep(1)
orphans.note(Path(sys.argv[1]), [each.pid for each in made])
time.sleep(600)
"""


def alive(number: int) -> bool:
    return bool(orphans._born(number))


def started(path: Path) -> list[int]:
    return [number for number, _ in json.loads(path.read_text())["started"]]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc here")
def test_what_a_killed_starter_left_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(orphans, "PATIENCE", 1.0)
    path = tmp_path / "started.json"
    starter = subprocess.Popen([sys.executable, "-c", STARTER, str(path)])
    while not path.exists():
        time.sleep(0.05)
    left = started(path)
    orphans.end(path)  # its starter lives: it is another run's
    assert all(map(alive, left)) and path.exists()
    starter.send_signal(signal.SIGKILL)
    starter.wait()
    assert all(map(alive, left))
    orphans.end(path)
    assert not any(map(alive, left)) and not path.exists()


def test_a_number_that_is_another_process_by_now_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "started.json"
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    orphans.note(path, [other.pid])
    table = json.loads(path.read_text())
    table["starter"] = [table["starter"][0], "another birth"]
    table["started"][0][1] = "1"
    path.write_text(json.dumps(table))
    orphans.end(path)
    assert other.poll() is None and not path.exists()
    other.kill()
    other.wait()


def test_a_note_that_cannot_be_read_ends_nothing(tmp_path: Path) -> None:
    path = tmp_path / "started.json"
    orphans.end(path)
    for text in ("", "[1]", '{"starter": 3, "started": []}'):
        path.write_text(text)
        orphans.end(path)
        assert not path.exists()
    assert alive(os.getpid())
