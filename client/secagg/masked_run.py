"""A run whose updates leave under masks: a stage at a time, trained between the checks.

    offer, deal     an epoch's keys and shares                             (client.secagg.node)
    input           accept U2; may this attempt be masked at all? Only then policy, ledger and
                    training                                               (client.training.trainer)
                    encode, mask, keep, answer; between encoding and mask a share of the noise,
                    where the run's guarantee shares it        (common.privacy.shared_noise)
    confirm, open   U3, and one share of each

An input that was made before is answered by the same bytes, whatever else happened since.
"""

from __future__ import annotations

from collections.abc import Callable

from fedlora.client.node.outbox import MaskedOutbox
from fedlora.client.secagg.node import SecureNode
from fedlora.common.errors import BadInput, Refused
from fedlora.common.manifest.manifest import RunManifest, SecureTerms
from fedlora.common.manifest.plan import Delta, RoundPlan
from fedlora.common.manifest.turns import taken
from fedlora.common.model.state import AdapterSpec
from fedlora.common.privacy.modes import guarantee_of
from fedlora.common.protocol import stages
from fedlora.common.protocol.stages import Stage
from fedlora.common.secagg import cohort
from fedlora.common.secagg.cohort import CohortPolicy
from fedlora.common.secagg.ring import Encoding
from fedlora.common.secagg.wire import Epoch
from fedlora.common.trust.identity import Identity

Train = Callable[[], Delta]  # reserves and trains one attempt, and gives its update


class MaskedRun:
    """One institution in one run. Refused where the manifest's terms are not its own policy's."""

    def __init__(self, node: SecureNode, manifest: RunManifest) -> None:
        self._terms = checked_terms(manifest, node.policy)
        self.node, self._manifest = node, manifest
        self._guarantee = guarantee_of(manifest)

    @classmethod
    def begun(
        cls, identity: Identity, policy: CohortPolicy, manifest: RunManifest, outbox: MaskedOutbox
    ) -> MaskedRun:
        """The run at a node that has just started: it has its outbox, and no secrets."""
        noised = guarantee_of(manifest).private
        names = manifest.federation, manifest.digest
        return cls(SecureNode(identity, policy, *names, outbox, noised), manifest)

    def answer(self, stage: str, message: bytes, plan: RoundPlan) -> bytes:
        """The answer to a stage in which nobody trains; BadInput or Refused with the reason."""
        node = self.node
        if stage == Stage.OFFER:
            return node.offer(Epoch.from_bytes(message))
        if stage == Stage.DEAL:
            return node.deal(message)
        if stage == Stage.CONFIRM:
            return node.confirm(plan.attempt, message)
        if stage == Stage.OPEN:
            return node.open(plan.attempt, message)
        raise BadInput(f"stage: found {stage!r}, expected one of {', '.join(Stage)}")

    def input(self, delivery: bytes, plan: RoundPlan, spec: AdapterSpec, train: Train) -> bytes:
        """The masked input of an attempt; `train` is called when all checks hold, at most once."""
        sent = self.node.sent(plan.round, plan.attempt)
        if sent is not None:
            return sent
        self.check(delivery, plan, spec)
        return self.mask(plan, spec, train())

    def check(self, delivery: bytes, plan: RoundPlan, spec: AdapterSpec) -> None:
        """Accept U2, and see that the attempt may be masked: before data are touched."""
        if delivery and not self.node.accepted:
            self.node.accept(delivery)
        size = int(self._manifest.leaving(spec, plan.round).sum())
        self.node.check(
            stages.slot_of(plan, self._manifest.base_digest), self._encoding(plan.phase, size)
        )
        self._guarantee.check_cohort(plan.phase, spec, self.node.members)

    def mask(self, plan: RoundPlan, spec: AdapterSpec, update: Delta) -> bytes:
        """The masked input of an attempt, durable before it is returned: what leaves of it."""
        whole = self._encoding(plan.phase, spec.size).encode(update)
        noised = self._guarantee.noised(whole, plan, spec, self.node.members)
        levels = taken(noised, self._manifest.leaving(spec, plan.round))
        encoding = self._encoding(plan.phase, len(levels))
        return self.node.mask(stages.slot_of(plan, self._manifest.base_digest), encoding, levels)

    def _encoding(self, phase: int, size: int) -> Encoding:
        return stages.encoding_of(self._terms, phase, size, self._guarantee.member_noise(phase))


def checked_terms(manifest: RunManifest, policy: CohortPolicy) -> SecureTerms:
    """The run's terms of secure aggregation; Refused where this node could not take part."""
    terms = manifest.secure
    if terms is None:
        raise Refused("manifest secure: found none, expected the terms of secure aggregation")
    if terms.threshold != cohort.THRESHOLD_RULE:
        raise Refused(
            f"manifest secure threshold: found {terms.threshold!r}, "
            f"expected {cohort.THRESHOLD_RULE!r}"
        )
    guarantee_of(manifest).check_node(policy.max_colluders)
    for phase in range(len(manifest.accounted)):
        stages.encoding_of(terms, phase, 1)
    return terms
