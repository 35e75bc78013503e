"""Each role's installation as a folder of commands, which a test puts first on its PATH.

    core      the relay, and whoever verifies offline      node      the trainer
    server    the coordinator                              sim       a researcher

"hidden" runs this environment's commands with every other role's packages out of sight, in seconds;
"real" installs the wheel into an empty environment for each role, in minutes (`make installs`).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from functools import cache
from pathlib import Path

import pytest

from tests.as_installed import hidden

ROOT = Path(__file__).resolve().parents[1]
CODE = ("server", "client", "common", "simulations")
# role: its extras, and the words of its line under "Install" in docs/operations.md
ROLES = {
    "core": ("", "# the relay, a verifier"),
    "node": ("node,demo", "# the trainer"),
    "server": ("server", "# the coordinator"),
    "sim": ("sim", "# a researcher"),
}
KINDS = ["hidden", pytest.param("real", marks=pytest.mark.installs)]
# Who runs what: the first that fits the words.
COMMANDS = {
    "fedlora-node": {"link*": "core", "report\\ --check*": "core", "*": "node"},
    "fedlora-server": {"verify*": "core", "*": "server"},
    "fedlora-sim": {"*": "sim"},
}


@cache
def commands(kind: str, folder: Path) -> Path:
    """The folder of commands, made below `folder`; once a session for each kind."""
    place = folder / f"installed-{kind}"
    place.mkdir()
    make = {"hidden": _hidden, "real": _real}[kind]
    made = {role: make(place, role) for role in ROLES}
    for command, roles in COMMANDS.items():
        cases = "".join(f"  {words}) exec {made[role]} ;;\n" for words, role in roles.items())
        script = place / command
        text = f'#!/bin/sh\ncase "$*" in\n{cases}esac\n'
        script.write_text(text.replace("COMMAND", command))
        script.chmod(0o755)
    return place


def on_path(place: Path) -> dict[str, str]:
    """An environment in which these commands are found before all others."""
    return {
        **os.environ,
        "PATH": f"{place}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": "",
        "OMP_NUM_THREADS": "1",
    }


def copied(copy: Path) -> Path:
    """What a wheel is built of, in a new folder: a build leaves folders behind."""
    copy.mkdir()
    for name in (*CODE, "pyproject.toml", "README.md", "LICENSE", "constraints.txt"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name)
        else:
            shutil.copy(ROOT / name, copy / name)
    return copy


def _hidden(place: Path, role: str) -> str:
    away = place / f"{role}.away"
    away.write_text("\n".join(hidden(frozenset(filter(None, ROLES[role][0].split(","))))))
    return f'env PYTHONPATH={ROOT} {sys.executable} -m tests.as_installed @{away} COMMAND "$@"'


def _real(place: Path, role: str) -> str:
    """An environment that holds what the runbook's line installs."""
    venv.create(place / role, with_pip=True)
    binaries, source = place / role / "bin", place / "source"
    if not source.exists():
        copied(source)
        _line("# once", source, binaries)
    _line(ROLES[role][1], source, binaries)
    return f'{binaries}/COMMAND "$@"'


def _line(comment: str, source: Path, binaries: Path) -> None:
    """Run the runbook's line with this comment."""
    text = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    (line,) = (each for each in text.splitlines() if each.rstrip().endswith(comment))
    environment = {
        **os.environ,
        "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
        "PIP_NO_COMPILE": "1",  # half of the time
    }
    subprocess.run(["bash", "-c", f"{line}"], check=True, cwd=source, env=environment)
