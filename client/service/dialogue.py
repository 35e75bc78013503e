"""One request and its answer, and the steps that all answers share.

    about      what the request is about, once its signature was checked
    known      the manifest of a run that was started, from this node's own disk
    judged     what the policy says to it, as it is now
    trained    does the attempt go on from all before it? then it is reserved, trained, committed
    released   the signed bytes, once they are on disk

What a policy or a signature says no to is told to the coordinator. What goes wrong once data are in
sight (`private`) is told to the log alone: a message about a record is about somebody.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

from fedlora.client.consent.judge import judge
from fedlora.client.consent.offer import read_manifest
from fedlora.client.consent.verdict import allow
from fedlora.client.node.folder import NodeFolder
from fedlora.client.node.inbox import Inbox
from fedlora.client.node.outbox import Outbox, Plans
from fedlora.client.node.policy import Policy
from fedlora.client.node.waiting_runs import Offers
from fedlora.client.secagg.runs import MaskedRuns
from fedlora.client.service.ticks import TRAIN, Watched
from fedlora.common.data.data_file import files_stamp
from fedlora.common.disk.files import append_line, now
from fedlora.common.errors import BadInput, FedloraError, Refused
from fedlora.common.ledger.ledger import Budget, Ledger
from fedlora.common.manifest.manifest import RunManifest
from fedlora.common.manifest.plan import Delta, RoundPlan
from fedlora.common.privacy.accountant import Spend
from fedlora.common.privacy.modes import guarantee_of
from fedlora.common.protocol.messages import MAX_NUMBER, Reply, reply_from_bytes, reply_to_bytes
from fedlora.common.terminal import one_line
from fedlora.common.trust.enrolment import Invitation
from fedlora.common.trust.identity import Identity, Signed

PRIVATE_REASON = "failed at the node once its data were in sight; its own log says why"


class PrivateFault(FedloraError):
    """A fault that must not be told to anybody outside; `__cause__` is what the log gets."""


@contextmanager
def private() -> Iterator[None]:
    """Whatever goes wrong inside is for the log; the coordinator learns that it failed."""
    try:
        yield
    except PrivateFault:
        raise
    except Exception as error:
        raise PrivateFault(PRIVATE_REASON) from error


@dataclass(frozen=True)
class Node:
    """What an institution answers with, whatever is asked."""

    folder: NodeFolder
    policy: Policy
    identity: Identity
    ledger: Ledger
    work: Watched
    offers: Offers
    outbox: Outbox
    masked: MaskedRuns

    @property
    def inbox(self) -> Inbox:
        """The adapter that comes in parts."""
        return Inbox(self.folder.inbox)

    def budget(self, manifest: RunManifest) -> Budget:
        """What the run charges, by the data set that serves it."""
        name = self.policy.data_for(manifest.task, manifest.labels, manifest.unit)
        return self.policy.budgets[self.policy.data[name].budget]

    def bind_data(self, manifest: RunManifest, kind: str) -> None:
        """Mark the run's data as this ledger's, before anything is read or reserved for this `kind`
        of work. Looking for marks takes longer the more files there are: data are in sight.
        """
        self.work.in_sight(manifest, kind)
        name = self.policy.data_for(manifest.task, manifest.labels, manifest.unit)
        with private():
            self.folder.bind_data(self.policy, name, self.ledger.id)

    def stamp(self, manifest: RunManifest) -> str:
        """Another one where the policy, or a file of the run's data, was changed; reads none."""
        name = self.policy.data_for(manifest.task, manifest.labels, manifest.unit)
        files = files_stamp(self.folder.under(self.policy.data[name].path))
        return f"{self.policy.digest} {files}"

    def present(self) -> Node:
        """This node under its policy as it lies on the disk now; Refused where it is no policy of
        its own. What [trainer] says holds from start to end.
        """
        found = self.folder.read_policy()
        if found.digest == self.policy.digest:
            return self
        if found.institution != self.policy.institution:
            raise Refused(
                f"{self.folder.policy.name} institution: found {found.institution}, expected"
                f" {self.policy.institution}, who was started"
            )
        policy = replace(found, trainer=self.policy.trainer, ledger=self.policy.ledger)
        self.masked.adopt(policy)
        self.work.adopt(policy)
        return replace(self, policy=policy)

    def count_reading(self) -> None:
        """Count one more reading of data that nobody is charged for: for an offer, or once more for
        a start or an attempt whose first one no ledger came to count. BadInput beyond a day's.
        """
        self.offers.count(self.policy.limits.offers)

    def note_data(self, manifest: RunManifest, digest: str) -> None:
        """Note which version of the data the run used just now."""
        line = {"time": now(), "data": digest}
        append_line(self.folder.data_log(manifest.digest), line, limit=None)


@dataclass(frozen=True)
class Place:
    """Where in a federation something happened; without a manifest, nowhere that is known."""

    manifest: str = ""
    round: int = 0
    attempt: int = 0


@dataclass(frozen=True)
class Dialogue:
    """A request at `node`, the federation that was pinned when it came, and what it is about.

    Without a manifest in its place the coordinator did not sign it.
    """

    node: Node
    invitation: Invitation
    place: Place = Place()

    def about(self, manifest: str) -> Dialogue:
        """This dialogue, about a run as a whole; BadInput for what no manifest is called."""
        return replace(self, place=Place(_digest(manifest)))

    def about_attempt(self, plan: RoundPlan) -> Dialogue:
        """This dialogue, about one attempt; BadInput where there can be none of its numbers, or of
        what it calls its manifest.
        """
        if not (0 < plan.round <= MAX_NUMBER and 0 < plan.attempt <= MAX_NUMBER):
            raise BadInput("plan: found a round or attempt out of range, expected 1 or more")
        return replace(self, place=Place(_digest(plan.manifest), plan.round, plan.attempt))

    def started(self, digest: str) -> RunManifest:
        """The manifest of this digest, once its run was started; Refused where it was not."""
        path = self.node.folder.manifest(_digest(digest))
        if not path.is_file():
            raise Refused(f"plan manifest: found {digest}, which was not started")
        signed = Signed.from_bytes(path.read_bytes(), "kept manifest")
        manifest = read_manifest(signed, self.invitation.coordinator)
        if manifest.digest != digest:
            raise Refused("plan manifest: what is kept under its name is another one")
        return manifest

    def known(self, plan: RoundPlan) -> RunManifest:
        """The manifest that `plan` is of; BadInput or Refused where it can be of none."""
        manifest = self.started(plan.manifest)
        phase = manifest.phase_of(plan.round)
        if phase != plan.phase:
            raise BadInput(f"plan phase: found {plan.phase}, expected {phase}")
        # Whatever the ledger says: it may be an older copy of itself. Without privacy no noise was
        # calibrated for their number.
        most = sum(each.attempts for each in manifest.accounted[: phase + 1])
        if guarantee_of(manifest).private and plan.attempt > most:
            raise Refused(f"plan attempt: found {plan.attempt}, expected at most {most}")
        return manifest

    def judged(self, manifest: RunManifest, started: bool = False) -> Spend:
        """What the run costs, if the policy allows it; Refused otherwise. No data are touched.

        `started`: and if it was reserved before.
        """
        policy, reserved = self.node.policy, self.reserved(manifest)
        with private():
            spent = {each: self.node.ledger.charges(each) for each in policy.budgets}
        allow(judge(manifest, policy, self.invitation.federation, spent, reserved))
        guarantee = guarantee_of(manifest)
        if started and guarantee.private and reserved is None:
            raise Refused(f"plan manifest: nothing was reserved for {manifest.digest[:20]}")
        return guarantee.charge()

    def reserved(self, manifest: RunManifest) -> Spend | None:
        """What the run has of its budget already; None where nothing, or where none would pay."""
        policy = self.node.policy
        name = policy.data_for(manifest.task, manifest.labels, manifest.unit)
        with private():
            budget = policy.data[name].budget if name else ""
            return self.node.ledger.reserved_for(budget, manifest.digest)

    def named_start(self, manifest: RunManifest) -> str:
        """The digest of the one start that may go on, though a kill left it unanswered; or ""."""
        charged = self.reserved(manifest) is not None
        with private():
            return self.node.offers.named_start(manifest.digest, charged)

    def trained(self, manifest: RunManifest, plan: RoundPlan, given: bytes) -> Delta:
        """An attempt's update, which goes on from all before: reserved, trained, committed.

        The adapter is what is `given`, or, where it came in parts, what lies here.
        """
        node = self.node
        vector = given or node.inbox.read(manifest, plan.adapter)
        plans = Plans(node.folder.run(plan.manifest) / "plans")
        with private():
            reserved = node.ledger.reservations(plan.manifest)
        plans.check(plan, reserved)
        _check_left(manifest, plan, reserved)
        if plans.tried(plan):
            node.count_reading()
        node.bind_data(manifest, TRAIN)
        with private():
            plans.write(plan)
            projection = node.folder.projection(plan.manifest)
            budget = node.budget(manifest)
            update, digest = node.work.train(manifest, projection, budget, plan, vector)
            node.note_data(manifest, digest)
        return update

    def released(self, reply: Reply, request: bytes) -> bytes:
        """The signed reply to these bytes, once it is on disk."""
        place = self.place
        with private():
            signed = self.signed(reply)
            self.node.outbox.write(place.manifest, place.round, place.attempt, request, signed)
        return signed

    def is_ours(self, kept: bytes) -> bool:
        """Whether today's key signed it; what has no noise, a rotated key signs anew."""
        ours = {self.node.policy.institution: self.node.identity.public}
        try:
            reply_from_bytes(kept, self.invitation.federation, ours)
        except Refused:
            return False
        return True

    def signed(self, reply: Reply) -> bytes:
        """The reply, under this node's key, for this federation alone."""
        return reply_to_bytes(self.node.identity, self.invitation.federation, reply)


def _check_left(manifest: RunManifest, plan: RoundPlan, reserved: Mapping[int, int]) -> None:
    """Refused where the ledger, by its attempt -> round, would take no more of the plan's phase: it
    is asked once data were read.
    """
    most = manifest.accounted[plan.phase].attempts
    if sum(manifest.phase_of(number) == plan.phase for number in reserved.values()) >= most:
        raise Refused(f"plan attempt: all {most} attempts of phase {plan.phase} are spent")


def _digest(text: str) -> str:
    """A manifest's; BadInput for anything else, which a refusal could not even repeat."""
    if len(text) == 71 and text.startswith("sha256:") and set(text[7:]) <= set("0123456789abcdef"):
        return text
    raise BadInput(
        f'manifest: found {one_line(text)[:80]}, expected "sha256:" and 64 hexadecimal digits'
    )
