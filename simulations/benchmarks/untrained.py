"""An institution and a coordinator whose step is left out: all that carries bytes is the product's.

The trainer checks the adapter that came against its plan, and answers with drawn numbers. The
server's process asks it for one round in place of a run, by the product's own loop and checkpoint,
and finds these numbers in the next adapter.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedlora.client.node.enrolment import only_trainer
from fedlora.client.node.folder import NodeFolder
from fedlora.client.node.policy import Policy
from fedlora.client.service import endpoint
from fedlora.client.service.answer import Resident
from fedlora.client.service.work import Work
from fedlora.common.codec.strict import digest_of
from fedlora.common.disk.mapped import let_go
from fedlora.common.errors import BadInput, FedloraError
from fedlora.common.ledger.ledger import Budget
from fedlora.common.manifest.manifest import RunManifest
from fedlora.common.manifest.plan import Delta, RoundPlan
from fedlora.common.model.state import AdapterSpec, AdapterState, TensorSpec, Vector
from fedlora.common.protocol.consent import Party, Start
from fedlora.common.protocol.messages import (
    MANIFEST_TAG,
    OFFER_TAG,
    START_TAG,
    Address,
    Offer,
    SignedStart,
    Started,
    request_to_bytes,
)
from fedlora.common.protocol.vectors import vector_from_bytes
from fedlora.common.trust.identity import Identity, PublicIdentity, Signed
from fedlora.server.coordinator.coordinator import Coordinator
from fedlora.server.deployment import flower, serve
from fedlora.server.deployment.cohorts import ClearCohort
from fedlora.server.deployment.institutions import Carrier, Institutions
from fedlora.server.rounds.checkpoint import Checkpoint, Progress
from fedlora.server.rounds.cohort import Failure
from fedlora.server.rounds.loop import Around, RoundRecord, Rules, run_rounds
from fedlora.server.strategies.fedavg import FedAvg, ServerOptimizer
from fedlora.server.strategies.strategy import ServerState
from fedlora.simulations.local.processes import wait_until

NAME = "hospital"
SECONDS = 3600.0  # of the round, at most
BLOCK = 1 << 22  # coordinates that are drawn at once
ASKED, FOUND = "asked.json", "found.json"


def spec_of(size: int) -> AdapterSpec:
    """One tensor of as many coordinates."""
    return AdapterSpec((TensorSpec("lora.a", (size,)),))


def drawn(size: int, seed: int) -> Vector:
    """(size,) float32, the same for a seed."""
    vector, source = np.empty(size, dtype=np.float32), np.random.default_rng(seed)
    for start in range(0, size, BLOCK):
        part = vector[start : start + BLOCK]
        source.standard_normal(out=part, dtype=np.float32)
    return vector


@dataclass(frozen=True)
class Untrained(Work):
    """Checks the adapter as a trainer does, and answers with drawn numbers."""

    size: int

    def adopt(self, policy: Policy) -> None:
        """Nothing was loaded."""

    def check(self, manifest: RunManifest, projection: Path, budget: Budget) -> None:
        """There are no data."""

    def consent(self, manifest: RunManifest, projection: Path, budget: Budget) -> str:
        """Nothing is charged for a run without privacy."""
        return "sha256:none"

    def spec(self, manifest: RunManifest, projection: Path) -> AdapterSpec:
        """One tensor."""
        return spec_of(self.size)

    def train(
        self,
        manifest: RunManifest,
        projection: Path,
        budget: Budget,
        plan: RoundPlan,
        vector: bytes | memoryview,
    ) -> tuple[Delta, str]:
        """BadInput where the adapter is another than the plan's."""
        state = AdapterState(spec_of(self.size), vector_from_bytes(vector, self.size, "task"))
        if state.digest != plan.adapter:
            raise BadInput(f"plan adapter: found {state.digest}, expected {plan.adapter}")
        return drawn(self.size, plan.attempt), "sha256:none"


class Alone(Institutions):
    """One institution, started in the company of two that nobody asks."""

    def gather(self) -> Mapping[str, PublicIdentity]:
        """It consents and starts here, as it would in company."""
        self._began = time.monotonic()
        wait_until(lambda: NAME in self.carrier.online(), "the SuperNode")
        signer, until = self.coordinator.identity, int(time.time()) + 3600
        manifest = Signed.by(signer, MANIFEST_TAG, self.manifest.to_bytes())
        address = Address(self.manifest.digest, NAME, until).to_bytes()
        consent = self._said(Offer(manifest, b"", Signed.by(signer, OFFER_TAG, address)))
        parties = {"others-1": b"1", "others-2": b"2", NAME: consent}
        cohort = tuple(Party(name, digest_of(said)) for name, said in sorted(parties.items()))
        start = self.folder / "start.signed"
        if not start.exists():  # another one would be refused
            body = Start(self.manifest.digest, cohort).to_bytes()
            start.write_bytes(Signed.by(signer, START_TAG, body).to_bytes())
        members = self.coordinator.members()
        said = self._said(SignedStart(Signed.from_bytes(start.read_bytes())))
        reply = self.opened(NAME, said, members)
        if not isinstance(reply, Started):
            raise FedloraError(f"{NAME}: found {reply}, expected a start")
        return members

    def _said(self, request: Offer | SignedStart) -> bytes:
        ((_, answer),) = self.carrier.ask({NAME: request_to_bytes(request)}, 60.0)
        if isinstance(answer, Failure):
            raise FedloraError(f"{NAME}: {answer.reason}")
        return answer

    def asked(
        self, members: Mapping[str, PublicIdentity], plan: RoundPlan
    ) -> tuple[list[str], list[Failure]]:
        """The one."""
        return [NAME], []


def one_round(folder: Path, coordinator: Coordinator, carrier: Carrier) -> None:
    """What the server's process does in place of a run: a round; what came of it is a file."""
    asked = json.loads((folder / ASKED).read_text(encoding="utf-8"))
    manifest, place = RunManifest.from_bytes((folder / "manifest.json").read_bytes()), folder / "c"
    spec = spec_of(asked["size"])
    if not (place / "manifest.json").exists():
        Checkpoint.create(place, manifest, AdapterState(spec, drawn(asked["size"], 0)))
    who = Alone(manifest, coordinator, carrier, folder, SECONDS, 1.0)
    strategy = FedAvg(ServerOptimizer(asked["optimizer"], 1.0, 0.9, 0.99))
    seen, began = list[RoundRecord](), time.monotonic()
    progress = run_rounds(
        Checkpoint.open(place, spec), ClearCohort(who), [strategy], Rules(),
        lambda state, phase: {}, lambda record, _: seen.append(record),
        Around(unfinished=who.unfinished),
    )  # fmt: skip
    seconds = time.monotonic() - began
    table = {"seconds": seconds, "replies": seen[0].replies, "off": _off(progress, strategy)}
    (folder / FOUND).write_text(json.dumps(table), encoding="utf-8")


def _off(progress: Progress, strategy: FedAvg) -> float:
    """By how much the next adapter is off at most, where the same step is done in memory."""
    before, update, off = np.random.default_rng(0), np.random.default_rng(1), 0.0
    for start in range(0, progress.state.spec.size, BLOCK):
        found = progress.state.vector[start : start + BLOCK]
        state = AdapterState(spec_of(len(found)), before.standard_normal(len(found), np.float32))
        mean = update.standard_normal(len(found), np.float32).astype(np.float64)
        expected, _ = strategy.apply(state, ServerState(), mean)
        off = max(off, float(np.abs(found - expected.vector).max()))
        let_go(found)
    return off


server_app = flower.server_app  # Flower looks for it in a module's own text
serve.serve = one_round  # type: ignore[assignment]  # in the server's process, which loads this


def trainer(folder: Path, size: int) -> None:
    """The process that `fedlora-node serve` is, without its training."""
    node = NodeFolder(folder)
    policy = node.load_policy()
    with only_trainer(node):
        ledger, identity = node.open_ledger(policy), Identity.load(node.identity)
        resident = Resident(node, policy, identity, ledger, Untrained(size))
        endpoint.serve(resident.ask_in_time, policy.trainer, node.root, print)
