"""A stage of secure aggregation, and this node's message in it.

open              the coordinator's signature on the whole request
judge             was the run started? the policy again, also where an input was made before
answer            the state machine's next step, if it is one           (client.secagg.masked_run)
input             may this attempt be masked at all? only then reserve, train, mask; the masked
                  bytes are on disk before they leave, and sent again as they are
"""

from __future__ import annotations

import logging
from dataclasses import asdict

from fedlora.client.secagg.masked_run import MaskedRun
from fedlora.client.secagg.node import Possible
from fedlora.client.service.dialogue import Dialogue, Node, private
from fedlora.common.disk.files import append_line
from fedlora.common.errors import BadInput, Refused
from fedlora.common.manifest.counts import answer_spec
from fedlora.common.manifest.manifest import RunManifest
from fedlora.common.manifest.plan import RoundPlan
from fedlora.common.protocol.messages import STAGE_TAG, SignedStage, Staged
from fedlora.common.protocol.pieces import Parted
from fedlora.common.protocol.stages import Request, Stage
from fedlora.common.protocol.vector_parts import cut_bytes, listed
from fedlora.common.terminal import one_line

log = logging.getLogger(__name__)


def open_stage(dialogue: Dialogue, stage: SignedStage) -> tuple[Dialogue, Request]:
    """What is asked; Refused where the coordinator did not sign it."""
    request = Request.from_bytes(stage.request.opened(STAGE_TAG, dialogue.invitation.coordinator))
    return dialogue.about_attempt(request.plan), request


def answer_stage(dialogue: Dialogue, request: Request) -> bytes:
    """The signed message; Refused or BadInput with the reason why there is none.

    What the state machine refuses is refused for this attempt alone: in a later epoch it may do it.
    """
    node, plan = dialogue.node, request.plan
    manifest, me = dialogue.known(plan), node.policy.institution
    if request.institution != me:
        raise BadInput(f"stage institution: found {request.institution}, expected {me}")
    if manifest.secure is None:
        raise Refused("stage: found a run without secure aggregation, expected a task of it")
    dialogue.judged(manifest, started=True)
    with private():
        run = node.masked.of(manifest)
        kept = run.node.sent(plan.round, plan.attempt) if request.stage == Stage.INPUT else None
    try:
        message = kept or _answered(dialogue, run, manifest, request)
    except Refused as error:
        raise BadInput(f"{request.stage}: {error}") from error
    if request.stage == Stage.CONFIRM and run.node.confirmed is not None:
        with private():
            _note_sum(node, plan, run.node.confirmed)
    if request.stage == Stage.INPUT:
        told = (plan.round, plan.attempt, one_line(manifest.run)[:80])
        log.info("sent the masked update of round %d, attempt %d of run %s", *told)
    place = (plan.manifest, plan.round, plan.attempt)
    if request.stage == Stage.INPUT and manifest.vector_size:  # it lies in the outbox
        return dialogue.signed(Parted(me, *place, listed(cut_bytes(message))))
    return dialogue.signed(Staged(me, *place, message))


def _answered(dialogue: Dialogue, run: MaskedRun, manifest: RunManifest, request: Request) -> bytes:
    if request.stage == Stage.INPUT:
        return _input(dialogue, run, manifest, request)
    return run.answer(request.stage, request.message, request.plan)


def _input(dialogue: Dialogue, run: MaskedRun, manifest: RunManifest, request: Request) -> bytes:
    """The masked input; the sum that it may be in is noted before it can leave."""
    node, plan = dialogue.node, request.plan
    with private():
        adapter = node.work.spec(manifest, node.folder.projection(manifest.digest))
        spec = answer_spec(manifest, plan.phase, adapter)
    run.check(request.message, plan, spec)
    update = dialogue.trained(manifest, plan, request.vector)
    with private():  # what is wrong with an update that has no mask yet is nobody's business
        _note_sum(node, plan, run.node.possible(plan.round, plan.attempt))
        return run.mask(plan, spec, update)


def _note_sum(node: Node, plan: RoundPlan, possible: Possible) -> None:
    append_line(node.folder.sums_log(plan.manifest), asdict(possible), limit=None)
