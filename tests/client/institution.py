"""A coordinator's key, a node's folder and a Work without torch, shared by the node's tests."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from fedlora.client.node import enrolment
from fedlora.client.node.folder import NodeFolder
from fedlora.client.node.policy import Policy
from fedlora.client.service.answer import Resident
from fedlora.client.service.work import Work
from fedlora.common.codec.strict import digest_of
from fedlora.common.config.schema import LoraConfig, ModelConfig
from fedlora.common.ledger.ledger import Budget, Ledger
from fedlora.common.ledger.subject import Subject
from fedlora.common.manifest.manifest import Network, Phase, RunManifest
from fedlora.common.manifest.plan import Delta, RoundPlan
from fedlora.common.model.state import AdapterSpec, TensorSpec
from fedlora.common.privacy.modes import guarantee_of
from fedlora.common.protocol.consent import Party, Start
from fedlora.common.protocol.messages import (
    MANIFEST_TAG,
    OFFER_TAG,
    PLAN_TAG,
    START_TAG,
    Address,
    Consent,
    Decline,
    Offer,
    Reply,
    SignedStart,
    Started,
    Task,
    reply_from_bytes,
    request_to_bytes,
)
from fedlora.common.trust.enrolment import Invitation, invitation_to_text
from fedlora.common.trust.identity import Identity, Signed

LORA = LoraConfig(rank=2, targets=("query", "value"))

BASE = "sha256:" + "b" * 64
PHASE = Phase("adapter", 3, 4, 2, 0.05, 4.0, 3.0, 1.0, 0.0, "sgd", 0.01, True, 0.0)
COORDINATOR = Identity.generate()
ADAPTER = b"\x00" * 8
ADAPTER_SPEC = AdapterSpec((TensorSpec("lora.a", (2,)),))

POLICY = """\
institution = "north"
[budgets.people]
epsilon = 2.0
delta = 1e-4
[data.notes]
path = "notes.jsonl"
budget = "people"
labels = ["a", "b"]
[bases]
"{base}" = "{folder}"
[limits]
minimum_cohort = 3
rounds = 10
attempts = 20
delta = 1e-4
noise_multiplier = 0.6
"""


def certificate() -> str:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "ca")])
    now = datetime.now(UTC)
    built = x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + timedelta(days=1))
    return built.sign(key, SHA256()).public_bytes(Encoding.PEM).decode()


CERTIFICATE = certificate()


def manifest_of(*phases: Phase, **changes: object) -> RunManifest:
    made = RunManifest(
        federation="f", run="1", task="sequence-classification", labels=("a", "b"),
        base_digest=BASE, spec_digest="s", projection_digest="", max_length=16, mode="record",
        unit="", epsilon=1.0, delta=1e-5, strategy="fedavg", participation=1.0, minimum_cohort=3,
        seed=5, network=Network.of(ModelConfig(pooling="mean"), LORA),
        phases=phases or (PHASE,),
    )  # fmt: skip
    return replace(made, **changes)  # type: ignore[arg-type]


def offer_of(
    manifest: RunManifest, key: Identity = COORDINATOR, projection: bytes = b"",
    to: str = "north", seconds: float = 3600, digest: str = "",
) -> bytes:  # fmt: skip
    """An offer good for `seconds`, whose address names `to` and `digest`, or the manifest's."""
    address = Address(digest or manifest.digest, to, int(time.time() + seconds))
    signed = Signed.by(key, MANIFEST_TAG, manifest.to_bytes())
    return request_to_bytes(
        Offer(signed, projection, Signed.by(key, OFFER_TAG, address.to_bytes()))
    )


def start_of(
    manifest: RunManifest, consents: Mapping[str, bytes], key: Identity = COORDINATOR
) -> bytes:
    """The start of a run with these signed consents, by institution."""
    parties = tuple(Party(name, digest_of(data)) for name, data in sorted(consents.items()))
    body = Start(manifest.digest, parties).to_bytes()
    return request_to_bytes(SignedStart(Signed.by(key, START_TAG, body)))


OTHERS = {"others-1": b"1", "others-2": b"2"}  # a cohort's, whose consents a node can't check


def task_of(
    manifest: RunManifest, round_: int = 1, attempt: int = 1, adapter: str = "sha256:a",
    key: Identity = COORDINATOR, vector: bytes = ADAPTER, phase: int | None = None,
) -> bytes:  # fmt: skip
    index = manifest.phase_of(round_) if phase is None else phase
    plan = RoundPlan(manifest.digest, index, round_, attempt, adapter)
    return request_to_bytes(
        Task(manifest.digest, Signed.by(key, PLAN_TAG, plan.to_bytes()), vector)
    )


def nothing() -> None:
    return


@dataclass
class FakeWork:
    """Keeps to the ledger as a trainer does, and counts what it trains; no torch, no data."""

    ledger: Ledger
    trained: list[RoundPlan] = field(default_factory=list)
    during: Callable[[], None] = nothing
    adapter: AdapterSpec = ADAPTER_SPEC
    update: bytes = b""  # what it answers; empty: a number that counts its trainings
    step: Delta | None = None  # in its place: a sum of units, in float64
    turn: threading.Lock = field(default_factory=threading.Lock)

    def adopt(self, policy: Policy) -> None:
        pass

    def check(self, manifest: RunManifest, projection: Path, budget: Budget) -> None:
        if manifest.mode != "none":
            self.ledger.check(budget.name, Subject.of(manifest))

    def consent(self, manifest: RunManifest, projection: Path, budget: Budget) -> str:
        if manifest.mode != "none":
            attempts = [phase.attempts for phase in manifest.phases]
            cost, subject = guarantee_of(manifest).charge(), Subject.of(manifest)
            self.ledger.consent(budget, manifest.digest, cost, attempts, subject)
        return "sha256:data"

    def spec(self, manifest: RunManifest, projection: Path) -> AdapterSpec:
        return self.adapter

    def train(
        self,
        manifest: RunManifest,
        projection: Path,
        budget: Budget,
        plan: RoundPlan,
        vector: bytes | memoryview,
    ) -> tuple[Delta, str]:
        place = (budget.name, plan.manifest)
        if manifest.mode != "none":
            self.ledger.reserve(*place, plan.phase, plan.round, plan.attempt)
        self.trained.append(plan)
        self.during()
        if manifest.mode != "none":
            self.ledger.commit(*place, plan.round, plan.attempt, "sha256:u")
        update = self.update or len(self.trained).to_bytes(8, "little")
        delta = np.frombuffer(update, dtype="<f4") if self.step is None else self.step
        return delta, "sha256:data"


@dataclass
class Institution:
    """A joined node in `root`; `restart` is a new process on the same disk."""

    root: Path
    name: str = "north"
    organisation: str = "Nord Klinik"
    federation: str = "f"
    resident: Resident = field(init=False)
    work: FakeWork = field(init=False)
    ledger: Ledger = field(init=False)

    def __post_init__(self) -> None:
        self.folder = NodeFolder(self.root)
        if not self.folder.identity.exists():
            enrolment.init(self.folder, self.name, self.organisation)
            self.set_policy(
                POLICY.format(base=BASE, folder="base").replace('"north"', f'"{self.name}"')
            )
            invitation = Invitation(
                self.federation, "127.0.0.1:9092", CERTIFICATE, COORDINATOR.public
            )
            enrolment.join(self.folder, invitation_to_text(COORDINATOR, invitation), "invitation")
        self.restart()

    def set_policy(self, text: str) -> None:
        self.folder.policy.write_text(text)
        self.folder.policy.chmod(0o600)

    def restart(self, work: Work | None = None) -> None:
        policy = self.folder.load_policy()
        self.identity = Identity.load(self.folder.identity)
        self.ledger = self.folder.open_ledger(policy)
        self.work = FakeWork(self.ledger)
        self.resident = Resident(self.folder, policy, self.identity, self.ledger, work or self.work)

    def ask(self, data: bytes) -> Reply:
        return self.read(self.resident.ask(data))

    def begin(self, manifest: RunManifest) -> Started:
        """Offered, consented to and started, with two institutions that nobody knows."""
        started = self.offered(manifest)
        assert isinstance(started, Started), started
        return started

    def offered(self, manifest: RunManifest) -> Reply:
        """As `begin`; or where it is declined."""
        consent = self.resident.ask(offer_of(manifest, to=self.name))
        if not isinstance(self.read(consent), Consent):
            return self.read(consent)
        return self.ask(start_of(manifest, {self.name: consent, **OTHERS}))

    def read(self, data: bytes) -> Reply:
        return reply_from_bytes(data, self.federation, {self.name: self.identity.public})


def declined(north: Institution, data: bytes) -> Decline:
    """Its refusal of a request, which lies in a log too."""
    reply = north.ask(data)
    assert isinstance(reply, Decline), reply
    log = north.folder.refusals if reply.manifest else north.folder.strangers
    assert reply.reason in [json.loads(line)["reason"] for line in log.read_text().splitlines()]
    return reply
