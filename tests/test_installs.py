"""Each role's installation runs that role's commands, and says in a line what it lacks for others.

Before: `fedlora[server]` lacked opacus, and its `verify` ended in a traceback, as the core's did.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXPORT = "tests/fixtures/earlier/export"


def run(extras: str, *words: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "tests.as_installed", extras, *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout + done.stderr


def test_the_coordinators_installation_verifies_a_release() -> None:
    code, said = run("server", "fedlora-server", "verify", EXPORT)
    assert code == 0 and "3, each signed by its institution" in said, said


def test_the_core_says_what_it_lacks_to_verify() -> None:
    code, said = run("core", "fedlora-server", "verify", EXPORT)
    assert code == 2 and "Traceback" not in said
    assert said.strip().splitlines()[-1].startswith("fedlora-server: found no package ")
    assert "fedlora[server]" in said


@pytest.mark.parametrize("tool", ["fedlora-server", "fedlora-node"])
def test_the_core_shows_its_commands(tool: str) -> None:
    code, said = run("core", tool, "--help")
    assert code == 0 and "Traceback" not in said, said


def test_a_coordinator_is_set_up_by_its_own_installation(tmp_path: Path) -> None:
    words = ("init", str(tmp_path / "made"), "--federation", "demo", "--host", "127.0.0.1")
    code, said = run("server", "fedlora-server", *words)
    assert code == 0, said


def test_a_node_is_set_up_by_its_own_installation(tmp_path: Path) -> None:
    words = ("init", "bank", "--organisation", "A bank", "--node", str(tmp_path / "made"))
    code, said = run("node", "fedlora-node", *words)
    assert code == 0, said
