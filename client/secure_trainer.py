"""A trainer whose updates leave under masks: answers one stage at a time, and trains between the checks.

    offer, deal     an epoch's keys and shares                          (client.secagg)
    input           accept U2; may this attempt be masked at all?  Only then policy, ledger and training
                    (client.trainer); encode, mask, keep, answer
                    in mode "client": a share of the noise between encoding and mask  (common.skellam)
    confirm, open   U3, and one share of each

An input that was made before is answered by the same bytes, whatever else happened since.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from fedlora.client.secagg import SecureNode
from fedlora.common.errors import BadInput, Refused
from fedlora.common.messages import RoundPlan, RunManifest, Update
from fedlora.common.privacy import member_noise, releases_of
from fedlora.common.randomness import OsRandom
from fedlora.common.secagg import cohort, requests
from fedlora.common.secagg.ring import Ints
from fedlora.common.skellam import noised
from fedlora.common.state import AdapterSpec, AdapterState


class Trains(Protocol):
    """What is needed of a `Trainer`."""

    def train(self, plan: RoundPlan, state: AdapterState) -> Update:
        """One attempt at one round."""


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
        if manifest.mode == "client":
            _check_shared_noise(node, manifest, manifest.secure.max_colluders)
        for phase in range(len(manifest.phases)):
            requests.encoding_of(manifest.secure, phase, 1)
        self._node, self._manifest, self._terms = node, manifest, manifest.secure

    def answer(
        self, stage: str, message: bytes, plan: RoundPlan, state: AdapterState, trainer: Callable[[], Trains]
    ) -> bytes:
        """The answer to one stage; BadInput or Refused with the reason. `trainer` is made when all checks hold."""
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
        return self._input(message, plan, state, trainer)

    def _input(
        self, delivery: bytes, plan: RoundPlan, state: AdapterState, trainer: Callable[[], Trains]
    ) -> bytes:
        sent = self._node.sent(plan.round, plan.attempt)
        if sent is not None:
            return sent
        if delivery and not self._node.accepted:
            self._node.accept(delivery)
        slot = requests.slot_of(plan, self._manifest.base_digest)
        noise = member_noise(self._manifest, plan.phase)
        encoding = requests.encoding_of(self._terms, plan.phase, state.spec.size, noise)
        self._node.check(slot, encoding)
        carriers = self._carriers(plan.phase, state.spec) if self._manifest.mode == "client" else 0
        if state.digest != plan.adapter:
            raise BadInput(f"plan adapter: found {state.digest}, expected {plan.adapter}")
        update = trainer().train(plan, state)
        update.check(plan, state.spec.size)
        levels = encoding.encode(update.delta)
        if carriers:
            levels = self._noised(levels, plan.phase, state.spec, carriers)
        return self._node.mask(slot, encoding, levels)

    def _carriers(self, phase: int, spec: AdapterSpec) -> int:
        """t - c of this cohort; Refused before anything trains where fewer carry the noise than was promised."""
        promised, colluders = self._manifest.skellam, self._terms.max_colluders
        if promised is None:
            raise Refused("manifest skellam: found none, expected the terms of shared noise")
        cohort.check_colluders(self._node.members, colluders)
        carriers = cohort.threshold(self._node.members) - colluders
        if carriers < promised.carriers:
            raise Refused(
                f"cohort: {self._node.members} members leave {carriers} to carry the noise, expected at least "
                f"{promised.carriers}"
            )
        moved = int(spec.moved_by(self._manifest.phases[phase].name).sum())
        if promised.coordinates[phase] != moved:
            raise BadInput(
                f"manifest skellam coordinates: found {promised.coordinates[phase]} in phase {phase}, "
                f"expected the {moved} that it moves"
            )
        return carriers

    def _noised(self, levels: Ints, phase: int, spec: AdapterSpec, carriers: int) -> Ints:
        moved = spec.moved_by(self._manifest.phases[phase].name)
        return noised(OsRandom(), levels, moved, releases_of(self._manifest)[phase], carriers)


def _check_shared_noise(node: SecureNode, manifest: RunManifest, colluders: int) -> None:
    """Refused where this node expects more colluders than the others share their noise for.

    They add the variance over t - c. Under a larger c of its own, what the honest ones add would be less than what
    ε was computed for, and a larger share of this node alone would not make up for it.
    """
    releases_of(manifest)
    if colluders < node.max_colluders:
        raise Refused(
            f"manifest secure max_colluders: found {colluders}, expected at least this node's {node.max_colluders}: "
            "the others' shares of the noise follow from it"
        )
