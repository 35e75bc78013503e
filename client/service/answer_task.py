"""A task, and the update that answers it.

open              the coordinator's signature on the plan of one attempt
judge             was the run started? does the policy, which may be stricter by now, still
                  allow it? Then a task that was answered before is answered by the same bytes
reserve, train    no replay, no rewind; ledger, then data                (client.training.trainer)
sign              the update, once the signed bytes are on disk
"""

from __future__ import annotations

import logging

from fedlora.client.service.dialogue import Dialogue, private
from fedlora.common.errors import BadInput, Refused
from fedlora.common.manifest.counts import answer_spec
from fedlora.common.manifest.plan import RoundPlan
from fedlora.common.manifest.turns import taken
from fedlora.common.protocol.messages import PLAN_TAG, Answer, Reply, Task
from fedlora.common.protocol.pieces import Parted
from fedlora.common.protocol.vector_parts import cut
from fedlora.common.protocol.vectors import vector_to_bytes
from fedlora.common.terminal import one_line

log = logging.getLogger(__name__)


def open_task(dialogue: Dialogue, task: Task) -> tuple[Dialogue, RoundPlan]:
    """The plan of a task; Refused where the coordinator did not sign it."""
    plan = RoundPlan.from_bytes(task.plan.opened(PLAN_TAG, dialogue.invitation.coordinator))
    if plan.manifest != task.manifest_digest:
        raise BadInput("task manifest: found another than its plan's")
    return dialogue.about_attempt(plan), plan


def answer_task(dialogue: Dialogue, plan: RoundPlan, vector: bytes, request: bytes) -> bytes:
    """The signed update, or the list of its parts; `vector` is the global adapter, empty where it
    came in parts, `request` what it answers, byte for byte.

    Refused or BadInput with the reason why there is none.
    """
    node, manifest = dialogue.node, dialogue.known(plan)
    if manifest.secure is not None:  # what is promised to be masked must not leave in clear
        raise Refused(
            "task: found a run whose updates leave under masks only, expected a stage of it"
        )
    dialogue.judged(manifest, started=True)
    kept = node.outbox.read(plan.manifest, plan.round, plan.attempt, request)
    if kept is not None:
        return kept
    delta = dialogue.trained(manifest, plan, vector)
    me, place = node.policy.institution, (plan.manifest, plan.round, plan.attempt)
    answer: Reply
    with private():
        adapter = node.work.spec(manifest, node.folder.projection(manifest.digest))
        spec = answer_spec(manifest, plan.phase, adapter)
        leaves = taken(delta, manifest.leaving(spec, plan.round))
        if manifest.vector_size:
            parts = node.outbox.write_body(*place, cut(leaves, manifest.wire))
            answer = Parted(me, *place, parts)
        else:
            answer = Answer(me, *place, vector_to_bytes(leaves, manifest.wire))
    released = dialogue.released(answer, request)
    told = (plan.round, plan.attempt, one_line(manifest.run)[:80])
    log.info("answered round %d, attempt %d of run %s", *told)
    return released
