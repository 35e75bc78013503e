"""An offer, and the consent to it.

open       is it the coordinator's, for this institution, and still good?
count      a federation may offer so many new runs a day
judge      the policy's verdicts; the peers, where updates are to leave under masks; the projection
try        the network and the data are what the manifest names; nothing is charged before a start
sign       the consent, once it is on disk; only a few that were never started are kept
"""

from __future__ import annotations

import logging

from fedlora.client.consent.offer import check_projection, offered
from fedlora.client.service.dialogue import Dialogue, private
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
        node.offers.count(node.policy.limits.offers)
    spend = dialogue.judged(manifest)
    if manifest.secure is not None:
        node.masked.check(manifest)
    check_projection(manifest, offer.projection)
    # its address is another one each time that a run is offered
    kept = node.outbox.read(digest, 0, 0, asked) if started else None
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


def _keep(dialogue: Dialogue, manifest: RunManifest, offer: Offer, consent: bytes) -> None:
    """Try network and data, keep manifest and consent; a failure leaves nothing on disk."""
    node, digest = dialogue.node, manifest.digest
    try:
        projection = node.offers.lay_out(digest, offer.projection)
        node.work.check(manifest, projection, node.budget(manifest))
        node.offers.keep(digest, offer, consent, node.policy)
    except BaseException:
        if dialogue.reserved(manifest) is None:
            node.offers.drop(digest)
        raise

    def charged(other: str) -> bool:
        """Killed between the ledger's entry and the acknowledgement."""
        budgets = node.policy.budgets
        return any(node.ledger.reserved_for(each, other) is not None for each in budgets)

    node.offers.make_room(charged)
