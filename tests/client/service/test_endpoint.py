"""The trainer as a process: a real socket, a real model, and kill -9 in the middle of a round."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from typer.testing import CliRunner

from fedlora.client.cli import app
from fedlora.client.network.channel import METHOD, SERVICE, Door, TrainerAway
from fedlora.client.node.enrolment import only_trainer
from fedlora.client.node.folder import NodeFolder
from fedlora.common.config.schema import LoraConfig, ModelConfig
from fedlora.common.errors import Refused
from fedlora.common.manifest.manifest import Network, RunManifest
from fedlora.common.model.network import AdapterModel, build_model
from fedlora.common.model.state import AdapterState
from fedlora.common.protocol.messages import Answer, Decline, Reply, Started, reply_from_bytes
from fedlora.common.tasks.classification import SequenceClassification
from tests.beside import beside
from tests.client.institution import (
    OTHERS,
    PHASE,
    POLICY,
    Institution,
    manifest_of,
    offer_of,
    start_of,
    task_of,
)
from tests.client.service.authority import Authority

LABELS = ("a", "b")
MODEL = ModelConfig(pooling="mean")
LORA = LoraConfig(rank=2, targets=("query", "value"))
LIMIT, BURST = 64 << 20, 12  # bytes of one message that are taken; messages at once


@dataclass
class Trainer:
    """A node whose trainer runs as a process of its own."""

    north: Institution
    run: RunManifest
    state: AdapterState
    process: subprocess.Popen[bytes] | None = None
    line: Door | None = None  # over TCP

    @property
    def door(self) -> Door:
        return self.line or Door(f"unix:{(self.north.root / 'trainer.sock').resolve()}")

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "fedlora.client.cli", *words, "--node", str(self.north.root)]

    def start(self) -> None:
        (self.north.root / "trainer.sock").unlink(missing_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with (self.north.root / "log").open("ab") as log:
            self.process = subprocess.Popen(
                self.command("serve"), env=environment, stdout=log, stderr=log
            )
        deadline = time.monotonic() + 60
        while not self._listens():
            assert self.process.poll() is None and time.monotonic() < deadline, self.log
            time.sleep(0.05)

    def _listens(self) -> bool:
        if self.line is None:
            return (self.north.root / "trainer.sock").exists()
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", int(self.line.address.rpartition(":")[2]))) == 0

    def over_tcp(self) -> None:
        """Mutual TLS on a port of its own, from the next start on."""
        root = self.north.root
        authority = Authority.make(root, "ca")
        for name in ("trainer", "relay"):
            authority.issue(name)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        tls = 'tls_certificate = "trainer.crt"\ntls_key = "trainer.key"\ntls_clients = "ca.crt"\n'
        self.north.set_policy(self.north.folder.policy.read_text() + f'listen = "{address}"\n{tls}')
        self.line = Door(
            address, *(str(root / each) for each in ("ca.crt", "relay.crt", "relay.key"))
        )

    @property
    def log(self) -> str:
        return (self.north.root / "log").read_text()

    def ask(self, data: bytes) -> Reply:
        return reply_from_bytes(
            self.door.ask(data, 120), "f", {"north": self.north.identity.public}
        )

    def begin(self) -> None:
        """Offered, consented to and started."""
        consent = self.door.ask(offer_of(self.run), 120)
        started = self.ask(start_of(self.run, {"north": consent, **OTHERS}))
        assert isinstance(started, Started), (started, self.log)

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
    return build_model(
        replace(MODEL, base=str(tiny_bert)), LORA, SequenceClassification(LABELS), seed=5
    )


@pytest.fixture
def trainer(tmp_path: Path, tiny_bert: Path, model: AdapterModel) -> Iterator[Trainer]:
    north = Institution(tmp_path / "n")
    north.set_policy(
        POLICY.format(base=model.base_digest, folder=tiny_bert)
        + "[trainer]\nmicro_batch_tokens = 200\nanswer_every = 0.1\n"
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
    trainer.begin()
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
    trainer.begin()
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


def test_the_endpoint_ends_with_a_signal_and_takes_no_second_trainer(trainer: Trainer) -> None:
    trainer.start()
    second = subprocess.run(trainer.command("serve"), capture_output=True, timeout=60, check=False)
    assert second.returncode == 3 and b"another trainer" in second.stderr, second.stderr
    assert isinstance(trainer.ask(b"forged"), Decline)
    assert trainer.process is not None
    trainer.process.send_signal(signal.SIGTERM)
    assert trainer.process.wait(20) == 0
    assert not (trainer.north.root / "trainer.sock").exists()


SLOW = """
import sys, time
from pathlib import Path
from fedlora.client import cli
from fedlora.client.service import answer, endpoint

def ask(trainer, data):
    (root / "training").touch()
    time.sleep(float(data))
    (root / "committed").touch()
    return b"done"

root, endpoint.GRACE = Path(sys.argv[1]), float(sys.argv[2])
answer.Resident.ask_in_time = ask
sys.argv = ["fedlora-node", "serve", "--node", str(root)]
cli.main()
"""


@pytest.mark.parametrize(
    ("seconds", "grace", "signals", "said"),
    [
        (60, 1.0, 1, "did not end within 1 s: the trainer ends now"),
        (60, 30.0, 2, "a second signal came: the trainer ends now"),
        (2, 30.0, 1, ""),  # within the grace
    ],
)
def test_a_trainer_that_stops_has_the_lock_as_long_as_it_trains(
    tmp_path: Path, seconds: float, grace: float, signals: int, said: str
) -> None:
    """Whoever asked has hung up: nothing but the work itself is left."""
    north = Institution(tmp_path / "n")
    north.ledger.close()
    command = [sys.executable, "-c", SLOW, str(north.root), str(grace)]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as process:
        try:
            _until((north.root / "trainer.sock").exists)
            with Door(f"unix:{(north.root / 'trainer.sock').resolve()}").channel() as channel:
                call = channel.unary_unary(METHOD).future(
                    str(seconds).encode(), wait_for_ready=True
                )
                _until((north.root / "training").exists)
                call.cancel()
            for _ in range(signals):
                process.send_signal(signal.SIGTERM)
                time.sleep(0.5)
            _until(partial(_is_free, north.folder))
            assert (north.root / "committed").exists() is (said == "")
            assert process.wait(10) == 0
        finally:
            process.kill()
        assert process.stderr is not None
        log = process.stderr.read()
    assert said in log
    assert not (north.root / "trainer.sock").exists() or signals == 2


def _until(found: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not found():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _is_free(folder: NodeFolder) -> bool:
    """Whether a second trainer could start."""
    try:
        with only_trainer(folder):
            return True
    except Refused:
        return False


@pytest.mark.parametrize("transport", ["unix", "tls"])
def test_strangers_cost_an_honest_round_little(trainer: Trainer, transport: str) -> None:
    """1,000 idle connections and bodies of 300 MB one after the other cost at most 300 MB.

    The times are printed.
    """
    if transport == "tls":
        trainer.over_tcp()
    trainer.run = replace(
        trainer.run,
        phases=(
            replace(trainer.run.phases[0], steps=20, sampling_rate=0.4, noise_multiplier=24.0),
        ),
    )
    trainer.start()
    trainer.begin()
    _round(trainer, 1)  # the first one loads and compiles
    alone = _round(trainer, 2)
    assert trainer.process is not None
    status = Path(f"/proc/{trainer.process.pid}")
    (status / "clear_refs").write_text("5")  # its peak is counted from here
    before = _peak(status)
    idle = [_connection(trainer.door.address) for _ in range(1000)]
    try:
        with beside(partial(_flood, trainer.door)) as flood, trainer.door.channel() as channel:
            honest = _round(trainer, 3)
            found = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(service=SERVICE), timeout=10
            )
        refused = flood.result()
        grown = _peak(status) - before
        _burst(trainer.door)
        burst = _peak(status) - before
    finally:
        for each in idle:
            each.close()
    print(
        f"{transport}: alone {alone:.2f} s, beside {honest:.2f} s, {refused} refused, {grown >> 20}"
        f" MB more, {burst >> 20} MB after {BURST} bodies of {LIMIT >> 20} MB at once"
    )
    assert found.status == health_pb2.HealthCheckResponse.SERVING
    assert refused and grown < 300 << 20, (refused, grown)
    # one at a time: were all of them read, it would be more than twelve
    assert burst < 6 * LIMIT, burst


def _round(trainer: Trainer, attempt: int) -> float:
    started = time.monotonic()
    assert isinstance(trainer.ask(trainer.task(1, attempt)), Answer), trainer.log
    return time.monotonic() - started


def _connection(address: str) -> socket.socket:
    if address.startswith("unix:"):
        made = socket.socket(socket.AF_UNIX)
        made.connect(address.removeprefix("unix:"))
        return made
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)))


def _unlimited(door: Door) -> grpc.Channel:
    """As a stranger who keeps to no limit of ours would ask."""
    options = [("grpc.max_send_message_length", -1), ("grpc.enable_retries", 0)]
    if door.address.startswith("unix:"):
        return grpc.insecure_channel(door.address, options)
    files = (Path(each).read_bytes() for each in (door.authority, door.key, door.certificate))
    return grpc.secure_channel(door.address, grpc.ssl_channel_credentials(*files), options)


def _flood(door: Door, stop: threading.Event) -> int:
    """Bodies of 300 MB until `stop`, each refused (msg-oversize); how many."""
    body, refused = bytes(300 << 20), 0
    with _unlimited(door) as channel:
        while not stop.is_set():
            with pytest.raises(grpc.RpcError) as found:
                channel.unary_unary(METHOD)(body, timeout=60)
            assert found.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            refused += 1
    return refused


def _burst(door: Door) -> None:
    """Forged bodies, each just within the limit of one message."""
    body = bytes(LIMIT - 1024)
    with _unlimited(door) as channel:
        calls = [channel.unary_unary(METHOD).future(body, timeout=60) for _ in range(BURST)]
        for call in calls:
            call.exception()


def _peak(status: Path) -> int:
    return 1024 * int((status / "status").read_text().split("VmHWM:")[1].split()[0])


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
