"""`fedlora-node link`: keeps a `flower-supernode` with our relay alive, all that calls out off."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedlora.common.codec.strict import MOST_PORT, check_port
from fedlora.common.errors import BadInput
from fedlora.common.protocol.flower_programs import environment, installed
from fedlora.common.trust.identity import read_private

log = logging.getLogger(__name__)

# SuperLink turns a SuperNode away for the 60 s that it takes the killed one for alive
LONGEST_PAUSE = 10.0
PDEATHSIG = 1  # of prctl(2): the signal that a child gets when its parent dies
STEADY = 60.0  # seconds after which a SuperNode counts as having run well


@dataclass(frozen=True)
class Link:
    """A relay folder (a node's `relay/`), the trainer's address, and where Flower's ports are."""

    folder: Path
    trainer: str  # unix:PATH or host:port
    port: int = 0  # of the SuperNode's local API; 0: Flower's default
    certificates: tuple[str, str, str] = ("", "", "")  # authority, certificate, key of mutual TLS

    def command(self) -> list[str]:
        """BadInput where a part is missing or no port; Refused where others can read the key."""
        check_port(self.port, "Flower's own")
        executable = installed("flower-supernode")
        config = {"trainer": self.trainer}
        for name, path in zip(("authority", "certificate", "key"), self.certificates, strict=True):
            if path:
                config[f"trainer-{name}"] = str(Path(path).resolve())
        read_private(self.folder / "flower_key")
        host = ["--host", "127.0.0.1", "--port", str(self.port)] if self.port else []
        return [
            executable,
            *("--superlink", self._superlink()),
            *("--root-certificates", str(self.folder / "ca.crt")),
            *("--auth-supernode-private-key", str(self.folder / "flower_key")),
            *(
                "--node-config",
                " ".join(f"{name}={json.dumps(value)}" for name, value in config.items()),
            ),
            *host,
        ]

    def _superlink(self) -> str:
        path = self.folder / "link.json"
        try:
            address = json.loads(path.read_bytes())["superlink"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BadInput(
                f"{path}: found no address, expected what fedlora-node join writes"
            ) from error
        if not isinstance(address, str) or not re.fullmatch(r"[A-Za-z0-9.\[\]:-]{1,300}", address):
            raise BadInput(f"{path} superlink: expected host:port")
        return address


def trainer_address(text: str, root: Path) -> str:
    """`unix:` paths absolute, for the relay runs elsewhere; others as they are.

    BadInput where it is neither: nobody would ever answer there.
    """
    if not re.fullmatch(r"unix:\S.*|[A-Za-z0-9.\[\]:-]{1,253}:\d{1,5}", text):
        raise BadInput(f'--trainer "{text}": expected unix:PATH or host:port')
    if text.startswith("unix:"):
        return f"unix:{(root / text.removeprefix('unix:')).resolve()}"
    if not 0 < int(text.rpartition(":")[2]) <= MOST_PORT:
        raise BadInput(f'--trainer "{text}": expected a port of 1 to {MOST_PORT}')
    return text


def supervise(command: Sequence[str], stop: threading.Event) -> None:
    """Run `command` until `stop`, starting it again after pauses that grow while it keeps dying."""
    pause = 1.0
    while not stop.is_set():
        started = time.monotonic()
        # a group of its own: its children go with it
        process = subprocess.Popen(  # noqa: S603
            command, env=environment(), start_new_session=True, preexec_fn=_leash()
        )
        while process.poll() is None and not stop.wait(0.2):
            pass
        if stop.is_set():
            _end(process)
            return
        _end(process)
        pause = 1.0 if time.monotonic() - started > STEADY else min(2 * pause, LONGEST_PAUSE)
        log.warning("flower-supernode ended with %s; again in %.0f s", process.returncode, pause)
        stop.wait(pause)


def _leash() -> Callable[[], object] | None:
    """What ties a child's life to this thread's.

    A link that is killed leaves no SuperNode that goes on without it.
    """
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(PDEATHSIG, signal.SIGTERM)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Stop a process and its group: gently first."""
    for number, seconds in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 10.0)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            continue
