"""The trainer as a process: a real socket, a real model, and kill -9 in the middle of a round."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from typer.testing import CliRunner

from fedlora.client.cli import app
from fedlora.client.door import SERVICE, Door, TrainerAway
from fedlora.client.report import read_report
from fedlora.common.config import LoraConfig, ModelConfig
from fedlora.common.errors import FedloraError, Refused
from fedlora.common.identity import Identity
from fedlora.common.messages import Network, RunManifest
from fedlora.common.model import AdapterModel, build_model
from fedlora.common.protocol import Answer, Consent, Decline, Reply, reply_from_bytes
from fedlora.common.state import AdapterState
from fedlora.common.tasks import SequenceClassification
from tests.client.institution import PHASE, POLICY, Institution, manifest_of, offer_of, task_of

LABELS = ("a", "b")
MODEL, LORA = ModelConfig(pooling="mean"), LoraConfig(rank=2)


@dataclass
class Trainer:
    """A node whose trainer runs as a process of its own."""

    north: Institution
    run: RunManifest
    state: AdapterState
    process: subprocess.Popen[bytes] | None = None

    @property
    def door(self) -> Door:
        return Door(f"unix:{(self.north.root / 'trainer.sock').resolve()}")

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "fedlora.client.cli", *words, "--node", str(self.north.root)]

    def start(self) -> None:
        (self.north.root / "trainer.sock").unlink(missing_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with (self.north.root / "log").open("ab") as log:
            self.process = subprocess.Popen(self.command("serve"), env=environment, stdout=log, stderr=log)
        deadline = time.monotonic() + 60
        while not (self.north.root / "trainer.sock").exists():
            assert self.process.poll() is None and time.monotonic() < deadline, self.log
            time.sleep(0.05)

    @property
    def log(self) -> str:
        return (self.north.root / "log").read_text()

    def ask(self, data: bytes) -> Reply:
        return reply_from_bytes(self.door.ask(data, 120), "f", {"north": self.north.identity.public})

    def task(self, round_: int, attempt: int) -> bytes:
        vector = self.state.vector.astype("<f4").tobytes()
        return task_of(self.run, round_, attempt, self.state.digest, vector=vector)

    def entries(self, kind: str) -> int:
        ledger = self.north.folder.open_ledger(self.north.folder.load_policy())
        found = len([entry for entry in ledger.entries() if entry.body["kind"] == kind])
        ledger.close()
        return found

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()


@pytest.fixture(scope="module")
def model(tiny_bert: Path) -> AdapterModel:
    return build_model(replace(MODEL, base=str(tiny_bert)), LORA, SequenceClassification(LABELS), seed=5)


@pytest.fixture
def trainer(tmp_path: Path, tiny_bert: Path, model: AdapterModel) -> Iterator[Trainer]:
    north = Institution(tmp_path / "n")
    north.set_policy(
        POLICY.format(base=model.base_digest, folder=tiny_bert) + "[trainer]\nmicro_batch_tokens = 200\n"
    )
    rows = [json.dumps({"text": f"w{k % 50} good", "label": LABELS[k % 2]}) for k in range(300)]
    (north.root / "notes.jsonl").write_text("\n".join(rows))
    north.restart()
    north.ledger.close()
    run = manifest_of(
        replace(PHASE, sampling_rate=0.1),
        epsilon=2.0,
        base_digest=model.base_digest,
        spec_digest=model.spec.digest,
        network=Network.of(MODEL, LORA),
    )
    made = Trainer(north, run, model.state())
    yield made
    made.kill()


def test_a_killed_trainer_gives_the_same_bytes_or_nothing(trainer: Trainer) -> None:
    trainer.start()
    mode = (trainer.north.root / "trainer.sock").stat().st_mode
    assert stat.S_ISSOCK(mode) and mode & 0o077 == 0
    consent = trainer.ask(offer_of(trainer.run))
    assert isinstance(consent, Consent), (consent, trainer.log)
    first = trainer.door.ask(trainer.task(1, 1), 60)
    answer = reply_from_bytes(first, "f", {"north": trainer.north.identity.public})
    assert isinstance(answer, Answer), (answer, trainer.log)
    update = np.frombuffer(answer.vector, dtype="<f4")
    assert update.shape == trainer.state.vector.shape and np.isfinite(update).all() and update.any()
    trainer.kill()
    trainer.start()
    assert trainer.door.ask(trainer.task(1, 1), 60) == first
    assert trainer.entries("reserve") == trainer.entries("commit") == 1


def test_a_kill_in_the_middle_of_a_round_costs_the_attempt(trainer: Trainer) -> None:
    trainer.run = replace(
        trainer.run, phases=(replace(trainer.run.phases[0], steps=20, noise_multiplier=8.0),)
    )
    trainer.start()
    assert isinstance(trainer.ask(offer_of(trainer.run)), Consent), trainer.log
    with trainer.door.channel() as channel:
        call = channel.unary_unary(f"/{SERVICE}/Ask").future(trainer.task(1, 1))
        deadline = time.monotonic() + 30
        while not trainer.entries("reserve") and time.monotonic() < deadline:
            time.sleep(0.01)
        assert trainer.process is not None
        trainer.process.send_signal(signal.SIGKILL)
        trainer.process.wait()
        with pytest.raises(grpc.RpcError):
            call.result(timeout=10)
    assert (trainer.entries("reserve"), trainer.entries("commit")) == (1, 0)
    with pytest.raises(TrainerAway, match="unavailable"):
        trainer.door.ask(b"", 5)
    trainer.start()
    again = trainer.ask(trainer.task(1, 1))
    assert isinstance(again, Decline) and "used before" in again.reason
    assert isinstance(trainer.ask(trainer.task(1, 2)), Answer), trainer.log
    assert trainer.entries("reserve") == 2


def test_the_endpoint_bears_strangers(trainer: Trainer, tmp_path: Path) -> None:
    trainer.start()
    second = subprocess.run(trainer.command("serve"), capture_output=True, timeout=60, check=False)
    assert second.returncode == 3 and b"another trainer" in second.stderr, second.stderr
    path = str((trainer.north.root / "trainer.sock").resolve())
    idle = []
    for _ in range(200):
        each = socket.socket(socket.AF_UNIX)
        each.connect(path)
        idle.append(each)
    assert trainer.process is not None
    before = _resident(trainer.process.pid)
    with pytest.raises(TrainerAway, match="resource_exhausted"):  # msg-oversize
        trainer.door.ask(bytes(200 << 20), 60)
    assert _resident(trainer.process.pid) - before < 300 << 20
    reply = trainer.ask(b"forged")
    assert isinstance(reply, Decline)
    with trainer.door.channel() as channel:
        health = health_pb2_grpc.HealthStub(channel)
        found = health.Check(health_pb2.HealthCheckRequest(service=SERVICE), timeout=10)
    assert found.status == health_pb2.HealthCheckResponse.SERVING
    for each in idle:
        each.close()
    trainer.process.send_signal(signal.SIGTERM)
    assert trainer.process.wait(20) == 0
    assert not Path(path).exists()


def _resident(process: int) -> int:
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * int(os.sysconf("SC_PAGE_SIZE"))


def test_a_report_tells_all_and_no_byte_of_it_changes_unnoticed(tmp_path: Path) -> None:
    from fedlora.client.report import write_report

    north = Institution(tmp_path / "n")
    run = manifest_of()
    for data in (offer_of(run), task_of(run), offer_of(replace(run, run="2", minimum_cohort=1)), b"x"):
        north.ask(data)
    policy = north.folder.load_policy()
    body = write_report(north.folder, policy, north.identity, north.ledger, tmp_path / "out")
    (told,) = body["runs"]
    assert told["epsilon"] < told["epsilon_second_accountant"] < 2 * told["epsilon"]
    assert told["phases"][0]["noise_multiplier"] == 3.0 and told["sent"][1]["bytes"] > 0
    assert len(body["refusals"]) == 2 and body["ledger"]["entries"] == 4
    assert body["budgets"][0]["epsilon_spent"] == told["epsilon"]
    path = tmp_path / "out" / "report.json"
    assert read_report(path, north.identity.public).body == json.loads(json.dumps(body))
    data = path.read_bytes()
    generator = np.random.default_rng(1)
    for place in generator.choice(len(data), 200, replace=False):
        path.write_bytes(
            data[:place] + bytes([data[place] ^ int(generator.integers(1, 256))]) + data[place + 1 :]
        )
        with pytest.raises(FedloraError):
            read_report(path)
    path.write_bytes(data)
    with pytest.raises(FedloraError):
        read_report(path, Identity.generate().public)
    assert "<script" not in (tmp_path / "out" / "report.html").read_text()


def test_explain_prints_a_verdict_for_each_field(tmp_path: Path) -> None:
    north = Institution(tmp_path / "n")
    north.ledger.close()
    file = tmp_path / "manifest.json"
    for run, code in ((manifest_of(), 0), (manifest_of(base_digest="sha256:0"), 3)):
        file.write_bytes(run.to_bytes())
        done = CliRunner().invoke(app, ["policy", "explain", str(file), "--node", str(north.root)])
        assert isinstance(done.exception, Refused) is (code == 3), done.exception
        assert "minimum_cohort" in done.stdout and "allow" in done.stdout
        assert ("deny" in done.stdout) is (code == 3)
