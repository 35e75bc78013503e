"""A trainer whose updates leave under masks: answers one stage at a time, and trains between the checks.

    offer, deal     an epoch's keys and shares                          (client.secagg)
    input           accept U2; may this attempt be masked at all?  Only then policy, ledger and training
                    (client.trainer); encode, mask, keep, answer
    confirm, open   U3, and one share of each

An input that was made before is answered by the same bytes, whatever else happened since.
"""

from __future__ import annotations

from collections.abc import Callable

from fedlora.client.secagg import SecureNode, Unmasked
from fedlora.common.errors import BadInput, Refused
from fedlora.common.messages import RoundPlan, RunManifest
from fedlora.common.secagg import cohort, requests
from fedlora.common.secagg.cohort import CohortPolicy
from fedlora.common.state import Vector

Train = Callable[[], Vector]  # reserves and trains one attempt, and gives its noised update


class SecureTrainer:
    """One institution in one run. Refused where the manifest's terms are not what its own policy takes."""

    def __init__(self, node: SecureNode, manifest: RunManifest) -> None:
        if manifest.secure is None:
            raise Refused("manifest secure: found none, expected the terms of secure aggregation")
        if manifest.secure.threshold != cohort.THRESHOLD_RULE:
            raise Refused(
                f"manifest secure threshold: found {manifest.secure.threshold!r}, "
                f"expected {cohort.THRESHOLD_RULE!r}"
            )
        for phase in range(len(manifest.phases)):
            requests.encoding_of(manifest.secure, phase, 1)
        self._node, self._manifest, self._terms = node, manifest, manifest.secure

    def adopt(self, policy: CohortPolicy) -> None:
        """The operator's roster and limits as they are now."""
        self._node.adopt(policy)

    @property
    def unmasked(self) -> Unmasked | None:
        """The last attempt that this node helped to unmask."""
        return self._node.unmasked

    def sent(self, plan: RoundPlan) -> bytes | None:
        """The masked input that was made for this attempt, or None."""
        return self._node.sent(plan.round, plan.attempt)

    def answer(self, stage: str, message: bytes, plan: RoundPlan, size: int, train: Train) -> bytes:
        """The answer to one stage; BadInput or Refused with the reason.

        `size` is of the adapter that the plan starts from. `train` is called when all checks hold, at most once.
        """
        node = self._node
        if stage == requests.OFFER:
            return node.offer(requests.epoch_from_bytes(message))
        if stage == requests.DEAL:
            return node.deal(message)
        if stage == requests.CONFIRM:
            return node.confirm(plan.attempt, message)
        if stage == requests.OPEN:
            return node.open(plan.attempt, message)
        if stage != requests.INPUT:
            raise BadInput(f"stage: found {stage!r}, expected one of {', '.join(requests.STAGES)}")
        return self.prepare(message, plan, size) or self.mask(plan, train())

    def prepare(self, delivery: bytes, plan: RoundPlan, size: int) -> bytes | None:
        """Accept U2, and see that the attempt may be masked: before data are touched. What was sent for it, if it was."""
        sent = self.sent(plan)
        if sent is not None:
            return sent
        if delivery and not self._node.accepted:
            self._node.accept(delivery)
        slot = requests.slot_of(plan, self._manifest.base_digest)
        self._node.check(slot, requests.encoding_of(self._terms, plan.phase, size))
        return None

    def mask(self, plan: RoundPlan, update: Vector) -> bytes:
        """The masked input of an attempt, durable before it is returned."""
        slot = requests.slot_of(plan, self._manifest.base_digest)
        encoding = requests.encoding_of(self._terms, plan.phase, update.size)
        return self._node.mask(slot, encoding, encoding.encode(update))
