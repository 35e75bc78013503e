"""Flower's SuperLink as this project runs it.

TLS, node authentication, process isolation, nothing that calls out.

    flower-superlink     all of Flower's APIs on one port of loopback; a proxy lets institutions
                         reach the Fleet API
    flower-superexec     starts the ServerApp, and only who has the secret may ask for it
    flwr                 Flower's command line: registers nodes and starts runs

SuperLink is attached to where it runs already, but for one that a killed coordinator's process
started: that is ended, and started anew. What it starts is installed code: the bundle carries none.
"""

from __future__ import annotations

import json
import logging
import secrets
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedlora.common.disk.files import write_atomically
from fedlora.common.errors import FedloraError
from fedlora.common.protocol.flower_programs import environment, installed
from fedlora.server.coordinator.superlink_files import Files
from fedlora.server.deployment import orphans

log = logging.getLogger(__name__)
CONNECTION = "coordinator"  # Flower's name for its own SuperLink
KEY_IN_USE, NOT_FOUND = "Public key already in use", "Node ID not found"  # as Flower says it
UNREGISTERED = "unregistered"
STARTED = "started.json"  # what a coordinator's process started; a killed one could not end it
LOGS = ("superlink.log", "superexec.log")
START_SECONDS = 60.0
STOP_SECONDS = 10.0
FLWR_SECONDS = 120.0
BUNDLE = """\
# The bundle that `fedlora-server run` hands to SuperLink. It carries no code: \
both components are installed.
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "fedlora-run"
version = "0.1.0"
description = "One run of a fedlora federation"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "fedlora"
fab-include = ["README.md"]

[tool.flwr.app.components]
serverapp = "fedlora.server.deployment.flower:server_app"
clientapp = "fedlora.client.network.relay:app"

[tool.flwr.app.config]
directory = ""
run = ""
token = ""
"""


@dataclass(eq=False)
class SuperLink:
    """SuperLink on `port` of loopback.

    As a context it is started, or attached to, and what was started is stopped.
    """

    files: Files
    port: int
    _processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def __enter__(self) -> SuperLink:
        self._prepare()
        orphans.end(self.files.state / STARTED)
        if _listens(self.port):
            log.info("attached to the SuperLink on port %d", self.port)
            return self
        try:
            self._start(self.superlink_command(), LOGS[0])
            self._wait_until_it_listens()
            self._start(self.superexec_command(), LOGS[1])
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def superlink_command(self) -> list[str]:
        """Under TLS and node authentication, with its state in its folder."""
        files = self.files
        return [
            installed("flower-superlink"),
            *("--ssl-ca-certfile", str(files.ca)),
            *("--ssl-certfile", str(files.certificate)),
            *("--ssl-keyfile", str(files.key)),
            "--enable-supernode-auth",
            "--disable-runtime-dependency-installation",
            *("--isolation", "process"),
            *("--superexec-auth-secret-file", str(files.secret)),
            *("--database", str(files.state / "superlink.db")),
            *("--host", "127.0.0.1"),
            *("--port", str(self.port)),
        ]

    def superexec_command(self) -> list[str]:
        """The executor, which starts the app of a run."""
        return [
            installed("flower-superexec"),
            *("--runtime-api-address", f"127.0.0.1:{self.port}"),
            *("--root-certificates", str(self.files.ca)),
            *("--superexec-auth-secret-file", str(self.files.secret)),
        ]

    def register(self, name: str, public_key: str, known: Set[int]) -> int:
        """Flower's number for a node with this OpenSSH public key; registered once.

        A kill may have come before its number was noted: then it is the one node beside those
        `known`.
        """
        path = self.files.state / "keys" / f"{name}.pub"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (public_key + "\n").encode())
        try:
            return int(
                self._flwr("supernode", "register", str(path), CONNECTION, "--name", name)[
                    "node-id"
                ]
            )
        except FedloraError as error:
            if KEY_IN_USE not in str(error):
                raise
        return self._not_noted(known)

    def _not_noted(self, known: Set[int]) -> int:
        nodes = self._flwr("supernode", "list", CONNECTION)["nodes"]
        found = {int(node["node-id"]) for node in nodes if node["status"] != UNREGISTERED} - known
        if len(found) != 1:
            raise FedloraError(
                f"SuperLink: found {len(found)} nodes that {self.files.state / 'nodes.json'} does"
                " not have, expected one; stop SuperLink and remove that file and superlink.db:"
                " all nodes are then registered anew"
            )
        return found.pop()

    def unregister(self, node: int) -> None:
        """The node is let in no more; done, where it is not there."""
        try:
            self._flwr("supernode", "unregister", str(node), CONNECTION)
        except FedloraError as error:
            if NOT_FOUND not in str(error):
                raise

    def start_run(self, settings: Mapping[str, str]) -> str:
        """Flower's number of a new run of the bundle."""
        values = " ".join(f"{name}={json.dumps(value)}" for name, value in settings.items())
        return str(
            self._flwr("run", str(self._bundle()), CONNECTION, "--run-config", values)["run-id"]
        )

    def run_status(self, run: str) -> tuple[str, str]:
        """Flower's status of a run, "finished:failed" among them, and its details."""
        found = self._flwr("ls", CONNECTION, "--run-id", run).get("runs")
        if not found:
            raise FedloraError(f"flwr ls: found no run {run}, expected the one that was started")
        return str(found[0]["status"]), str(found[0].get("status-details", ""))

    def listens(self) -> bool:
        """Whether something answers on the port."""
        return _listens(self.port)

    def lost(self) -> str:
        """The log of a process that was started here and has ended; empty where all live."""
        logs = zip(self._processes, LOGS, strict=False)  # none where it was attached to
        return next(
            (str(self.files.state / log) for each, log in logs if each.poll() is not None), ""
        )

    def stop_run(self, run: str) -> None:
        """Ask for the end of a run; one that is over already stays so."""
        with suppress(FedloraError):
            self._flwr("stop", run, CONNECTION, seconds=STOP_SECONDS)

    def stop(self) -> None:
        """End what was started here, the last first."""
        for process in reversed(self._processes):
            process.terminate()
        for process in reversed(self._processes):
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._processes:
            (self.files.state / STARTED).unlink(missing_ok=True)
        self._processes.clear()

    def _prepare(self) -> None:
        state = self.files.state
        state.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not self.files.secret.exists():
            write_atomically(self.files.secret, secrets.token_hex(32).encode(), mode=0o600)
        config = {"address": f"127.0.0.1:{self.port}", "root-certificates": str(self.files.ca)}
        lines = [f"{name} = {json.dumps(value)}" for name, value in config.items()]
        text = "\n".join(
            ["[superlink]", f'default = "{CONNECTION}"', f"[superlink.{CONNECTION}]", *lines, ""]
        )
        write_atomically(state / "config.toml", text.encode())

    def _bundle(self) -> Path:
        folder = self.files.state / "bundle"
        folder.mkdir(exist_ok=True)
        (folder / "pyproject.toml").write_text(BUNDLE, encoding="utf-8")
        (folder / "README.md").write_text(
            "One run of a fedlora federation; all code is installed.\n", encoding="utf-8"
        )
        return folder

    def _start(self, command: Sequence[str], name: str) -> None:
        with (self.files.state / name).open("ab") as stream:
            process = subprocess.Popen(  # noqa: S603
                command,
                env=self._environment(),
                stdout=stream,
                stderr=stream,
                start_new_session=True,
            )
        self._processes.append(process)
        orphans.note(self.files.state / STARTED, [each.pid for each in self._processes])

    def _wait_until_it_listens(self) -> None:
        end = time.monotonic() + START_SECONDS
        while not _listens(self.port):
            if self._processes[-1].poll() is not None or time.monotonic() > end:
                raise FedloraError(
                    f"SuperLink did not start: {self.files.state / LOGS[0]} says why"
                )
            time.sleep(0.1)

    def _environment(self) -> dict[str, str]:
        return {**environment(), "FLWR_HOME": str(self.files.state)}

    def _flwr(self, *arguments: str, seconds: float = FLWR_SECONDS) -> dict[str, Any]:
        """Flower's command line, asked for JSON; FedloraError with its own words where it fails."""
        command = [installed("flwr"), *arguments, "--format", "json"]
        try:
            done = subprocess.run(  # noqa: S603
                command,
                env=self._environment(),
                capture_output=True,
                text=True,
                timeout=seconds,
                check=False,
                encoding="utf-8",
            )
        except subprocess.TimeoutExpired as error:
            raise FedloraError(
                f"flwr {arguments[0]}: found no answer within {seconds:g} s"
            ) from error
        start = done.stdout.find("{")
        try:
            found: dict[str, Any] = json.loads(done.stdout[start:])
        except ValueError:
            found = {}
        if done.returncode or not found.get("success"):
            words = str(found.get("error-message") or done.stderr or done.stdout)
            raise FedloraError(f"flwr {arguments[0]}: {' '.join(words.split())[:500]}")
        return found


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0
