"""Between the checks and the masks: what a trainer is asked, when, and never twice."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fedlora.client.node.outbox import MemoryOutbox
from fedlora.client.secagg.masked_run import MaskedRun
from fedlora.client.secagg.node import SecureNode
from fedlora.common.errors import BadInput, Refused
from fedlora.common.manifest.manifest import RunManifest, SecureTerms
from fedlora.common.manifest.plan import RoundPlan
from fedlora.common.model.state import Vector
from fedlora.common.secagg.cohort import CohortPolicy
from fedlora.common.secagg.wire import Epoch
from fedlora.server.secagg.epoch import ServerEpoch
from tests.secure_world import IDENTITIES, node_name, peers_of
from tests.server.fakes import SPEC, START, manifest_of

TERMS = SecureTerms("2n/3+1", 1, 2, 32, 1 << 22, (1.0,))
NAMES = [node_name(number) for number in range(3)]


class Counting:
    """Training that counts how often its data was touched."""

    def __init__(self, value: float = 0.5) -> None:
        self.calls, self.value = 0, value

    def __call__(self) -> Vector:
        self.calls += 1
        return np.full(SPEC.size, self.value, dtype=np.float32)


def manifest(secure: SecureTerms | None = TERMS) -> RunManifest:
    return replace(manifest_of(2, spare=2, mode="record", noise_multiplier=1.0), secure=secure)


def trainers(terms: SecureTerms = TERMS) -> dict[str, MaskedRun]:
    run = manifest(terms)
    made = {}
    for number, name in enumerate(NAMES):
        policy = CohortPolicy(name, peers_of(3), 3, 1)
        node = SecureNode(IDENTITIES[number], policy, run.federation, run.digest, MemoryOutbox())
        made[name] = MaskedRun(node, run)
    return made


def plan_of(attempt: int = 1, **changes: object) -> RoundPlan:
    return replace(RoundPlan(manifest().digest, 0, 1, attempt, START.digest), **changes)  # type: ignore[arg-type]


def never() -> Vector:
    raise AssertionError("data was touched")


def begun(made: dict[str, MaskedRun]) -> dict[str, bytes]:
    """Both stages of an epoch; what is delivered to each."""
    epoch = Epoch(manifest().federation, manifest().digest, 1, 1, 2)
    server = ServerEpoch(epoch, {name: peer.identity for name, peer in peers_of(3).items()}, 3)
    offer = epoch.to_bytes()
    for each in made.values():
        server.add_offer(each.answer("offer", offer, plan_of()))
    members = server.close_offers()
    for each in made.values():
        server.add_deal(each.answer("deal", members, plan_of()))
    server.close_deals()
    return {name: server.delivery(name) for name in made}


def test_an_attempt_is_trained_once_and_answered_by_the_same_bytes() -> None:
    made = trainers()
    delivered, counting = begun(made), Counting()
    node = made[NAMES[0]]
    first = node.input(delivered[NAMES[0]], plan_of(), SPEC, counting)
    again = node.input(b"", plan_of(), SPEC, never)
    assert first == again and counting.calls == 1
    with pytest.raises(Refused):
        node.input(b"", plan_of(round=2), SPEC, never)
    node.input(b"", plan_of(2, round=2), SPEC, counting)
    assert counting.calls == 2


def test_data_is_touched_after_the_checks_only() -> None:
    made = trainers()
    delivered = begun(made)
    node = made[NAMES[0]]
    for message, plan, kind in (
        (b"", plan_of(), Refused),  # no U2 yet
        (b"noise", plan_of(), BadInput),
        (delivered[NAMES[1]], plan_of(3), Refused),  # not of this epoch
        (b"", plan_of(phase=1), BadInput),
    ):
        with pytest.raises(kind):
            node.input(message, plan, SPEC, never)
    with pytest.raises(BadInput, match="expected one of offer"):
        node.answer("unmask", b"", plan_of())


def test_a_cohort_too_large_for_the_ring_is_refused_before_training() -> None:
    terms = replace(TERMS, levels=1 << 30)
    made = trainers(terms)
    run = manifest(terms)
    epoch = Epoch(run.federation, run.digest, 1, 1, 2)
    server = ServerEpoch(epoch, {name: peer.identity for name, peer in peers_of(3).items()}, 3)
    for each in made.values():
        server.add_offer(each.answer("offer", epoch.to_bytes(), plan_of()))
    members = server.close_offers()
    for each in made.values():
        server.add_deal(each.answer("deal", members, plan_of()))
    server.close_deals()
    with pytest.raises(BadInput, match="do not fit half of"):
        made[NAMES[0]].input(server.delivery(NAMES[0]), plan_of(), SPEC, never)


def test_terms_that_a_node_does_not_take() -> None:
    node = SecureNode(
        IDENTITIES[0], CohortPolicy(NAMES[0], peers_of(3), 3, 1), "test", "run", MemoryOutbox()
    )
    for run, said in (
        (manifest(None), "expected the terms"),
        (manifest(replace(TERMS, threshold="n/2")), "expected '2n/3[+]1'"),
    ):
        with pytest.raises(Refused, match=said):
            MaskedRun(node, run)
    for terms in (
        replace(TERMS, update_bounds=()),
        replace(TERMS, update_bounds=(0.0,)),
        replace(TERMS, bits=31),
        replace(TERMS, levels=0),
    ):
        with pytest.raises(BadInput):
            MaskedRun(node, manifest(terms))


def test_another_identity_than_the_rosters() -> None:
    with pytest.raises(BadInput, match="than its own key's"):
        SecureNode(
            IDENTITIES[1], CohortPolicy(NAMES[0], peers_of(3), 3, 1), "test", "run", MemoryOutbox()
        )


def test_terms_in_a_manifest_from_outside() -> None:
    run = manifest()
    assert RunManifest.from_bytes(run.to_bytes()) == run
    good = run.to_bytes().decode()
    for before, after in (
        ('"bits":32', '"bits":"32"'),
        ('"update_bounds":[1.0]', '"update_bounds":[-1.0]'),
        ('"update_bounds":[1.0]', '"update_bounds":1.0'),
        ('"levels":4194304,', ""),
        ('"levels":4194304,', '"levels":4194304,"more":1,'),
    ):
        assert before in good
        with pytest.raises(BadInput, match="manifest secure"):
            RunManifest.from_bytes(good.replace(before, after).encode())
