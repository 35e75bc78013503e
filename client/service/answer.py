"""The resident trainer: request bytes in, signed reply bytes out; it decides, without transport.

    1. parse; the coordinator's signature, under the key that `join` pinned
    2. an offer: is it for this institution, and still good? the policy's verdicts; the network and
       the data; the reservation of the whole schedule; consent
    3. a task: was this very request answered? then the same bytes again
    4.         does it go on from what came before? replays and rewinds are refused
    5.         the policy once more, for it may have become stricter
    6.         the attempt is reserved, trained, committed          (client.training.trainer)
    7.         the signed bytes are on disk; then they leave
    8. a stage: the same, where updates leave under masks only      (client.secagg.masked_trainer)

What the policy or a signature says no to is told to the coordinator. What goes wrong once data are
in sight is told to the log alone: a message about a record is about somebody.
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from fedlora.client.consent.judge import judge
from fedlora.client.consent.offer import check_projection, kept_manifest, offered, read_manifest
from fedlora.client.consent.verdict import Denied, allow
from fedlora.client.node.enrolment import pinned_invitation
from fedlora.client.node.folder import NodeFolder
from fedlora.client.node.outbox import Outbox, Plans
from fedlora.client.node.policy import Policy
from fedlora.client.secagg.masked_trainer import SecureTrainer
from fedlora.client.secagg.node import Possible
from fedlora.client.secagg.runs import SecureRuns
from fedlora.client.service.refusals import RefusalLog
from fedlora.common.disk.files import append_line, write_atomically
from fedlora.common.errors import BadInput, FedloraError, Refused
from fedlora.common.ledger.ledger import Budget, Ledger
from fedlora.common.manifest.manifest import RunManifest
from fedlora.common.manifest.plan import RoundPlan
from fedlora.common.model.state import AdapterSpec
from fedlora.common.privacy.accountant import Spend
from fedlora.common.privacy.figures import exact, shown_epsilon, shown_left
from fedlora.common.privacy.modes import guarantee_of
from fedlora.common.protocol.messages import (
    MAX_NUMBER,
    PLAN_TAG,
    STAGE_TAG,
    Answer,
    Consent,
    Decline,
    Offer,
    Reply,
    Stage,
    Staged,
    Task,
    one_line,
    reply_from_bytes,
    reply_to_bytes,
    request_from_bytes,
    vector_from_bytes,
)
from fedlora.common.protocol.stages import CONFIRM, INPUT, OFFER, Request
from fedlora.common.trust.enrolment import Invitation
from fedlora.common.trust.identity import Identity, Signed

log = logging.getLogger(__name__)

PRIVATE_REASON = "failed at the node once its data were in sight; its own log says why"


class Work(Protocol):
    """What a resident trainer has done for it; `client.service.workshop` does it with torch."""

    def consent(self, manifest: RunManifest, projection: Path, budget: Budget) -> str:
        """Check the network, reserve the schedule; the digest of the data set."""

    def spec(self, manifest: RunManifest, projection: Path) -> AdapterSpec:
        """Which coordinates the run's adapter has."""

    def train(
        self,
        manifest: RunManifest,
        projection: Path,
        budget: Budget,
        plan: RoundPlan,
        vector: bytes,
    ) -> tuple[bytes, str]:
        """Reserve, train and commit one attempt: update (little-endian float32) and data digest."""


class _Private(FedloraError):
    """A fault that must not be told to anybody outside; `__cause__` is what the log gets."""


class Place:
    """What a request was about, for reply and log; no manifest: the coordinator did not sign."""

    def __init__(self) -> None:
        self.manifest, self.round, self.attempt = "", 0, 0


class Resident:
    """One institution's trainer. Requests are taken one at a time, whoever sends them."""

    def __init__(
        self, folder: NodeFolder, policy: Policy, identity: Identity, ledger: Ledger, work: Work
    ) -> None:
        self._folder = folder
        self._policy = policy
        self._identity = identity
        self._ledger = ledger
        self._work = work
        self._outbox = Outbox(folder.under(policy.trainer.outbox))
        self._secure = SecureRuns(folder, policy, identity, self._outbox)
        self._refusals = RefusalLog(folder.refusals)
        self._one = threading.Lock()
        self._check_history()

    def ask(self, data: bytes) -> bytes:
        """The signed reply to a request; never raises what a request can cause."""
        place = Place()
        with self._one:
            try:
                invitation = pinned_invitation(self._folder)
            except FedloraError as error:
                log.error("%s", error)
                return self._declined("", place, error)
            try:
                return self._answer(invitation, data, place)
            except Exception as error:
                return self._declined(invitation.federation, place, error)

    def _check_history(self) -> None:
        """Refused where the ledger knows less than this node kept of consents and releases.

        That is how a ledger and a head look that were both put back to an older day.
        """
        entries = [entry.body for entry in self._ledger.entries()]
        consented = {body["manifest"] for body in entries if body["kind"] == "consent"}
        for path in self._folder.runs.glob("*/manifest.signed"):
            _, manifest = kept_manifest(path)
            if not guarantee_of(manifest).private:
                continue
            left = {attempt for _, attempt, _ in self._outbox.sizes(manifest.digest)} - {0}
            if manifest.digest not in consented or left - set(
                self._ledger.reservations(manifest.digest)
            ):
                raise Refused(
                    f"ledger: knows less of {manifest.digest[:20]} than what was released: it and"
                    " its head were restored from an older copy"
                )

    def _answer(self, invitation: Invitation, data: bytes, place: Place) -> bytes:
        request = request_from_bytes(data, self._policy.trainer.max_message_bytes)
        if isinstance(request, Offer):
            return self._consent(invitation, request, place)
        if isinstance(request, Stage):
            return self._stage(invitation, request, place)
        return self._train(invitation, request, data, place)

    def _consent(self, invitation: Invitation, offer: Offer, place: Place) -> bytes:
        manifest = offered(offer, invitation.coordinator, self._policy.institution)
        place.manifest = manifest.digest
        spend = self._judged(invitation, manifest)
        if manifest.secure is not None:
            self._secure.check(manifest)
        check_projection(manifest, offer.projection)
        # its address is another one each time that a run is offered
        asked = offer.manifest.to_bytes()
        kept = self._outbox.read(manifest.digest, 0, 0, asked)
        if kept is not None and self._is_ours(invitation, kept):
            return kept
        with _private():
            self._reserve(manifest, offer)
        me, its = self._policy.institution, self._policy.digest
        reply = Consent(me, manifest.digest, its, spend.epsilon, spend.delta)
        released = self._released(invitation.federation, reply, (0, 0), asked)
        budget = self._budget(manifest)
        left = exact(budget.epsilon) - exact(self._ledger.spent(budget.name).epsilon)
        run, cost = one_line(manifest.run)[:80], shown_epsilon(spend.epsilon)
        told = (run, cost, budget.name, shown_left(left))
        log.info("consented to run %s: ε %s of budget %s, %s left", *told)
        return released

    def _reserve(self, manifest: RunManifest, offer: Offer) -> None:
        """Check network and data, reserve, keep the manifest; a failure leaves nothing on disk."""
        folder = self._folder.run(manifest.digest)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            projection = folder / "projection.safetensors"
            write_atomically(projection, offer.projection, mode=0o600)
            digest = self._work.consent(manifest, projection, self._budget(manifest))
            self._note_data(folder, digest)
            write_atomically(folder / "manifest.signed", offer.manifest.to_bytes(), mode=0o600)
        except BaseException:
            held = self._ledger.reserved_for(self._budget(manifest).name, manifest.digest)
            if held is None and not (folder / "manifest.signed").exists():
                shutil.rmtree(folder, ignore_errors=True)
            raise

    def _train(self, invitation: Invitation, task: Task, data: bytes, place: Place) -> bytes:
        plan = RoundPlan.from_bytes(task.plan.opened(PLAN_TAG, invitation.coordinator))
        if plan.manifest != task.manifest_digest:
            raise BadInput("task manifest: found another than its plan's")
        manifest = self._planned(invitation, plan, place)
        if manifest.secure is not None:  # what is promised to be masked must not leave in clear
            raise Refused(
                "task: found a run whose updates leave under masks only, expected a stage of it"
            )
        kept = self._outbox.read(plan.manifest, plan.round, plan.attempt, data)
        if kept is not None:
            return kept
        self._judged(invitation, manifest, consented=True)
        update = self._trained(manifest, plan, task.vector)
        reply = Answer(self._policy.institution, plan.manifest, plan.round, plan.attempt, update)
        released = self._released(invitation.federation, reply, (plan.round, plan.attempt), data)
        told = (plan.round, plan.attempt, one_line(manifest.run)[:80])
        log.info("answered round %d, attempt %d of run %s", *told)
        return released

    def _stage(self, invitation: Invitation, stage: Stage, place: Place) -> bytes:
        """One stage of secure aggregation. What its checks refuse, a later epoch may do."""
        request = Request.from_bytes(stage.request.opened(STAGE_TAG, invitation.coordinator))
        plan = request.plan
        manifest = self._planned(invitation, plan, place)
        me = self._policy.institution
        if request.institution != me:
            raise BadInput(f"stage institution: found {request.institution}, expected {me}")
        if manifest.secure is None:
            raise Refused("stage: found a run without secure aggregation, expected a task of it")
        with _private():
            trainer = self._secure.trainer(manifest)
            kept = trainer.sent(plan) if request.stage == INPUT else None
        if kept is None and request.stage in (OFFER, INPUT):
            self._judged(invitation, manifest, consented=True)
        try:
            if request.stage == INPUT:
                message = kept or self._input(trainer, manifest, request)
            else:
                message = trainer.answer(request.stage, request.message, plan)
        except Refused as error:
            raise BadInput(f"{request.stage}: {error}") from error
        if request.stage == CONFIRM and trainer.confirmed is not None:
            with _private():
                self._note_sum(plan, trainer.confirmed)
        if request.stage == INPUT:
            told = (plan.round, plan.attempt, one_line(manifest.run)[:80])
            log.info("sent the masked update of round %d, attempt %d of run %s", *told)
        reply = Staged(me, plan.manifest, plan.round, plan.attempt, message)
        return reply_to_bytes(self._identity, invitation.federation, reply)

    def _input(self, trainer: SecureTrainer, manifest: RunManifest, request: Request) -> bytes:
        with _private():
            projection = self._folder.run(manifest.digest) / "projection.safetensors"
            spec = self._work.spec(manifest, projection)
        sent = trainer.prepare(request.message, request.plan, spec)
        if sent is not None:
            return sent
        update = self._trained(manifest, request.plan, request.vector)
        with _private():  # what is wrong with an update that has no mask yet is nobody's business
            self._note_sum(request.plan, trainer.possible(request.plan))  # before it can leave
            vector = vector_from_bytes(update, spec.size, "own update")
            return trainer.mask(request.plan, spec, vector)

    def _trained(self, manifest: RunManifest, plan: RoundPlan, vector: bytes) -> bytes:
        """An attempt's update, which goes on from all before: reserved, trained, committed."""
        folder = self._folder.run(plan.manifest)
        plans = Plans(folder / "plans")
        with _private():
            reserved = self._ledger.reservations(plan.manifest)
        plans.check(plan, reserved)
        with _private():
            plans.write(plan)
            update, digest = self._work.train(
                manifest, folder / "projection.safetensors", self._budget(manifest), plan, vector
            )
            self._note_data(folder, digest)
        return update

    def _planned(self, invitation: Invitation, plan: RoundPlan, place: Place) -> RunManifest:
        """The manifest `plan` belongs to; BadInput or Refused where it can't be a plan of it."""
        if not (0 < plan.round <= MAX_NUMBER and 0 < plan.attempt <= MAX_NUMBER):
            raise BadInput("plan: found a round or attempt out of range, expected 1 or more")
        place.manifest, place.round, place.attempt = plan.manifest, plan.round, plan.attempt
        manifest = self._known(invitation, plan.manifest)
        phase = manifest.phase_of(plan.round)
        if phase != plan.phase:
            raise BadInput(f"plan phase: found {plan.phase}, expected {phase}")
        return manifest

    def _known(self, invitation: Invitation, digest: str) -> RunManifest:
        """The manifest that this node consented to, from its own disk."""
        path = self._folder.run(digest) / "manifest.signed"
        if not _is_digest(digest) or not path.is_file():
            found = one_line(digest)[:80]
            raise Refused(f"plan manifest: found {found}, which was not consented to")
        signed = Signed.from_bytes(path.read_bytes(), "kept manifest")
        manifest = read_manifest(signed, invitation.coordinator)
        if manifest.digest != digest:
            raise Refused("plan manifest: what is kept under its name is another one")
        return manifest

    def _judged(
        self, invitation: Invitation, manifest: RunManifest, consented: bool = False
    ) -> Spend:
        """What the run costs, if the policy allows it; Refused otherwise."""
        name = self._policy.data_for(manifest.task, manifest.labels, manifest.unit)
        reserved = None
        with _private():
            spent = {each: self._ledger.spent(each) for each in self._policy.budgets}
            if name:
                budget = self._policy.data[name].budget
                reserved = self._ledger.reserved_for(budget, manifest.digest)
        allow(judge(manifest, self._policy, invitation.federation, spent, reserved))
        guarantee = guarantee_of(manifest)
        if consented and guarantee.private and reserved is None:
            raise Refused(f"plan manifest: nothing was consented to for {manifest.digest[:20]}")
        return guarantee.charge()

    def _budget(self, manifest: RunManifest) -> Budget:
        name = self._policy.data_for(manifest.task, manifest.labels, manifest.unit)
        return self._policy.budgets[self._policy.data[name].budget]

    def _released(self, federation: str, reply: Reply, at: tuple[int, int], data: bytes) -> bytes:
        """The signed bytes, once they are on disk."""
        with _private():
            signed = reply_to_bytes(self._identity, federation, reply)
            self._outbox.write(reply.manifest, *at, data, signed)
        return signed

    def _is_ours(self, invitation: Invitation, kept: bytes) -> bool:
        """Whether today's key signed it: a consent has no noise, so a rotation signs it anew."""
        try:
            ours = {self._policy.institution: self._identity.public}
            reply_from_bytes(kept, invitation.federation, ours)
        except Refused:
            return False
        return True

    def _note_sum(self, plan: RoundPlan, possible: Possible) -> None:
        append_line(self._folder.run(plan.manifest) / "secure.jsonl", asdict(possible), limit=None)

    def _note_data(self, folder: Path, digest: str) -> None:
        append_line(folder / "data.jsonl", {"time": _now(), "data": digest}, limit=None)

    def _declined(self, federation: str, place: Place, error: Exception) -> bytes:
        """A signed no, without a budget's figures; its reason whole only with no data in sight."""
        public = isinstance(error, BadInput | Refused) and not isinstance(error, _Private)
        reason = one_line(str(error)) if public else PRIVATE_REASON
        inner = error.__cause__ or error
        refused = isinstance(inner if isinstance(error, _Private) else error, Refused)
        line = {
            "time": _now(),
            "manifest": one_line(place.manifest)[:100],
            "round": place.round,
            "attempt": place.attempt,
            "reason": reason,
            "detail": one_line(str(inner)),
            "refused": refused,
        }
        if isinstance(error, Denied):
            # quotes no record: the node's report has it too
            line["verdict"] = one_line(error.detail)
        if not public:
            log.error("a request failed", exc_info=inner)
        told = line.get("verdict", reason)
        log.warning("refused%s: %s", f" {place.manifest[:20]}" * bool(place.manifest), told)
        try:
            if place.manifest:
                self._refusals.add(line)
            else:  # who can say anything may push out what was said before, and nothing else
                append_line(self._folder.strangers, line)
        except OSError as full:
            log.error("a refusal could not be logged (%s): %s", full, json.dumps(line))
        name = self._policy.institution
        decline = Decline(name, place.manifest, place.round, place.attempt, reason, refused)
        return reply_to_bytes(self._identity, federation, decline)


@contextmanager
def _private() -> Iterator[None]:
    """Whatever goes wrong inside is for the log; the coordinator learns that it failed."""
    try:
        yield
    except Exception as error:
        raise _Private(PRIVATE_REASON) from error


def _is_digest(text: str) -> bool:
    digits = set(text[7:]) <= set("0123456789abcdef")
    return len(text) == 71 and text.startswith("sha256:") and digits


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
