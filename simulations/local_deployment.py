"""A federation on one machine as between many: coordinator, three institutions, real processes.

Everything goes through the installed commands: a coordinator's folder, enrolment, TLS and node
authentication, three trainers, three relays with their SuperNodes, SuperLink; five rounds with
privacy on; the export, verified.

    python simulations/local_deployment.py [--out runs/federation] [--rounds 5] [--secure]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from fedlora.common.errors import FedloraError
from fedlora.common.model.base import base_digest, resolve_base
from fedlora.common.privacy.modes import guarantee_named
from fedlora.simulations.federation.corpus import CLASSES, generate
from fedlora.simulations.processes import (
    BIN,
    family,
    free_port,
    listens,
    run,
    signal_group,
    wait_until,
)

NAMES = ("hospital", "bank", "university")
STOP_SECONDS = 60.0

TRAINING = """\
# Written by `make federation`: the embedded corpus, three of its institutions.
seed = 7
[model]
base = "{base}"
digest = "{digest}"
max_length = 48
pooling = "mean"
[lora]
rank = 4
targets = ["query", "value"]
layers = {layers}
[data]
test = "{test}"
validation = "{validation}"
label = "label"
labels = {labels}
[federation]
clients = {clients}
rounds = {rounds}
spare_rounds = {spare}
quorum = {quorum}
deadline = {deadline}
[training]
steps = 1
sampling_rate = 0.1
expected_units = 80
optimizer = "sgd"
learning_rate = 1.0
micro_batch_tokens = 2048
[privacy]
mode = "{mode}"
epsilon = 3.0
delta = 1e-5
clip = 1.0
[aggregation]
minimum_cohort = 3
secure = {secure}
[server]
optimizer = "momentum"
learning_rate = 1.0
"""

POLICY = """\
institution = "{name}"

[budgets.messages]
epsilon = {cap}
delta = 1e-4

[data.messages]
path = "data/messages.jsonl"
budget = "messages"
labels = {labels}

[bases]
"{digest}" = "{base}"

[limits]
minimum_cohort = 3
rounds = 100
attempts = 200
noise_multiplier = 0.3
delta = 1e-5
client_level = {client_level}

[trainer]
threads = 1
"""


@dataclass(eq=False)
class Federation:
    """The processes of one federation under `root`; `deadline` in seconds, of a round."""

    root: Path
    rounds: int = 5
    spare: int = 3
    quorum: float = 1.0
    deadline: float = 120.0
    base: str = "minilm"
    layers: str = "[5]"
    secure: bool = False  # updates leave under masks
    mode: str = "record"  # "client": privacy of whole institutions
    names: tuple[str, ...] = NAMES  # "bank-2" has the records of "bank"
    # words before a process's own, by its name: to watch it
    prefix: Callable[[str], Sequence[str]] = lambda name: ()
    port: int = field(default_factory=lambda: free_port())
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def coordinator(self) -> Path:
        return self.root / "coordinator"

    def node(self, name: str) -> Path:
        return self.root / name

    def relay(self, name: str) -> Path:
        """All that an institution's relay needs."""
        return self.node(name) / "relay"

    def door(self, name: str) -> Path:
        """The socket of an institution's trainer."""
        return self.node(name) / "trainer.sock"

    def prepare(self) -> None:
        """Folders, keys, data, policies; every institution enrolled and joined."""
        self.root.mkdir(parents=True)
        # no proxy on one machine
        ports = ("--port", str(self.port), "--superlink-port", str(self.port))
        where = ("--federation", "demo", "--host", "127.0.0.1")
        run("fedlora-server", "init", str(self.coordinator), *where, *ports)
        digest = base_digest(resolve_base(self.base))
        labels = json.dumps(list(CLASSES))
        corpus = generate(7)
        public = self.root / "public"
        public.mkdir()
        middle = len(corpus.test) // 2
        write_records(public / "validation.jsonl", corpus.test[:middle])
        write_records(public / "test.jsonl", corpus.test[middle:])
        values = {
            "digest": digest,
            "labels": labels,
            "rounds": self.rounds,
            "spare": self.spare,
        } | {"base": self.base, "layers": self.layers}
        (self.root / "training.toml").write_text(
            TRAINING.format(
                test=public / "test.jsonl",
                validation=public / "validation.jsonl",
                quorum=self.quorum,
                deadline=self.deadline,
                clients=len(self.names),
                secure=str(self.secure).lower(),
                mode=self.mode,
                **values,
            ),
            encoding="utf-8",
        )
        for name in self.names:
            kind = name.partition("-")[0]
            self._found(
                name, digest, labels, [each for each in corpus.train if each["institution"] == kind]
            )
        for name in self.names:
            for other in self.names:
                if other != name:
                    request = str(self.node(other) / "enrolment.json")
                    run(
                        "fedlora-node", "join", request, "--approve", "--node", str(self.node(name))
                    )

    def _found(self, name: str, digest: str, labels: str, records: list[dict[str, str]]) -> None:
        folder = self.node(name)
        run("fedlora-node", "init", name, "--organisation", f"The {name}", "--node", str(folder))
        policy, shared = folder / "node.toml", guarantee_named(self.mode).needs_masks
        policy.write_text(POLICY.format(
            name=name, base=self.base, digest=digest, labels=labels,
            cap=30.0 if shared else 8.0,
            client_level=str(shared).lower(),
        ), encoding="utf-8")  # fmt: skip
        policy.chmod(0o600)
        write_records(folder / "data" / "messages.jsonl", records)
        request, where = str(folder / "enrolment.json"), str(self.coordinator)
        run("fedlora-server", "enrol", request, "--yes", "--dir", where)
        invitation = str(self.coordinator / "invitation.json")
        run("fedlora-node", "join", invitation, "--node", str(folder))

    def start_trainer(self, name: str) -> None:
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
        where = ["--relay", str(self.relay(name)), "--trainer", f"unix:{self.door(name)}"]
        command = ["link", *where, "--port", str(free_port())]
        self._start(f"relay {name}", "fedlora-node", *command)

    def start_server(self, resume: bool = False) -> None:
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

    def last_run(self) -> Path:
        return sorted((self.coordinator / "runs").iterdir(), key=lambda each: int(each.name))[-1]

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


def write_records(path: Path, records: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="A federation of processes on this machine.")
    parser.add_argument("--out", type=Path, default=Path("runs/federation"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--secure", action="store_true", help="updates leave under the masks of secure aggregation"
    )
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    if out.exists() and not (out / "coordinator").is_dir():
        sys.exit(f"{out}: found another folder, expected none or an earlier federation")
    shutil.rmtree(out, ignore_errors=True)
    federation = Federation(out, rounds=arguments.rounds, secure=arguments.secure)
    print("enrolling three institutions", flush=True)
    federation.prepare()
    print("starting trainers, SuperLink and relays", flush=True)
    with running(federation):
        code = federation.wait(1800)
    if code:
        sys.exit(f"the server ended with {code}; {out / 'logs'} says why")
    conclude(federation)


def conclude(federation: Federation) -> None:
    """Export, verify, load; summary.json and the coordinator's public key beside the export."""
    out, folder = federation.root, federation.last_run()
    export = out / "export"
    run("fedlora-server", "export", str(export), "--dir", str(federation.coordinator))
    shutil.copy(folder / "summary.json", out / "summary.json")
    shutil.copy(federation.coordinator / "coordinator.pub", out / "coordinator.pub")
    print(
        run("fedlora-server", "verify", str(export), "--key", str(out / "coordinator.pub")).strip()
    )
    lines = [
        json.loads(line)
        for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    for line in lines:
        print(
            f"round {line['round']}: {line['seconds']:.1f} s, accuracy"
            f" {line.get('accuracy', 0):.3f}"
        )
    print(f"accuracy {summary['accuracy']:.3f} at ε = {summary['epsilon']:.3f}; export in {export}")


if __name__ == "__main__":
    main()
