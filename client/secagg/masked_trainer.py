"""A trainer whose updates leave under masks: a stage at a time, trained between the checks.

    offer, deal     an epoch's keys and shares                             (client.secagg.node)
    input           accept U2; may this attempt be masked at all? Only then policy, ledger and
                    training                                               (client.training.trainer)
                    encode, mask, keep, answer; between encoding and mask a share of the noise,
                    where the run's guarantee shares it        (common.privacy.institution_level)
    confirm, open   U3, and one share of each

An input that was made before is answered by the same bytes, whatever else happened since.
"""

from __future__ import annotations

from collections.abc import Callable

from fedlora.client.secagg.node import Possible, SecureNode
from fedlora.common.errors import BadInput, Refused
from fedlora.common.manifest.manifest import RunManifest
from fedlora.common.manifest.plan import RoundPlan
from fedlora.common.model.state import AdapterSpec, Vector
from fedlora.common.privacy.modes import guarantee_of
from fedlora.common.protocol import stages
from fedlora.common.secagg import cohort
from fedlora.common.secagg.cohort import CohortPolicy
from fedlora.common.secagg.ring import Encoding

Train = Callable[[], Vector]  # reserves and trains one attempt, and gives its update


class SecureTrainer:
    """One institution in one run. Refused where the manifest's terms are not its own policy's."""

    def __init__(self, node: SecureNode, manifest: RunManifest) -> None:
        if manifest.secure is None:
            raise Refused("manifest secure: found none, expected the terms of secure aggregation")
        if manifest.secure.threshold != cohort.THRESHOLD_RULE:
            raise Refused(
                f"manifest secure threshold: found {manifest.secure.threshold!r}, "
                f"expected {cohort.THRESHOLD_RULE!r}"
            )
        self._guarantee = guarantee_of(manifest)
        self._guarantee.check_node(node.policy.max_colluders)
        for phase in range(len(manifest.phases)):
            stages.encoding_of(manifest.secure, phase, 1)
        self._node, self._manifest, self._terms = node, manifest, manifest.secure

    @property
    def confirmed(self) -> Possible | None:
        """The last attempt that this node helped to unmask."""
        return self._node.confirmed

    def possible(self, plan: RoundPlan) -> Possible:
        """The sum that an input for `plan` may be in, whether or not this node will hear of it."""
        return self._node.possible(plan.round, plan.attempt)

    def adopt(self, policy: CohortPolicy) -> None:
        """The operator's roster and limits as they are now."""
        self._node.adopt(policy)

    def sent(self, plan: RoundPlan) -> bytes | None:
        """The masked input that was made for this attempt, or None."""
        return self._node.sent(plan.round, plan.attempt)

    def answer(self, stage: str, message: bytes, plan: RoundPlan) -> bytes:
        """The answer to a stage in which nobody trains; BadInput or Refused with the reason."""
        node = self._node
        if stage == stages.OFFER:
            return node.offer(stages.epoch_from_bytes(message))
        if stage == stages.DEAL:
            return node.deal(message)
        if stage == stages.CONFIRM:
            return node.confirm(plan.attempt, message)
        if stage == stages.OPEN:
            return node.open(plan.attempt, message)
        raise BadInput(f"stage: found {stage!r}, expected one of {', '.join(stages.STAGES)}")

    def input(self, delivery: bytes, plan: RoundPlan, spec: AdapterSpec, train: Train) -> bytes:
        """The masked input of an attempt; `train` is called when all checks hold, at most once."""
        return self.prepare(delivery, plan, spec) or self.mask(plan, spec, train())

    def prepare(self, delivery: bytes, plan: RoundPlan, spec: AdapterSpec) -> bytes | None:
        """Accept U2, and see that the attempt may be masked: before data are touched.

        What was sent for it, if it was.
        """
        sent = self.sent(plan)
        if sent is not None:
            return sent
        if delivery and not self._node.accepted:
            self._node.accept(delivery)
        self._node.check(
            stages.slot_of(plan, self._manifest.base_digest), self._encoding(plan.phase, spec.size)
        )
        self._guarantee.check_cohort(plan.phase, spec, self._node.members)
        return None

    def mask(self, plan: RoundPlan, spec: AdapterSpec, update: Vector) -> bytes:
        """The masked input of an attempt, durable before it is returned."""
        encoding = self._encoding(plan.phase, spec.size)
        levels = self._guarantee.noised(
            encoding.encode(update), plan.phase, spec, self._node.members
        )
        return self._node.mask(stages.slot_of(plan, self._manifest.base_digest), encoding, levels)

    def _encoding(self, phase: int, size: int) -> Encoding:
        return stages.encoding_of(self._terms, phase, size, self._guarantee.member_noise(phase))
