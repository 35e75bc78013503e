"""Parts: of an adapter, taken in before its task comes, and of an answer, handed out after it.

open              the coordinator's signature on the list of parts, or on the plan
judge             was the run started? does the policy still allow it?
take              a part is held against its digest, the whole against the size that the manifest
                  names; one adapter is kept at a time                       (client.node.inbox)
hand out          bytes that lie in the outbox: nothing trains, nothing is drawn, nothing is charged
"""

from __future__ import annotations

from fedlora.client.service.dialogue import Dialogue, private
from fedlora.common.errors import BadInput
from fedlora.common.manifest.manifest import RunManifest
from fedlora.common.manifest.plan import RoundPlan
from fedlora.common.protocol.messages import PLAN_TAG
from fedlora.common.protocol.pieces import PARTS_TAG, Coming, Fetch, Part, Piece, Taken
from fedlora.common.protocol.vectors import BYTES


def open_piece(dialogue: Dialogue, piece: Piece) -> tuple[Dialogue, Coming]:
    """Which adapter comes; Refused where the coordinator did not sign its list of parts."""
    coming = Coming.from_bytes(piece.coming.opened(PARTS_TAG, dialogue.invitation.coordinator))
    return dialogue.about(coming.manifest), coming


def answer_piece(dialogue: Dialogue, piece: Piece, coming: Coming) -> bytes:
    """How many parts are kept now; BadInput for what is no part of it, or too much."""
    manifest = dialogue.started(coming.manifest)
    dialogue.judged(manifest, started=True)
    _check_in_parts(manifest)
    size = BYTES["float32"] * manifest.vector_size
    coming.parts.check(size, size, "adapter")
    count = dialogue.node.inbox.arrival(coming).add(piece.number, piece.data, "adapter")
    return dialogue.signed(Taken(dialogue.node.policy.institution, coming.manifest, count))


def open_fetch(dialogue: Dialogue, fetch: Fetch) -> tuple[Dialogue, RoundPlan]:
    """Of which plan's answer; Refused where the coordinator did not sign it."""
    plan = RoundPlan.from_bytes(fetch.plan.opened(PLAN_TAG, dialogue.invitation.coordinator))
    return dialogue.about_attempt(plan), plan


def answer_fetch(dialogue: Dialogue, plan: RoundPlan, number: int) -> bytes:
    """The part, as it lies; BadInput where no such part is kept."""
    node, manifest = dialogue.node, dialogue.known(plan)
    dialogue.judged(manifest, started=True)
    _check_in_parts(manifest)
    if manifest.secure is not None:  # as a stage, where it is refused by now
        with private():
            node.masked.of(manifest)
    place = (plan.manifest, plan.round, plan.attempt)
    data = node.outbox.part(*place, number, masked=manifest.secure is not None)
    return dialogue.signed(Part(node.policy.institution, *place, data))


def _check_in_parts(manifest: RunManifest) -> None:
    if not manifest.vector_size:
        raise BadInput("parts: found a run whose vectors travel whole, expected a task of it")
