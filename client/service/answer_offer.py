"""An offer, and the consent to it.

open       is it the coordinator's, for this institution, and still good?
count      a federation may have data read for so many offers a day: of new runs, and of runs
           whose data were changed since
judge      the policy's verdicts; the peers, where updates are to leave under masks; the projection
try        the network and the data are what the manifest names, unless they were tried before and
           are as they were; nothing is charged before a start
sign       the consent, once it is on disk; only a few that were never started are kept
"""

from __future__ import annotations

import logging

from fedlora.client.consent.offer import check_projection, offered
from fedlora.client.service.dialogue import Dialogue, Node, private
from fedlora.client.service.ticks import CHECK
from fedlora.common.ledger.subject import Subject
from fedlora.common.manifest.manifest import RunManifest
from fedlora.common.privacy.figures import shown_epsilon
from fedlora.common.protocol.messages import Consent, Offer
from fedlora.common.terminal import one_line

log = logging.getLogger(__name__)


def open_offer(dialogue: Dialogue, offer: Offer) -> tuple[Dialogue, RunManifest]:
    """The manifest that is offered; Refused or BadInput where it is not offered to this node."""
    me = dialogue.node.policy.institution
    manifest = offered(offer, dialogue.invitation.coordinator, me)
    return dialogue.about(manifest.digest), manifest


def answer_offer(dialogue: Dialogue, offer: Offer, manifest: RunManifest) -> bytes:
    """The signed consent to a run; Refused or BadInput with the reason why there is none."""
    node, digest, asked = dialogue.node, manifest.digest, offer.manifest.to_bytes()
    started = node.outbox.started(digest)
    if not started and node.offers.read(digest) is None:
        node.count_reading()
    spend = dialogue.judged(manifest)
    if manifest.secure is not None:
        node.masked.check(manifest)
    check_projection(manifest, offer.projection)
    # its address is another one each time that a run is offered
    kept = node.outbox.read(digest, 0, 0, asked) if started else _named(dialogue, manifest)
    if kept is not None and dialogue.is_ours(kept):
        return kept
    me, its = node.policy.institution, node.policy.digest
    with private():
        at = node.ledger.head()
    reply = Consent(me, digest, its, spend.epsilon, spend.delta, height=at.count, head=at.hash)
    consent = dialogue.signed(reply)
    with private():
        if started:
            node.outbox.write(digest, 0, 0, asked, consent)
        else:
            _keep(dialogue, manifest, offer, consent)
    run, cost = one_line(manifest.run)[:80], shown_epsilon(spend.epsilon)
    name = node.budget(manifest).name
    log.info("consented to run %s: a start will charge ε %s to budget %s", run, cost, name)
    return consent


def _named(dialogue: Dialogue, manifest: RunManifest) -> bytes | None:
    """The consent that a start names which was charged and, through a kill, not acknowledged."""
    waiting = dialogue.node.offers.read(manifest.digest)
    return waiting.consent if waiting and dialogue.named_start(manifest) else None


def _keep(dialogue: Dialogue, manifest: RunManifest, offer: Offer, consent: bytes) -> None:
    """Try network and data, keep manifest and consent; a failure leaves nothing on disk."""
    node, digest = dialogue.node, manifest.digest
    node.bind_data(manifest, CHECK)
    try:
        stamp = _tried(node, manifest, offer)
        node.offers.keep(digest, offer, consent, node.policy, stamp)
    except BaseException:
        if dialogue.reserved(manifest) is None:
            node.offers.drop(digest)
        raise

    def charged(other: str) -> bool:
        """Killed between the ledger's entry and the acknowledgement."""
        budgets = node.policy.budgets
        return any(node.ledger.reserved_for(each, other) is not None for each in budgets)

    node.offers.make_room(charged)


def _tried(node: Node, manifest: RunManifest, offer: Offer) -> str:
    """The stamp of policy and data that serve the run; BadInput or Refused where they do not.

    They are not read again while they are as they were at the last consent: each reading tells by
    its time, which no noise covers, and nobody is charged for it.
    """
    budget, stamp = node.budget(manifest), node.stamp(manifest)
    before = node.offers.checked(manifest.digest)
    if stamp == before:
        node.ledger.check(budget.name, Subject.of(manifest))
        return stamp
    if before is not None:  # a new run was counted
        node.count_reading()
    projection = node.offers.lay_out(manifest.digest, offer.projection)
    node.work.check(manifest, projection, budget)
    return stamp
