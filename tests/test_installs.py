"""Each role's installation runs that role's commands, and says in a line what it lacks for others.

Before: `fedlora[server]` lacked opacus, and its `verify` ended in a traceback, as the core's did.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedlora.simulations.local import deployment, processes, whole_run
from tests.installations import KINDS, ROOT, commands, on_path

EARLIER = ROOT / "tests" / "fixtures" / "earlier"
EXPORT, REPORT = str(EARLIER / "export"), str(EARLIER / "report")


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of every role's commands."""
    return commands(request.param, tmp_path_factory.getbasetemp())


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    """A copy that may be written to, with the modes that its owner would have."""
    copy = shutil.copytree(EARLIER, tmp_path / "earlier")
    for path in copy.rglob("*"):
        path.chmod(0o700 if path.is_dir() else 0o600)
    return copy


def run(place: Path, command: str, *words: str) -> str:
    """What it prints; it ends with 0."""
    done = subprocess.run(
        [place / command, *words], env=on_path(place), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def lacking(role: str, *words: str) -> tuple[int, str]:
    """Exit code and last words of a command in an installation that is not its role's."""
    command = [sys.executable, "-m", "tests.as_installed", role, *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr.strip()


def test_the_core_verifies_offline(place: Path) -> None:
    said = run(place, "fedlora-server", "verify", EXPORT)
    assert "3, each signed by its institution" in said
    key = str(EARLIER / "node" / "enrolment.json")
    assert "verified" in run(place, "fedlora-node", "report", "--check", REPORT, "--key", key)


def test_the_relay_starts_in_the_core(place: Path, tmp_path: Path) -> None:
    relay, trainer = str(tmp_path / "none"), f"unix:{tmp_path / 'socket'}"
    done = subprocess.run(
        [str(place / "fedlora-node"), "link", "--relay", relay, "--trainer", trainer],
        env=on_path(place), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2 and "flower_key: found no readable file" in done.stderr


def test_a_trainer_serves_and_reports(place: Path, earlier: Path) -> None:
    node = ["--node", str(earlier / "node")]
    manifest = str(next((earlier / "node" / "runs").glob("*/manifest.signed")))
    assert "allow" in run(place, "fedlora-node", "policy", "explain", manifest, *node)
    assert "messages" in run(place, "fedlora-node", "ledger", *node)
    run(place, "fedlora-node", "report", *node, "--out", str(earlier / "new"))
    serving = subprocess.Popen(
        [place / "fedlora-node", "serve", *node], env=on_path(place), stderr=subprocess.PIPE
    )
    socket, end = earlier / "node" / "trainer.sock", time.monotonic() + 120
    while not socket.exists() and serving.poll() is None and time.monotonic() < end:
        time.sleep(0.1)
    serving.send_signal(signal.SIGTERM)
    _, said = serving.communicate(timeout=60)
    assert serving.returncode == 0, said.decode()


def test_a_coordinator_exports_what_it_ran(place: Path, earlier: Path) -> None:
    where = ["--dir", str(earlier / "coordinator")]
    assert "3 of 3" in run(place, "fedlora-server", "status", *where)
    run(place, "fedlora-server", "export", str(earlier / "new"), *where)
    assert "3, each signed" in run(place, "fedlora-server", "verify", str(earlier / "new"))


def test_a_researcher_goes_on_with_a_run(place: Path, earlier: Path) -> None:
    folder = earlier / "simulation"
    words = ["run", "run.toml", "--out", "run", "--resume", "--threads", "1"]
    done = subprocess.run(
        [place / "fedlora-sim", *words],
        cwd=folder, env=on_path(place), capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (folder / "run" / "summary.json").is_file() and list((folder / "run").glob("*.html"))


@pytest.mark.installs
@pytest.mark.flower
def test_a_federation_runs_between_installations(
    tiny_bert: Path,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Trainers, relays and coordinator have what their roles install: Flower's processes too."""
    place = commands("real", tmp_path_factory.getbasetemp())
    for module in (processes, deployment):
        monkeypatch.setattr(module, "BIN", place)
    federation = deployment.Federation(
        tmp_path / "f", rounds=2, base=str(tiny_bert), layers="[]", secure=True
    )
    federation.prepare()
    with deployment.running(federation):
        code = federation.wait(600)
    logs = "\n".join(each.read_text() for each in (federation.root / "logs").iterdir())
    assert code == 0, logs
    whole_run.conclude(federation)


@pytest.mark.parametrize(
    ("role", "words"),
    [
        ("core", ("fedlora-node", "check-data", "--node", "node")),
        ("core", ("fedlora-node", "serve", "--node", "node")),
        ("core", ("fedlora-node", "report", "--node", "node", "--out", "new")),
        ("core", ("fedlora-server", "run", "coordinator/training.toml", "--dir", "made")),
        ("node", ("fedlora-server", "run", "coordinator/training.toml", "--dir", "made")),
        ("core", ("fedlora-sim", "run", "quickstart", "--out", "new")),
    ],
)
def test_what_is_lacking_is_said_before_anything_is_made(
    role: str, words: tuple[str, ...], earlier: Path
) -> None:
    """A run's number was spent on an installation that could not carry it out."""
    made = str(earlier / "made")
    code, said = lacking("core", "fedlora-server", "init", made, *INIT)
    assert code == 0, said
    before = sorted(earlier.rglob("*"))
    code, said = lacking(role, *(str(earlier / w) if w in PATHS else w for w in words))
    assert code == 2 and len(said.splitlines()) == 1, said
    assert said.startswith(f"{words[0]}: found no package ") and "fedlora[" in said
    assert {path.name for path in {*earlier.rglob("*")} - set(before)} <= {"ledger.sqlite.lock"}


INIT = ("--federation", "demo", "--host", "127.0.0.1")
PATHS = {"node", "new", "made", "coordinator/training.toml"}
