"""`fedlora-server run`, told to end, ends what it started: SuperLink and its executor."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from fedlora.common.config.load import load_config
from fedlora.common.trust.identity import Identity
from fedlora.server.coordinator.folder import Directory
from tests.server.coordinator.test_folder import free_port
from tests.server.enrolments import request

STAND_IN = """
import json, os, socket, sys, time
from pathlib import Path
name, folder = Path(sys.argv[0]).name, Path({folder!r})
if name == "flwr":
    print(json.dumps({{"success": True, "node-id": 1, "run-id": 1, \
"runs": [{{"status": "running"}}]}}))
    sys.exit()
(folder / name).write_text(str(os.getpid()))
if name == "flower-superlink":
    door = socket.create_server(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])))
time.sleep(600)
"""
SERVER = """
import signal, sys
from fedlora.server import cli
from fedlora.server.deployment import superlink
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs don't hear it
programs = sys.argv[1]
superlink.installed = lambda name: programs + "/" + name
sys.argv = ["fedlora-server", *sys.argv[2:]]
cli.main()
"""


@dataclass
class Server:
    """`fedlora-server` over stand-ins for Flower's programs, which write their numbers down."""

    folder: Path
    directory: Directory

    def start(self, *words: str) -> subprocess.Popen[str]:
        """Once it follows its run."""
        appointed = self.directory.root / "runs" / "1" / "appointed"
        appointed.unlink(missing_ok=True)
        command = [sys.executable, "-c", SERVER, str(self.folder / "programs"), *words]
        server = subprocess.Popen(
            [*command, "--dir", str(self.directory.root)],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        end = time.monotonic() + 180
        while not appointed.exists():
            assert server.poll() is None and time.monotonic() < end
            time.sleep(0.05)
        time.sleep(1.0)
        return server

    def started(self) -> list[int]:
        programs = ("flower-superlink", "flower-superexec")
        return [int((self.folder / name).read_text()) for name in programs]


@pytest.fixture
def server(tmp_path: Path, tiny_bert: Path) -> Server:
    directory = Directory.create(tmp_path / "c", "demo", "127.0.0.1", free_port(), free_port())
    for name in ("north", "south", "west"):
        directory.registry.enrol(request(Identity.generate(), name), name)
    path = directory.root / "training.toml"
    path.write_text(path.read_text().replace('"minilm"', json.dumps(str(tiny_bert))))
    for public in (load_config(path).data.test, load_config(path).data.validation):
        Path(str(public)).touch()
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("flwr", "flower-superlink", "flower-superexec"):
        (programs / name).write_text(f"#!{sys.executable}" + STAND_IN.format(folder=str(tmp_path)))
        (programs / name).chmod(0o755)
    return Server(tmp_path, directory)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_was_started_ends_with_who_started_it(server: Server, number: signal.Signals) -> None:
    root = server.directory.root
    process = server.start("run", str(root / "training.toml"))
    try:
        os.kill(process.pid, number)
        said = process.communicate(timeout=30)[1]
    finally:
        process.kill()
    assert process.returncode == 1 and f"fedlora-server resume --dir {root}" in said
    assert "Traceback" not in said and not any(map(psutil.pid_exists, server.started()))


def test_nothing_is_left_running_after_a_kill_and_a_resume(server: Server) -> None:
    """The resumed run was attached to what the killed one had left, and left it again."""
    first = server.start("run", str(server.directory.root / "training.toml"))
    first.kill()
    first.communicate()
    left = server.started()
    assert all(map(psutil.pid_exists, left))
    second = server.start("resume")
    try:
        end = time.monotonic() + 60  # it begins by ending them
        while any(map(psutil.pid_exists, left)) and time.monotonic() < end:
            time.sleep(0.05)
        time.sleep(1.0)
        assert not any(map(psutil.pid_exists, left)) and server.started() != left
        second.terminate()
        second.communicate(timeout=30)
    finally:
        second.kill()
    assert not any(map(psutil.pid_exists, [*left, *server.started()]))
