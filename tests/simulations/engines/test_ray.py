"""Flower's apps give the sequential engine's adapter: in process, on Ray, by `flwr run .`."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run as FlowerRun
from flwr.supercore.task_identity import TaskIdentity
from safetensors.numpy import load_file

from fedlora.common.config.load import load_config
from fedlora.common.errors import Refused
from fedlora.common.manifest.plan import RoundPlan
from fedlora.common.model.state import Vector
from fedlora.common.protocol.messages import (
    PLAN_TAG,
    Answer,
    Decline,
    Reply,
    Task,
    reply_from_bytes,
    request_to_bytes,
)
from fedlora.common.protocol.vectors import vector_to_bytes
from fedlora.common.trust.identity import Identity, Signed
from fedlora.server.deployment.flower import GridCarrier
from fedlora.server.runs.run import conduct
from fedlora.simulations.begin import begin
from fedlora.simulations.engines import nodes, ray
from fedlora.simulations.engines.ray import client_app, server_app
from fedlora.simulations.engines.sequential import sequential
from fedlora.simulations.engines.shared import Shared
from fedlora.simulations.federation.run_folder import Paths, finish
from tests.simulations.experiments.test_simulate import cpu

ROOT = Path(__file__).resolve().parents[3]
CLIENTS = 5
PATIENCE = 240  # seconds for a whole simulation with Ray's start
# `fedlora-sim`, whose workers note which GPUs they are shown
ON_GPUS = """
import os
from flwr.clientapp import ClientApp
from fedlora.simulations import cli
from fedlora.simulations.engines import ray

def client(folder):
    app, seen = ClientApp(), os.environ["SEEN"]

    @app.train()
    def asked(message, context):
        if not hasattr(os, "noted"):
            os.noted = True
            with open(seen, "a") as stream:
                stream.write(os.environ.get("CUDA_VISIBLE_DEVICES", "all") + "\\n")
        return ray._answered(message, folder)

    return app

ray.on_gpus, ray._client = lambda options: True, client
cli.main()
"""


@pytest.fixture(scope="module", autouse=True)
def _identity() -> Iterator[None]:
    """Flower stamps messages with the process's task, which a run sets."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("_task_id", 1), ("_run_id", 7), ("_node_id", 1)):
            patch.setattr(TaskIdentity, name, value)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> Path:
    """A federation on a tiny model: both phases, clients that sit out, moments kept."""
    folder = tmp_path_factory.mktemp("cluster")
    _write_records(folder / "train.jsonl", 240, seed=1)
    _write_records(folder / "test.jsonl", 60, seed=2)
    (folder / "config.toml").write_text(f"""
        seed = 3
        [model]
        base = "{tiny_bert}"
        max_length = 16
        pooling = "mean"
        [lora]
        rank = 2
        [data]
        train = "{folder}/train.jsonl"
        test = "{folder}/test.jsonl"
        validation = 0.1
        [federation]
        clients = {CLIENTS}
        rounds = 4
        participation = 0.7
        [training]
        sampling_rate = 0.5
        expected_units = 20
        head_rounds = 2
        head_learning_rate = 0.01
        precision = "fp32"
        attention = "eager"
        [privacy]
        mode = "none"
        delta = 1e-3
        [server]
        optimizer = "momentum"
        """)
    return folder


@pytest.fixture(scope="module")
def reference(folder: Path) -> Path:
    """The sequential engine's run."""
    run = begin(load_config(folder / "config.toml"), folder / "reference", cpu())
    finish(run, conduct(run, sequential(run)))
    rounds = _rounds(folder / "reference")
    assert len({line["replies"] for line in rounds}) > 1  # not everybody joins every round
    # and each round moves the model
    assert len({line["loss"] for line in rounds}) == len(rounds) == 4
    return folder / "reference"


@dataclass
class LocalGrid(Grid):
    """Flower's nodes in this process: each message goes straight to the ClientApp."""

    nodes: int
    settings: dict[str, object]
    waiting: dict[str, Message] = field(default_factory=dict)

    def context(self, place: int) -> Context:
        config = {"partition-id": place, "num-partitions": self.nodes}
        return Context(7, place + 100, config, RecordDict(), dict(self.settings))  # type: ignore[arg-type]

    def get_node_ids(self) -> Iterable[int]:
        return range(100, 100 + self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        for message in messages:
            name = f"message-{len(self.waiting)}"
            message.metadata.__dict__["_message_id"] = name
            self.waiting[name] = message
            yield name

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        for name in message_ids:
            message = self.waiting[name]
            yield client_app(message, self.context(message.metadata.dst_node_id - 100))

    def set_run(self, run: FlowerRun) -> None:
        raise NotImplementedError

    @property
    def run(self) -> FlowerRun:
        raise NotImplementedError

    def create_message(self, *args: object, **kwargs: object) -> Message:
        raise NotImplementedError

    def send_and_receive(self, *args: object, **kwargs: object) -> Iterable[Message]:
        raise NotImplementedError


def serve(config: Path, out: Path | str, nodes: int, **settings: object) -> None:
    settings = {
        "config": str(config),
        "out": str(out),
        "set": "",
        "ledger": "",
        "resume": False,
    } | settings
    grid = LocalGrid(nodes, settings)
    server_app(grid, Context(7, 1, {}, RecordDict(), dict(settings)))  # type: ignore[arg-type]


@pytest.mark.parametrize("nodes", [1, 2, CLIENTS, CLIENTS + 2])
def test_any_number_of_nodes(folder: Path, reference: Path, tmp_path: Path, nodes: int) -> None:
    serve(folder / "config.toml", tmp_path / "run-{run}", nodes)
    _assert_same_run(tmp_path / "run-7", reference)


def test_halves_that_move_by_turns_come_back_where_they_belong(
    folder: Path, tmp_path: Path
) -> None:
    settings = load_config(folder / "config.toml", ["lora.variant='rolora'"])
    run = begin(settings, tmp_path / "plain", cpu())
    finish(run, conduct(run, sequential(run)))
    serve(folder / "config.toml", tmp_path / "run", 2, set="lora.variant='rolora'")
    _assert_same_run(tmp_path / "run", tmp_path / "plain")


def test_it_does_not_matter_which_actor_trains_a_client(
    folder: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = ray._answered

    def in_a_new_actor(message: Message, run_folder: Path) -> Message:
        nodes._built.cache_clear()
        return answer(message, run_folder)

    monkeypatch.setattr(ray, "_answered", in_a_new_actor)
    serve(folder / "config.toml", tmp_path, 2)
    _assert_same_run(tmp_path, reference)


def test_two_private_runs_on_one_ledger(folder: Path, tmp_path: Path) -> None:
    shared = tmp_path / "shared.sqlite"
    changes = (
        f"privacy.mode=record federation.participation=1.0 data.validation={folder}/test.jsonl"
    )
    private = {"set": changes, "ledger": str(shared)}
    serve(folder / "config.toml", tmp_path / "first", 2, **private)
    summary = json.loads((tmp_path / "first" / "summary.json").read_text())
    assert 2.9 < summary["epsilon"] <= 3.0
    assert set(summary["epsilon_by_client"]) == {f"client-{number}" for number in range(CLIENTS)}
    ledger = Paths.of(tmp_path / "first", shared).open_ledger()
    assert sum(entry.body["kind"] == "commit" for entry in ledger.entries()) == 4 * CLIENTS
    ledger.close()
    with pytest.raises(Refused, match="budget population"):
        serve(folder / "config.toml", tmp_path / "second", 2, **private)
    assert not (tmp_path / "second" / "summary.json").exists()


def test_resume_goes_on_after_the_last_commit(
    folder: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(number: int, figures: object) -> None:
        if number == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ray, "_print_round", interrupt)
        serve(folder / "config.toml", tmp_path, 2)
    serve(folder / "config.toml", tmp_path, 2, resume=True)
    _assert_same_run(tmp_path, reference)


def test_nodes_answer_for_the_run_in_their_folder_only(folder: Path, tmp_path: Path) -> None:
    serve(folder / "config.toml", tmp_path, 2, set="federation.rounds=1 training.head_rounds=0")
    run = begin(load_config(tmp_path / "config.toml"), tmp_path, cpu(resume=True))
    identity = Identity.generate()
    shared = Shared.of(run, identity.public)
    shared.write(tmp_path)
    state = run.checkpoint.load().state
    plans = [
        Signed.by(identity, PLAN_TAG, RoundPlan(digest, 0, 1, 1, state.digest).to_bytes())
        for digest in (run.manifest.digest, "sha256:other")
    ]

    def said(name: str, plan: Signed) -> Reply:
        request = request_to_bytes(Task(run.manifest.digest, plan, vector_to_bytes(state.vector)))
        carrier = GridCarrier(LocalGrid(2, {"out": str(tmp_path)}), lambda: {name: 100})
        ((_, reply),) = carrier.ask({name: request}, 10)
        assert isinstance(reply, bytes)
        members = {name: shared.identity(name).public}
        return reply_from_bytes(reply, run.manifest.federation, members)

    def declined(name: str, reason: str, refused: bool) -> Decline:
        return Decline(name, "", 0, 0, reason, refused)

    own, other = plans
    assert said("client-0", other) == declined(
        "client-0", "plan manifest: found sha256:other, which was not consented to", True
    )
    assert said("nobody", own) == declined(
        "nobody", "plan client: found nobody, which is not in this federation", False
    )
    forged = Signed.by(Identity.generate(), PLAN_TAG, own.body)
    reply = said("client-0", forged)
    assert isinstance(reply, Decline) and "found the key" in reply.reason and reply.refused
    assert isinstance(said("client-0", own), Answer)


@pytest.mark.flower
def test_ray_equals_the_sequential_engine_under_masks(folder: Path, tmp_path: Path) -> None:
    """On a cluster of two machines, both of them this one; in clear, `flwr run` below shows it.

    Each is said to have a GPU, and the run is made to believe that it computes there.
    """
    found, changes = tmp_path / "ray", ["aggregation.secure=true", "federation.participation=1.0"]
    changes += ["evaluation.hold_out=0.3"]
    run = begin(load_config(folder / "config.toml", changes), tmp_path / "sequential", cpu())
    finish(run, conduct(run, sequential(run)))
    options = [word for change in changes for word in ("--set", change)]
    command = [sys.executable, "-c", ON_GPUS, "run", str(folder / "config.toml")]
    with ray_cluster(tmp_path) as address:
        subprocess.run(
            [*command, "--engine", "ray", "--out", found, *options],
            check=True,
            timeout=PATIENCE,
            env=_environment(tmp_path) | {"RAY_ADDRESS": address, "SEEN": str(tmp_path / "seen")},
        )
        actors = "[a['Address']['NodeID'] for a in ray._private.state.actors().values()]"
        assert len(set(_told_by_ray(address, actors))) == 2
    assert sorted((tmp_path / "seen").read_text().split()) == ["0", "0"]  # one each, no other
    _assert_same_run(found, tmp_path / "sequential")
    summary = json.loads((found / "summary.json").read_text())
    assert summary["engine"] == "ray" and summary["secure"]["sums"] == 4 + 1  # hold-outs' counts
    alone = json.loads((tmp_path / "sequential" / "summary.json").read_text())
    told, same = (each["evaluation"]["together"] for each in (summary, alone))
    assert told["units"] == pytest.approx(same["units"], abs=0.01) and 40 < told["units"] < 90
    assert told["accuracy"] == pytest.approx(same["accuracy"], abs=0.02)


@pytest.mark.flower
def test_flwr_run_equals_the_sequential_engine(
    folder: Path, reference: Path, tmp_path: Path
) -> None:
    """`flwr run .` from the checkout, with Flower's own defaults: two nodes for five clients."""
    settings = f'config="{folder}/config.toml" out="{tmp_path}/run"'
    with superlink(tmp_path) as environment:
        status = _flwr_run(settings, environment)
        assert status["status"] == "finished:completed", status
    _assert_same_run(tmp_path / "run", reference)


@contextmanager
def ray_cluster(home: Path) -> Iterator[str]:
    """The address of two Ray nodes with one processor and, as they say, one GPU each."""
    port, started = _free_port(), []
    address = f"127.0.0.1:{port}"
    ours = [
        "--num-cpus",
        "1",
        "--num-gpus",
        "1",
        "--disable-usage-stats",
        "--block",
        "--node-ip-address",
        "127.0.0.1",
    ]
    head = ["--head", "--port", str(port), "--include-dashboard", "false"]
    # sockets lie below, and their paths may have 107 characters
    with tempfile.TemporaryDirectory(prefix="ray") as folder, (home / "ray.log").open("wb") as log:
        try:
            for more in ([*head, "--temp-dir", folder], ["--address", address]):
                command = ["ray", "start", *ours, *more]
                started.append(
                    subprocess.Popen(
                        command,
                        env=_environment(home),
                        stdout=log,
                        stderr=log,
                        start_new_session=True,
                    )
                )
                _wait_until(partial(_listens, port))
            _wait_until(lambda: _told_by_ray(address, "len(ray.nodes())") == 2)
            yield address
        finally:
            for process in reversed(started):
                process.send_signal(signal.SIGTERM)  # it ends what it started
            for process in started:
                process.wait(timeout=60)


@contextmanager
def superlink(home: Path) -> Iterator[dict[str, str]]:
    """Flower's SuperLink with its simulation runtime, and the environment that `flwr` needs."""
    environment = _environment(home)
    port = _free_port()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "test"\n[superlink.test]\naddress = "127.0.0.1:{port}"\ninsecure ='
        " true\n"
    )
    command = [
        "flower-superlink",
        "--insecure",
        "--simulation",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    with (home / "superlink.log").open("wb") as log:
        process = subprocess.Popen(
            command, env=environment, cwd=home, stdout=log, stderr=log, start_new_session=True
        )
        try:
            _wait_for(port)
            yield environment
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(timeout=60)


def _flwr_run(settings: str, environment: dict[str, str]) -> dict[str, str]:
    """Run to the end, and return its line of `flwr ls`, which alone says if it failed."""

    def flwr(*arguments: str) -> Any:
        done = subprocess.run(
            ["flwr", *arguments, "--format", "json"],
            check=True, capture_output=True, text=True, timeout=PATIENCE, cwd=ROOT, env=environment,
        )  # fmt: skip
        return json.loads(done.stdout[done.stdout.index("{") :])

    started = flwr("run", ".", "--run-config", settings)
    give_up = time.monotonic() + PATIENCE
    while time.monotonic() < give_up:
        (line,) = [run for run in flwr("ls")["runs"] if run["run-id"] == started["run-id"]]
        if line["status"].startswith("finished"):
            return dict(line)
        time.sleep(1)
    raise TimeoutError(f"flwr run: {line}")


def _environment(home: Path) -> dict[str, str]:
    """Flower with a home of its own, no calls outside, and this interpreter's scripts first."""
    scripts = str(Path(sys.executable).parent)
    return os.environ | {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",  # its own default waits for whatever else runs here
        "PATH": scripts + os.pathsep + os.environ["PATH"],
    }


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _wait_for(port: int) -> None:
    give_up = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
            return
        except OSError:
            if time.monotonic() > give_up:
                raise
            time.sleep(0.2)


def _wait_until(is_so: Callable[[], bool]) -> None:
    give_up = time.monotonic() + 90
    while not is_so():
        assert time.monotonic() < give_up
        time.sleep(0.2)


def _listens(port: int) -> bool:
    with socket.socket() as asking:
        return asking.connect_ex(("127.0.0.1", port)) == 0


def _told_by_ray(address: str, asked: str) -> Any:
    """An expression's value, in a process of its own that knows the cluster."""
    code = (
        "import json, ray, ray._private.state;"
        f"ray.init(address={address!r}, logging_level='ERROR', log_to_driver=False);"
        f"print(json.dumps({asked}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=90)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def _assert_same_run(found: Path, expected: Path) -> None:
    """Adapter and head to 1e-5, and the same clients in every round."""
    weights, reference = _weights(found), _weights(expected)
    assert weights.keys() == reference.keys()
    for name, value in reference.items():
        np.testing.assert_allclose(weights[name], value, rtol=0, atol=1e-5, err_msg=name)
    rounds, same = _rounds(found), _rounds(expected)
    assert [line["replies"] for line in rounds] == [line["replies"] for line in same]
    assert not any(line["failures"] for line in rounds)
    for line, other in zip(rounds, same, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], abs=1e-4)


def _weights(run: Path) -> dict[str, Vector]:
    files = sorted((run / "adapter").glob("*.safetensors"))
    return {
        f"{file.name} {name}": value for file in files for name, value in load_file(file).items()
    }


def _rounds(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def _write_records(path: Path, count: int, seed: int) -> None:
    draw = random.Random(seed)
    lines = []
    for _ in range(count):
        label = draw.randrange(3)
        own = range(20 * label, 20 * label + 20)
        words = [
            f"w{draw.choice(own) if draw.random() < 0.5 else draw.randrange(60)}"
            for _ in range(draw.randint(3, 12))
        ]
        lines.append(json.dumps({"text": " ".join(words), "label": f"class {label}"}))
    path.write_text("\n".join(lines) + "\n")
