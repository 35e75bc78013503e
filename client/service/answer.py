"""The resident trainer: request bytes in, signed reply bytes out.

All that decides, and no transport:

    open      parse; the coordinator's signature, under the key that `join` pinned
    answer    an offer by a consent                                    (client.service.answer_offer)
              a start by an acknowledgement                            (client.service.answer_start)
              a task by an update                                      (client.service.answer_task)
              a stage of secure aggregation by its next message        (client.service.answer_stage)
              a part by how many there are, or by its bytes            (client.service.answer_parts)
    decline   what was refused, or went wrong: signed too, and noted in a log
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from functools import partial

from fedlora.client.consent.offer import kept_manifest
from fedlora.client.consent.verdict import Denied
from fedlora.client.node.folder import NodeFolder, pinned_invitation
from fedlora.client.node.outbox import Outbox
from fedlora.client.node.policy import Policy
from fedlora.client.node.waiting_runs import Offers
from fedlora.client.secagg.runs import MaskedRuns
from fedlora.client.service.answer_offer import answer_offer, open_offer
from fedlora.client.service.answer_parts import answer_fetch, answer_piece, open_fetch, open_piece
from fedlora.client.service.answer_stage import answer_stage, open_stage
from fedlora.client.service.answer_start import answer_start, open_start
from fedlora.client.service.answer_task import answer_task, open_task
from fedlora.client.service.dialogue import PRIVATE_REASON, Dialogue, Node, Place, PrivateFault
from fedlora.client.service.refusal_log import RefusalLog
from fedlora.client.service.ticks import Ticks, Watched
from fedlora.client.service.work import Work
from fedlora.common.disk.files import append_line, now
from fedlora.common.errors import BadInput, FedloraError, Refused
from fedlora.common.ledger.ledger import Ledger
from fedlora.common.privacy.modes import guarantee_of
from fedlora.common.protocol.messages import (
    Decline,
    Offer,
    SignedStage,
    SignedStart,
    reply_to_bytes,
    request_from_bytes,
)
from fedlora.common.protocol.pieces import Fetch, Piece
from fedlora.common.terminal import one_line, places
from fedlora.common.trust.identity import Identity

log = logging.getLogger(__name__)


class Resident:
    """One institution's trainer. Requests are taken one at a time, whoever sends them, and each is
    judged by the policy that lies on the disk then.

    Refused where the ledger is an older copy than what has left this node, or not the one that its
    data charge.
    """

    def __init__(
        self, folder: NodeFolder, policy: Policy, identity: Identity, ledger: Ledger, work: Work
    ) -> None:
        outbox = Outbox(folder.under(policy.trainer.outbox))
        masked = MaskedRuns(folder, policy, identity, outbox)
        self._watched = Watched(work)
        self._node = Node(
            folder, policy, identity, ledger, self._watched, Offers(folder), outbox, masked
        )
        self._ticks = Ticks(policy.trainer.answer_every, self._node.offers.place)
        self._turn = threading.Lock()
        self._refusals = RefusalLog(folder.refusals)
        self._one = threading.Lock()
        _check_history(self._node)
        folder.check_marks(policy, ledger.id)

    def ask_in_time(self, data: bytes) -> bytes:
        """As `ask`, when the answer may leave: at a tick, if data were touched for it.

        It is on disk before; whoever ends the process meanwhile loses nothing of it.
        """
        with self._turn:
            began = self._ticks.now()
            self._watched.taken()
            answer = self.ask(data)
            self._ticks.wait(self._watched.taken(), began)
            return answer

    def ask(self, data: bytes) -> bytes:
        """The signed reply to a request; never raises what a request can cause."""
        with self._one:
            try:
                self._node = self._node.present()
                dialogue = Dialogue(self._node, pinned_invitation(self._node.folder))
            except FedloraError as error:
                log.error("%s", error)
                return self._declined("", Place(), error)
            try:
                dialogue, answer = _opened(dialogue, data)
                return answer()
            except Exception as error:
                return self._declined(dialogue.invitation.federation, dialogue.place, error)

    def _declined(self, federation: str, place: Place, error: Exception) -> bytes:
        """A signed no, without a budget's figures; its reason whole only with no data in sight."""
        public = isinstance(error, BadInput | Refused)
        reason = one_line(str(error)) if public else PRIVATE_REASON
        inner = error.__cause__ or error
        known = inner if isinstance(error, PrivateFault) else error
        line = {
            "time": now(),
            "manifest": one_line(place.manifest)[:100],
            "round": place.round,
            "attempt": place.attempt,
            "reason": reason,
            "detail": one_line(str(inner)),
            "refused": isinstance(known, Refused),
        }
        if isinstance(error, Denied):
            # quotes no record: the node's report has it too
            line["verdict"] = one_line(error.detail)
        if not public:
            log.error("a request failed: %s", places(inner))
        told = line.get("verdict", reason)
        log.warning("refused%s: %s", f" {place.manifest[:20]}" * bool(place.manifest), told)
        try:
            if place.manifest:
                self._refusals.add(line)
            else:  # who can say anything may push out what was said before, and nothing else
                append_line(self._node.folder.strangers, line)
        except OSError as full:
            log.error("a refusal could not be logged (%s): %s", full, told)
        name = self._node.policy.institution
        # of what went wrong in sight of data a coordinator hears one thing, whatever it was
        refused = isinstance(error, Refused)
        decline = Decline(name, place.manifest, place.round, place.attempt, reason, refused)
        return reply_to_bytes(self._node.identity, federation, decline)


def _opened(dialogue: Dialogue, data: bytes) -> tuple[Dialogue, Callable[[], bytes]]:
    """The dialogue, about what was asked, once that is signed; and its answer, still to be made."""
    request = request_from_bytes(data, dialogue.node.policy.trainer.max_message_bytes)
    if isinstance(request, Offer):
        dialogue, manifest = open_offer(dialogue, request)
        return dialogue, partial(answer_offer, dialogue, request, manifest)
    if isinstance(request, SignedStart):
        dialogue, start = open_start(dialogue, request)
        return dialogue, partial(answer_start, dialogue, start, request.start.to_bytes())
    if isinstance(request, SignedStage):
        dialogue, asked = open_stage(dialogue, request)
        return dialogue, partial(answer_stage, dialogue, asked)
    if isinstance(request, Piece):
        dialogue, coming = open_piece(dialogue, request)
        return dialogue, partial(answer_piece, dialogue, request, coming)
    if isinstance(request, Fetch):
        dialogue, plan = open_fetch(dialogue, request)
        return dialogue, partial(answer_fetch, dialogue, plan, request.number)
    dialogue, plan = open_task(dialogue, request)
    return dialogue, partial(answer_task, dialogue, plan, request.vector, data)


def _check_history(node: Node) -> None:
    """Refused where the ledger knows less than this node kept of consents and releases.

    That is how a ledger and a head look that were both put back to an older day.
    """
    entries = [entry.body for entry in node.ledger.entries()]
    consented = {body["manifest"] for body in entries if body["kind"] == "consent"}
    for path in node.folder.manifests():
        _, manifest = kept_manifest(path)
        if not guarantee_of(manifest).private:
            continue
        left = {each.attempt for each in node.outbox.sizes(manifest.digest)} - {0}
        reserved = set(node.ledger.reservations(manifest.digest))
        if manifest.digest not in consented or left - reserved:
            raise Refused(
                f"ledger: knows less of {manifest.digest[:20]} than what was released: it and"
                " its head were restored from an older copy"
            )
