"""A start, and the acknowledgement that the run's whole cost is reserved.

open       the coordinator's signature; the run that it names
judge      the policy's verdicts, which may be stricter than at the consent; a start that was
           acknowledged before is answered by the same bytes
check      is it this node's own consent, still good, and in a cohort as large as was promised? and
           no other start than one that was charged before a kill? which it is, is on disk from here
reserve    the whole schedule is charged; from here on tasks and stages of the run are answered
sign       the acknowledgement, once it is on disk
"""

from __future__ import annotations

import logging

from fedlora.client.consent.offer import check_start, check_time, read_manifest
from fedlora.client.node.outbox import START
from fedlora.client.node.waiting_runs import STARTED, Waiting, note
from fedlora.client.service.dialogue import Dialogue, private
from fedlora.client.service.ticks import CONSENT
from fedlora.common.codec.strict import digest_of
from fedlora.common.errors import BadInput, Refused
from fedlora.common.manifest.manifest import RunManifest
from fedlora.common.privacy.figures import exact, shown_epsilon, shown_left
from fedlora.common.protocol.consent import Start
from fedlora.common.protocol.messages import OFFER_TAG, START_TAG, Address, SignedStart, Started
from fedlora.common.terminal import one_line

log = logging.getLogger(__name__)


def open_start(dialogue: Dialogue, signed: SignedStart) -> tuple[Dialogue, Start]:
    """The start; Refused where the coordinator did not sign it, BadInput where it is none."""
    start = Start.from_bytes(signed.start.opened(START_TAG, dialogue.invitation.coordinator))
    return dialogue.about(start.manifest), start


def answer_start(dialogue: Dialogue, start: Start, request: bytes) -> bytes:
    """The signed acknowledgement; `request` is what it answers, byte for byte.

    Refused or BadInput with the reason why there is none.
    """
    node, digest = dialogue.node, start.manifest
    waiting = node.offers.read(digest)
    if waiting is None:
        raise BadInput(
            f"start manifest: found {digest}, which was not consented to, or gave way to later"
            " offers"
        )
    manifest = read_manifest(waiting.manifest, dialogue.invitation.coordinator)
    spend = dialogue.judged(manifest)
    kept = node.outbox.read(digest, 0, 0, request, START)
    if kept is not None and dialogue.is_ours(kept):
        return kept
    _check(dialogue, start, manifest, waiting, digest_of(request))
    with private():
        node.offers.name_start(digest, digest_of(request))
        _reserve(dialogue, manifest)
        cohort = [party.institution for party in start.cohort]
        note(node.folder.run(digest) / STARTED, node.policy, cohort=cohort)
    me, its = node.policy.institution, node.policy.digest
    with private():
        at, begun = node.ledger.head(), digest_of(request)
    reply = Started(
        me, digest, its, spend.epsilon, spend.delta, begun, height=at.count, head=at.hash
    )
    with private():
        asked = waiting.manifest.to_bytes()
        node.outbox.write(digest, 0, 0, asked, waiting.consent)
        acknowledged = dialogue.signed(reply)
        node.outbox.write(digest, 0, 0, request, acknowledged, START)
    budget = node.budget(manifest)
    left = exact(budget.epsilon) - exact(node.ledger.spent(budget.name).epsilon)
    run, cost = one_line(manifest.run)[:80], shown_epsilon(spend.epsilon)
    told = (run, len(start.cohort), cost, budget.name, shown_left(left))
    log.info("started run %s with %d institutions: ε %s of budget %s, %s left", *told)
    return acknowledged


def _check(
    dialogue: Dialogue, start: Start, manifest: RunManifest, waiting: Waiting, digest: str
) -> None:
    """Whether this may begin; what was reserved before a kill is not asked how old it is, but is
    that start alone, by its `digest`.
    """
    named = dialogue.named_start(manifest)
    if named not in ("", digest):
        raise Refused(
            f"start: found {digest[:20]}, expected {named[:20]}, which the run was charged for: a"
            " rewind"
        )
    node, coordinator = dialogue.node, dialogue.invitation.coordinator
    check_start(start, manifest, node.policy, waiting.consent)
    if manifest.secure is not None:
        node.masked.check(manifest, {party.institution for party in start.cohort})
    if not named and dialogue.reserved(manifest) is None:
        check_time(Address.from_bytes(waiting.address.opened(OFFER_TAG, coordinator)))
        if node.offers.names_start(manifest.digest):  # it was tried before, for nothing
            node.count_reading()


def _reserve(dialogue: Dialogue, manifest: RunManifest) -> None:
    """Charge the run, then move it to those that were begun: killed in between, this goes on."""
    node, budget = dialogue.node, dialogue.node.budget(manifest)
    node.bind_data(manifest, CONSENT)
    data = node.work.consent(manifest, node.offers.projection(manifest.digest), budget)
    node.offers.begin(manifest.digest)
    node.note_data(manifest, data)
