"""Secure aggregation in one process: real state machines, real bytes, configured accidents.

Every institution is a `MaskedRun` of its own with its own identity, roster and secrets; the
coordinator is the `SecureCohort` of the deployment. `[faults]` makes institutions drop out at a
stage, or the coordinator attack: then the nodes refuse, and the round is lost instead of a secret.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Protocol

from fedlora.client.node.outbox import MemoryOutbox
from fedlora.client.secagg.masked_run import MaskedRun
from fedlora.common.config.schema import FaultsConfig
from fedlora.common.errors import BadInput, Refused
from fedlora.common.manifest.counts import answer_spec
from fedlora.common.manifest.manifest import RunManifest
from fedlora.common.manifest.plan import Delta, RoundPlan, Update
from fedlora.common.model.state import AdapterState
from fedlora.common.privacy.randomness import OsRandom, Random, bernoulli
from fedlora.common.protocol.stages import Stage
from fedlora.common.secagg import shamir, wire
from fedlora.common.secagg.cohort import CohortPolicy
from fedlora.common.trust.enrolment import Peer
from fedlora.common.trust.identity import Identity, PublicIdentity
from fedlora.server.rounds.cohort import Failure, replies_needed


class Trains(Protocol):
    """What is needed of a `Trainer`."""

    def train(self, plan: RoundPlan, state: AdapterState) -> Update:
        """One attempt at one round."""


TrainerOf = Callable[[str], Trains]


class Roster:
    """The institutions of a simulated federation, each approved by every operator."""

    def __init__(self, identities: Mapping[str, Identity], manifest: RunManifest) -> None:
        if manifest.secure is None:
            raise BadInput("manifest secure: found none, expected the terms of secure aggregation")
        self._manifest, self._colluders = manifest, manifest.secure.max_colluders
        self._identities = identities
        self.peers = {name: Peer(name, name, key.public) for name, key in identities.items()}
        self._runs: dict[str, MaskedRun] = {}

    def masked_run(self, name: str) -> MaskedRun:
        """The node of that name, which starts when it is first asked for."""
        if name not in self._runs:
            least = self._manifest.minimum_cohort
            policy = CohortPolicy(name, self.peers, least, self._colluders)
            key, outbox = self._identities[name], MemoryOutbox()
            self._runs[name] = MaskedRun.begun(key, policy, self._manifest, outbox)
        return self._runs[name]


class Institutions:
    """An `Exchange` whose institutions live in this process, each made when first asked."""

    def __init__(
        self,
        names: list[str],
        manifest: RunManifest,
        faults: FaultsConfig,
        trainer_of: TrainerOf,
        choose: Callable[[RoundPlan], list[str]],
        quorum: float,
    ) -> None:
        self._manifest, self._faults, self._quorum = manifest, faults, quorum
        self._trainer_of, self._choose = trainer_of, choose
        self._roster = Roster({name: Identity.generate() for name in names}, manifest)
        self._source: Random = OsRandom()
        self.masked_vectors = 0

    @property
    def peers(self) -> Mapping[str, Peer]:
        """The roster that every operator approved."""
        return self._roster.peers

    def gather(self) -> Mapping[str, PublicIdentity]:
        """All of them."""
        return {name: peer.identity for name, peer in self.peers.items()}

    def asked(
        self, members: Mapping[str, PublicIdentity], plan: RoundPlan
    ) -> tuple[list[str], list[Failure]]:
        """As drawn; nobody declines before a stage."""
        return self._choose(plan), []

    def needed(self, of: int) -> int:
        """A quorum, and as many as the manifest promises to each."""
        return replies_needed(of, self._quorum, self._manifest.minimum_cohort)

    def ask(
        self, stage: str, messages: Mapping[str, bytes], plan: RoundPlan, state: AdapterState
    ) -> Iterator[tuple[str, bytes | Failure]]:
        """One institution after the other, in the order of their names."""
        tampered = _attacked(self._faults.attack, stage, messages)
        gone = self._drop_outs(stage, len(messages))
        for (name, message), is_gone in zip(sorted(tampered.items()), gone, strict=True):
            yield (
                name,
                (
                    Failure(name, f"dropped out before {stage}")
                    if is_gone
                    else self._answer(name, stage, message, plan, state)
                ),
            )

    def _answer(
        self, name: str, stage: str, message: bytes, plan: RoundPlan, state: AdapterState
    ) -> bytes | Failure:
        spec = answer_spec(self._manifest, plan.phase, state.spec)

        def train() -> Delta:
            update = self._trainer_of(name).train(plan, state)
            update.check(plan, spec.size, masked=True)
            return update.delta

        try:
            run = self._roster.masked_run(name)
            answer = (
                run.input(message, plan, spec, train)
                if stage == Stage.INPUT
                else run.answer(stage, message, plan)
            )
        except (BadInput, Refused) as error:
            return Failure(name, f"{stage}: {error}", refused=isinstance(error, Refused))
        self.masked_vectors += stage == Stage.INPUT
        if (
            stage == Stage.OPEN
            and self._faults.attack == "corrupt-share"
            and name == min(self.peers)
        ):
            return _corrupted(answer)
        return answer

    def _drop_outs(self, stage: str, count: int) -> list[bool]:
        rate = _rates(self._faults)[stage]
        return [bool(each) for each in bernoulli(self._source, count, rate)]


def _rates(faults: FaultsConfig) -> dict[str, float]:
    return {
        Stage.OFFER: faults.keys,
        Stage.DEAL: faults.shares,
        Stage.INPUT: faults.input,
        Stage.CONFIRM: faults.confirm,
        Stage.OPEN: faults.open,
    }


def _attacked(attack: str, stage: str, messages: Mapping[str, bytes]) -> dict[str, bytes]:
    """What a hostile coordinator sends instead."""
    if attack == "sybil" and stage == Stage.DEAL:
        return {name: _with_sybil(message) for name, message in messages.items()}
    if attack == "small-u2" and stage == Stage.INPUT:
        return {name: _alone(name, message) for name, message in messages.items()}
    if attack == "two-lists" and stage == Stage.CONFIRM:
        return {
            name: _without_first(message) if place % 2 else message
            for place, (name, message) in enumerate(sorted(messages.items()))
        }
    return dict(messages)


def _with_sybil(members: bytes) -> bytes:
    offers = list(wire.cohort_from_bytes(members))
    stranger = Identity.generate()
    sybil = replace(offers[-1], name=offers[-1].name + "~")
    sybil = replace(sybil, signature=stranger.sign(wire.KEYS_TAG, *sybil.signed()))
    return wire.cohort_to_bytes([offer.to_bytes() for offer in [*offers, sybil]])


def _alone(name: str, delivery: bytes) -> bytes:
    if not delivery:
        return delivery
    whole = wire.Delivery.from_bytes(delivery)
    kept = [place for place, dealer in enumerate(whole.dealers) if dealer.name == name]
    dealers, sealed, paths = (
        tuple(part[place] for place in kept) for part in (whole.dealers, whole.sealed, whole.paths)
    )
    return wire.Delivery(dealers, sealed, paths).to_bytes()  # type: ignore[arg-type]


def _without_first(survivors: bytes) -> bytes:
    return wire.survivors_to_bytes(wire.survivors_from_bytes(survivors)[1:])


def _corrupted(opening: bytes) -> bytes:
    """Another share than the dealt one, on its way: the node's signature no longer fits."""
    message = wire.Opening.from_bytes(opening)
    return replace(message, shares=shamir.to_bytes(1) + message.shares[shamir.BYTES :]).to_bytes()
