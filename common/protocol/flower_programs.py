"""Flower's own programs: where they lie, and the environment in which none of them calls out."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from fedlora.common.errors import BadInput

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
COLOURED = ("FORCE_COLOR", "CLICOLOR_FORCE")  # a notebook's kernel sets them: no JSON would be left


def installed(name: str) -> str:
    """The console script beside this Python, or on PATH; BadInput where there is none."""
    beside = Path(sys.executable).parent / name
    path = str(beside) if beside.is_file() else shutil.which(name)
    if path is None:
        raise BadInput(f"{name}: found none on PATH, expected Flower 1.41")
    return path


def environment() -> dict[str, str]:
    """This process's; what calls out or colours is off, and each program finds those beside it."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    kept = {name: value for name, value in os.environ.items() if name not in COLOURED}
    return {**kept, **QUIET, "PATH": path}
