"""Processes of this machine: started, waited for and ended by who plays a federation on it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from fedlora.common.errors import FedloraError

START_SECONDS = 120.0
BIN = Path(sys.executable).parent


def family(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """A process and all that descend from it."""
    with suppress(psutil.NoSuchProcess):
        found = psutil.Process(process.pid)
        return [found, *found.children(recursive=True)]
    return []


def signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    """To a process and all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def run(command: str, *arguments: str) -> str:
    """What an installed command prints; FedloraError with its own words where it fails."""
    done = subprocess.run(
        [str(BIN / command), *arguments],
        capture_output=True,
        text=True,
        check=False,
        encoding="utf-8",
    )
    if done.returncode:
        words = (done.stderr or done.stdout).strip()
        raise FedloraError(f"{command} {arguments[0]} ended with {done.returncode}: {words}")
    return done.stdout


def wait_until(ready: Any, what: str, seconds: float = START_SECONDS) -> None:
    """Return once `ready()` holds; FedloraError, which names `what`, after so many seconds."""
    end = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > end:
            raise FedloraError(f"{what} did not start within {seconds:g} s")
        time.sleep(0.1)


def listens(port: int) -> bool:
    """Whether something accepts connections at a port of this machine."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def free_port() -> int:
    """A port that nobody held a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
