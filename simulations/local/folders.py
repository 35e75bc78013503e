"""The folders of a federation on one machine, made with the commands that institutions use.

A coordinator, and institutions that enrolled with it and approved each other, each with a policy
and its share of the embedded corpus.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from fedlora.common.model.base import base_digest, resolve_base
from fedlora.common.privacy.modes import guarantee_named
from fedlora.simulations.federation.corpus import CLASSES, Corpus, generate, write_records
from fedlora.simulations.local.processes import free_port, run

NAMES = ("hospital", "bank", "university")
LABELS = json.dumps(list(CLASSES))

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
head_rounds = 0
steps = 1
sampling_rate = 0.1
expected_units = 80
optimizer = "sgd"
learning_rate = 1.0
micro_batch_tokens = 2048
[privacy]
mode = "{mode}"
noise = "{noise}"
epsilon = 3.0
delta = 1e-5
clip = 1.0
[aggregation]
minimum_cohort = 3
secure = {secure}
[server]
optimizer = "momentum"
learning_rate = 1.0
decay = "none"
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
shared_noise = {shared_noise}

[trainer]
threads = 1
answer_every = 0.5
"""


@dataclass(eq=False)
class Folders:
    """What a federation under `root` is made of; `deadline` in seconds, of a round."""

    root: Path
    rounds: int = 5
    spare: int = 3
    quorum: float = 1.0
    deadline: float = 120.0
    base: str = "minilm"
    layers: str = "[5]"
    secure: bool = False  # updates leave under masks
    mode: str = "record"  # "client": privacy of whole institutions
    noise: str = "own"  # "shared": of records, under masks
    names: tuple[str, ...] = NAMES  # "bank-2" has the records of "bank"
    port: int = field(default_factory=lambda: free_port())

    @property
    def coordinator(self) -> Path:
        """The coordinator's folder."""
        return self.root / "coordinator"

    def node(self, name: str) -> Path:
        """An institution's folder."""
        return self.root / name

    def relay(self, name: str) -> Path:
        """All that an institution's relay needs."""
        return self.node(name) / "relay"

    def door(self, name: str) -> Path:
        """The socket of an institution's trainer."""
        return self.node(name) / "trainer.sock"

    def last_run(self) -> Path:
        """The folder of the coordinator's latest run."""
        return max((self.coordinator / "runs").iterdir(), key=lambda each: int(each.name))

    def prepare(self) -> None:
        """Folders, keys, data, policies; every institution enrolled and joined."""
        self.root.mkdir(parents=True)
        # no proxy on one machine
        ports = ("--port", str(self.port), "--superlink-port", str(self.port))
        where = ("--federation", "demo", "--host", "127.0.0.1")
        run("fedlora-server", "init", str(self.coordinator), *where, *ports)
        digest, corpus = base_digest(resolve_base(self.base)), generate(7)
        self._write_training(digest, corpus)
        for name in self.names:
            kind = name.partition("-")[0]
            self._enrol(
                name, digest, [each for each in corpus.train if each["institution"] == kind]
            )
        for name in self.names:
            for other in self.names:
                if other != name:
                    request, node = self.node(other) / "enrolment.json", self.node(name)
                    run("fedlora-node", "join", str(request), "--approve", "--node", str(node))

    def _write_training(self, digest: str, corpus: Corpus) -> None:
        """The coordinator's public files, and the configuration of its run."""
        public, middle = self.root / "public", len(corpus.test) // 2
        write_records(public / "validation.jsonl", corpus.test[:middle])
        write_records(public / "test.jsonl", corpus.test[middle:])
        filled = TRAINING.format(
            base=self.base,
            digest=digest,
            layers=self.layers,
            test=public / "test.jsonl",
            validation=public / "validation.jsonl",
            labels=LABELS,
            clients=len(self.names),
            rounds=self.rounds,
            spare=self.spare,
            quorum=self.quorum,
            deadline=self.deadline,
            mode=self.mode,
            noise=self.noise,
            secure=str(self.secure).lower(),
        )
        (self.root / "training.toml").write_text(filled, encoding="utf-8")

    def _enrol(self, name: str, digest: str, records: list[dict[str, str]]) -> None:
        folder = self.node(name)
        run("fedlora-node", "init", name, "--organisation", f"The {name}", "--node", str(folder))
        policy, shared = folder / "node.toml", guarantee_named(self.mode).needs_masks
        filled = POLICY.format(
            name=name,
            base=self.base,
            digest=digest,
            labels=LABELS,
            cap=30.0 if shared else 8.0,
            client_level=str(shared).lower(),
            shared_noise=str(self.noise == "shared").lower(),
        )
        policy.write_text(filled, encoding="utf-8")
        policy.chmod(0o600)
        write_records(folder / "data" / "messages.jsonl", records)
        request, where = str(folder / "enrolment.json"), str(self.coordinator)
        run("fedlora-server", "enrol", request, "--yes", "--dir", where)
        invitation = str(self.coordinator / "invitation.json")
        run("fedlora-node", "join", invitation, "--node", str(folder))
