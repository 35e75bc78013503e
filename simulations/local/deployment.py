"""The processes of a federation on one machine: trainers, relays, SuperNodes, SuperLink, server."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import psutil

from fedlora.common.errors import FedloraError
from fedlora.simulations.local.folders import Folders
from fedlora.simulations.local.processes import (
    BIN,
    family,
    free_port,
    listens,
    signal_group,
    wait_until,
)

STOP_SECONDS = 60.0


@dataclass(eq=False)
class Federation(Folders):
    """A federation whose processes are started and ended one by one."""

    # words before a process's own, by its name: to watch it
    prefix: Callable[[str], Sequence[str]] = lambda name: ()
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start_trainer(self, name: str) -> None:
        """Return once it answers on its socket; FedloraError where it ended instead."""
        socket_path = self.door(name)
        socket_path.unlink(missing_ok=True)
        self._start(f"trainer {name}", "fedlora-node", "serve", "--node", str(self.node(name)))
        process = self.processes[f"trainer {name}"]
        wait_until(
            lambda: socket_path.exists() or process.poll() is not None, f"the trainer of {name}"
        )
        if process.poll() is not None:
            raise FedloraError(f"the trainer of {name} ended: {self.root / 'logs'} says why")

    def start_relay(self, name: str) -> None:
        """Start it; it looks for SuperLink and its trainer by itself."""
        where = ["--relay", str(self.relay(name)), "--trainer", f"unix:{self.door(name)}"]
        command = ["link", *where, "--port", str(free_port())]
        self._start(f"relay {name}", "fedlora-node", *command)

    def start_server(self, resume: bool = False) -> None:
        """A new run, or the last one resumed; SuperLink comes with it."""
        command = ["resume"] if resume else ["run", str(self.root / "training.toml")]
        self._start("server", "fedlora-server", *command, "--dir", str(self.coordinator))

    def wait(self, seconds: float) -> int:
        """Exit code of the server."""
        return self.processes["server"].wait(seconds)

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        """End a process and all that it started."""
        process = self.processes.pop(name, None)
        if process is not None:
            signal_group(process, number)
            process.wait()

    def kill_superlink(self) -> None:
        """SuperLink and its executor, which outlive the killed command that started them."""
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or []
            ours = any(word.endswith(("flower-superlink", "flower-superexec")) for word in words)
            if ours and {str(self.port), f"127.0.0.1:{self.port}"} & set(words):
                process.kill()
        wait_until(lambda: not listens(self.port), "the end of SuperLink")

    def stop(self) -> None:
        """All ends at once: a prefix that watches the server lasts as long as SuperLink does.

        FedloraError names what did not end by itself and was killed.
        """
        started = [each for process in self.processes.values() for each in family(process)]
        for process in self.processes.values():
            signal_group(process, signal.SIGTERM)
        self.kill_superlink()
        end, stubborn = time.monotonic() + STOP_SECONDS, []
        for name, process in self.processes.items():
            try:
                process.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                stubborn.append(name)
        for each in started:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        for process in self.processes.values():
            process.wait()
        self.processes.clear()
        if stubborn:
            raise FedloraError(
                f"{', '.join(stubborn)}: found no end within {STOP_SECONDS:g} s of SIGTERM"
            )

    def _start(self, name: str, *command: str) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        log = self.root / "logs" / f"{name.replace(' ', '-')}.log"
        log.parent.mkdir(exist_ok=True)
        with log.open("ab") as stream:
            self.processes[name] = subprocess.Popen(
                [*self.prefix(log.stem), str(BIN / command[0]), *command[1:]],
                env=environment,
                stdout=stream,
                stderr=stream,
                start_new_session=True,
            )


@contextmanager
def running(federation: Federation) -> Iterator[Federation]:
    """Trainers and relays up; everything down at the end."""
    try:
        for name in federation.names:
            federation.start_trainer(name)
        federation.start_server()
        wait_until(lambda: listens(federation.port), "SuperLink")
        for name in federation.names:
            federation.start_relay(name)
        yield federation
    finally:
        federation.stop()
