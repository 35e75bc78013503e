"""A large update between processes: what a round's bytes cost each of them in memory and time.

One institution and its coordinator on this machine, by the product's own processes, keys and
messages: SuperLink, the server's app, SuperNode and relay, and a trainer whose step is left out: it
checks the adapter that came against its plan and answers with drawn numbers, which the server must
find in the adapter of its next checkpoint. `--kill` ends a process in the middle of a transfer,
again for each one named, and starts it anew.

    python simulations/benchmarks/bytes.py [--bytes 1000000000] [--wire float32]
        [--optimizer none] [--kill trainer relay server] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil

from fedlora.common.config.schema import LoraConfig, ModelConfig
from fedlora.common.errors import FedloraError
from fedlora.common.manifest.manifest import Network, Phase, RunManifest
from fedlora.common.model.base import base_digest, resolve_base
from fedlora.common.protocol.vector_parts import vector_size
from fedlora.server.coordinator.folder import Directory
from fedlora.server.deployment import superlink
from fedlora.server.deployment.process import appoint, outcome_path
from fedlora.server.deployment.supervise import admit
from fedlora.simulations.benchmarks.untrained import ASKED, FOUND, NAME, SECONDS, spec_of, trainer
from fedlora.simulations.federation.corpus import CLASSES
from fedlora.simulations.local.deployment import Federation
from fedlora.simulations.local.processes import wait_until

LOOK = 0.05  # seconds between two looks at memory
PHASE = Phase("lora", 1, 2, 1, 0.1, 8.0, 0.0, 1.0, 0.0, "sgd", 1.0, False, 0.0)
PLAIN, OWN = "fedlora.server.deployment.flower", "fedlora.simulations.benchmarks.untrained"


@dataclass(eq=False)
class Peaks:
    """The largest resident memory, in bytes, of each kind of process below this one."""

    found: dict[str, int] = field(default_factory=dict)
    anonymous: dict[str, int] = field(default_factory=dict)
    done: threading.Event = field(default_factory=threading.Event)

    def watch(self) -> None:
        """Until `done`."""
        while not self.done.wait(LOOK):
            for process in psutil.Process().children(recursive=True):
                kind = _kind(process)
                if kind:
                    self._note(kind, process.pid)

    def _note(self, kind: str, pid: int) -> None:
        try:
            lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
        except OSError:
            return
        sizes = {line.split(":")[0]: line.split() for line in lines}
        for name, kept in (("VmHWM", self.found), ("RssAnon", self.anonymous)):
            if name in sizes:
                kept[kind] = max(kept.get(kind, 0), int(sizes[name][1]) << 10)


def _kind(process: psutil.Process) -> str:
    try:
        words = " ".join(process.cmdline())
    except psutil.Error:
        return ""
    marks = {
        "flower-superlink": "SuperLink",
        "flwr-serverapp": "server",
        "flower-supernode": "SuperNode",
        "flwr-clientapp": "relay",
        "--trainer-of": "trainer",
    }
    return next((kind for mark, kind in marks.items() if mark in words), "")


@contextmanager
def _watched() -> Iterator[Peaks]:
    peaks = Peaks()
    thread = threading.Thread(target=peaks.watch, daemon=True)
    thread.start()
    try:
        yield peaks
    finally:
        peaks.done.set()
        thread.join()


@dataclass(eq=False)
class Stage:
    """The federation of a measurement, its processes, and its one round."""

    federation: Federation
    size: int
    wire: str
    optimizer: str  # the server's

    def prepare(self) -> Path:
        """Folders, keys and the round's manifest; the folder of its run."""
        self.federation.prepare()
        policy = self.federation.node(NAME) / "node.toml"
        text = policy.read_text(encoding="utf-8")
        policy.write_text(text.replace("[limits]", "[limits]\nallow_unnoised = true"), "utf-8")
        folder = self.federation.coordinator / "runs" / "1"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_bytes(self._manifest().to_bytes())
        asked = {"size": self.size, "optimizer": self.optimizer}
        (folder / ASKED).write_text(json.dumps(asked), encoding="utf-8")
        return folder

    def start_trainer(self) -> None:
        """Return once it listens."""
        door = self.federation.door(NAME)
        door.unlink(missing_ok=True)
        words = [sys.executable, __file__, "--trainer-of", str(self.federation.node(NAME))]
        log = (self.federation.root / "trainer.log").open("ab")
        self.federation.processes["trainer"] = subprocess.Popen(
            [*words, "--size", str(self.size)], stdout=log, stderr=log, start_new_session=True
        )
        wait_until(door.exists, "the trainer")

    def start_relay(self) -> None:
        """It finds both ends by itself."""
        self.federation.start_relay(NAME)

    def _manifest(self) -> RunManifest:
        return RunManifest(
            federation="demo", run="1", task="sequence-classification", labels=tuple(CLASSES),
            base_digest=base_digest(resolve_base("minilm")), spec_digest=spec_of(self.size).digest,
            projection_digest="", max_length=16, mode="none", unit="", epsilon=0.0, delta=0.0,
            strategy="fedavg", participation=1.0, minimum_cohort=3, seed=7,
            network=Network.of(ModelConfig(pooling="mean"), LoraConfig(targets=("query",))),
            phases=(PHASE,), wire=self.wire, vector_size=vector_size(self.size),
        )  # fmt: skip


def measured(size: int, wire: str, optimizer: str, kill: list[str]) -> dict[str, Any]:
    """Seconds, bytes and peaks of one round of `size` coordinates."""
    with TemporaryDirectory() as scratch:
        stage = Stage(Federation(Path(scratch) / "f", names=(NAME,)), size, wire, optimizer)
        folder = stage.prepare()
        directory = Directory.open(stage.federation.coordinator)
        superlink.BUNDLE = superlink.BUNDLE.replace(PLAIN, OWN)
        began = time.monotonic()
        with (
            _watched() as peaks,
            superlink.SuperLink(directory.superlink_files(), directory.port) as link,
        ):
            try:
                admit(directory, link)
                stage.start_trainer()
                stage.start_relay()
                killed = _conducted(stage, link, directory, folder, kill)
            finally:
                for name in list(stage.federation.processes):
                    stage.federation.kill(name, signal.SIGTERM)
        found = json.loads((folder / FOUND).read_text(encoding="utf-8"))
        return {
            **found,
            "bytes": 4 * size,
            "killed": killed,
            "all_seconds": time.monotonic() - began,
            "peaks": peaks.found,
            "anonymous": peaks.anonymous,
        }


def _conducted(
    stage: Stage, link: superlink.SuperLink, directory: Directory, folder: Path, kill: list[str]
) -> list[str]:
    """The round, begun, and gone on with after each kill; who was killed, and what was there."""
    killed, token = list[str](), _begun(link, directory, folder)
    end = time.monotonic() + SECONDS
    while not outcome_path(folder, token).exists():
        if time.monotonic() > end:
            raise FedloraError("the round did not end")
        time.sleep(0.2)
        for name in [each for each in kill if _reached(stage, folder, each)]:
            kill.remove(name)
            sizes = [_size(stage.federation.node(NAME) / "inbox"), _size(folder / "incoming")]
            killed.append(f"{name} at {sizes[0]} and {sizes[1]} bytes")
            print(killed[-1], flush=True)
            token = _killed(stage, link, directory, folder, name) or token
    outcome = json.loads(outcome_path(folder, token).read_text(encoding="utf-8"))
    if outcome["code"]:
        raise FedloraError(outcome["message"])
    return killed


def _begun(link: superlink.SuperLink, directory: Directory, folder: Path) -> str:
    token = appoint(folder)
    settings = {"directory": str(directory.root), "run": str(folder), "token": token}
    link.start_run(settings)
    return token


def _reached(stage: Stage, folder: Path, name: str) -> bool:
    """Whether it is time to kill this process: in the middle of what it takes or sends."""
    if name == "trainer":
        return _size(stage.federation.node(NAME) / "inbox") > 4 * stage.size * 0.4
    return _size(folder / "incoming") > 4 * stage.size * {"relay": 0.2, "server": 0.6}[name]


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _killed(
    stage: Stage, link: superlink.SuperLink, directory: Directory, folder: Path, name: str
) -> str:
    """Kill a process and start it again; the new token of a server's."""
    if name == "trainer":
        stage.federation.kill("trainer")
        stage.start_trainer()
    elif name == "relay":
        stage.federation.kill(f"relay {NAME}")
        stage.start_relay()
    else:
        for process in psutil.Process().children(recursive=True):
            if _kind(process) == "server":
                process.kill()
        return _begun(link, directory, folder)
    return ""


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bytes", type=int, default=10**9)
    parser.add_argument("--wire", default="float32")
    parser.add_argument("--optimizer", default="none")
    parser.add_argument("--kill", nargs="*", default=[], choices=("trainer", "relay", "server"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--trainer-of", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.trainer_of:
        trainer(asked.trainer_of, asked.size)
        return
    found = measured(asked.bytes // 4, asked.wire, asked.optimizer, asked.kill)
    print(json.dumps(found, indent=1))
    if asked.json:
        asked.json.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
