"""An offer, and the consent to it.

open       is it the coordinator's, for this institution, and still good?
judge      the policy's verdicts; the peers, where updates are to leave under masks; the projection
reserve    the network and the data are what the manifest names; the whole schedule is charged
sign       the consent, once it is on disk; offered again, the same bytes
"""

from __future__ import annotations

import logging
import shutil

from fedlora.client.consent.offer import check_projection, offered
from fedlora.client.service.dialogue import Dialogue, Node, private
from fedlora.common.disk.files import write_atomically
from fedlora.common.errors import Refused
from fedlora.common.manifest.manifest import RunManifest
from fedlora.common.privacy.figures import exact, shown_epsilon, shown_left
from fedlora.common.protocol.messages import Consent, Offer, reply_from_bytes
from fedlora.common.terminal import one_line

log = logging.getLogger(__name__)


def open_offer(dialogue: Dialogue, offer: Offer) -> tuple[Dialogue, RunManifest]:
    """The manifest that is offered; Refused or BadInput where it is not offered to this node."""
    me = dialogue.node.policy.institution
    manifest = offered(offer, dialogue.invitation.coordinator, me)
    return dialogue.about(manifest.digest), manifest


def answer_offer(dialogue: Dialogue, offer: Offer, manifest: RunManifest) -> bytes:
    """The signed consent to a run; Refused or BadInput with the reason why there is none."""
    node = dialogue.node
    spend = dialogue.judged(manifest)
    if manifest.secure is not None:
        node.masked.check(manifest)
    check_projection(manifest, offer.projection)
    # its address is another one each time that a run is offered
    asked = offer.manifest.to_bytes()
    kept = node.outbox.read(manifest.digest, 0, 0, asked)
    if kept is not None and _is_ours(dialogue, kept):
        return kept
    with private():
        _reserve(node, manifest, offer)
    me, its = node.policy.institution, node.policy.digest
    consent = Consent(me, manifest.digest, its, spend.epsilon, spend.delta)
    released = dialogue.released(consent, asked)
    budget = node.budget(manifest)
    left = exact(budget.epsilon) - exact(node.ledger.spent(budget.name).epsilon)
    run, cost = one_line(manifest.run)[:80], shown_epsilon(spend.epsilon)
    told = (run, cost, budget.name, shown_left(left))
    log.info("consented to run %s: ε %s of budget %s, %s left", *told)
    return released


def _reserve(node: Node, manifest: RunManifest, offer: Offer) -> None:
    """Check network and data, reserve, keep the manifest; a failure leaves nothing on disk."""
    digest, budget = manifest.digest, node.budget(manifest)
    kept, projection = node.folder.manifest(digest), node.folder.projection(digest)
    folder = node.folder.run(digest)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        write_atomically(projection, offer.projection, mode=0o600)
        node.note_data(manifest, node.work.consent(manifest, projection, budget))
        write_atomically(kept, offer.manifest.to_bytes(), mode=0o600)
    except BaseException:
        held = node.ledger.reserved_for(budget.name, digest)
        if held is None and not kept.exists():
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _is_ours(dialogue: Dialogue, kept: bytes) -> bool:
    """Whether today's key signed it: a consent has no noise, so a rotation signs it anew."""
    node = dialogue.node
    try:
        ours = {node.policy.institution: node.identity.public}
        reply_from_bytes(kept, dialogue.invitation.federation, ours)
    except Refused:
        return False
    return True
