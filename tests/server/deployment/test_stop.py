"""`fedlora-server run`, told to end, ends what it started: SuperLink and its executor."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_was_started_ends_with_who_started_it(
    tmp_path: Path, tiny_bert: Path, number: signal.Signals
) -> None:
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
    words = [
        sys.executable,
        "-c",
        SERVER,
        str(programs),
        "run",
        str(path),
        "--dir",
        str(directory.root),
    ]
    server = subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    appointed = directory.root / "runs" / "1" / "appointed"
    end = time.monotonic() + 60
    try:
        while not appointed.exists():
            assert server.poll() is None and time.monotonic() < end
            time.sleep(0.05)
        time.sleep(1.0)  # until it follows the run
        started = [
            int((tmp_path / name).read_text()) for name in ("flower-superlink", "flower-superexec")
        ]
        os.kill(server.pid, number)
        said = server.communicate(timeout=30)[1]
    finally:
        server.kill()
    assert server.returncode == 1 and f"fedlora-server resume --dir {directory.root}" in said
    assert "Traceback" not in said and not any(psutil.pid_exists(each) for each in started)
