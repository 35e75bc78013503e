"""Secure aggregation through a Flower grid.

Opaque envelopes, late and lying carriers, and the plain sum at the end.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedlora.client.node.outbox import MemoryOutbox
from fedlora.client.secagg.masked_run import MaskedRun
from fedlora.client.secagg.node import SecureNode
from fedlora.common.errors import FedloraError
from fedlora.common.manifest.manifest import SecureTerms
from fedlora.common.manifest.plan import RoundPlan
from fedlora.common.model.state import AdapterSpec, AdapterState, TensorSpec
from fedlora.common.protocol import flower
from fedlora.common.protocol.messages import (
    STAGE_TAG,
    Decline,
    Reply,
    SignedStage,
    Staged,
    reply_to_bytes,
    request_from_bytes,
)
from fedlora.common.protocol.stages import Request, slot_of
from fedlora.common.secagg.cohort import CohortPolicy, survivors_digest
from fedlora.common.secagg.wire import OPENING_TAG, Deal, Opening
from fedlora.server.coordinator.coordinator import Coordinator
from fedlora.server.deployment.flower import REQUEST, GridCarrier
from fedlora.server.rounds.cohort import CohortSum, Failure
from fedlora.server.secagg.sums import SecureCohort
from tests.secure_world import IDENTITIES, node_name, peers_of
from tests.server.deployment.test_flower import COORDINATOR, SUPERLINK, Everybody, FakeGrid
from tests.server.fakes import SPEC, START, manifest_of

COUNT = 5
TERMS = SecureTerms("2n/3+1", 1, 4, 32, 1 << 22, (8.0,))
MANIFEST = replace(
    manifest_of(9, spare=3, mode="record", noise_multiplier=1.0), secure=TERMS, minimum_cohort=3
)
NAMES = [node_name(number) for number in range(COUNT)]


@pytest.fixture(autouse=True)
def _identity(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("_task_id", 1), ("_run_id", 7), ("_node_id", SUPERLINK)):
        monkeypatch.setattr(TaskIdentity, name, value)


class Institution:
    """What a relay and its trainer do together; `mood` says how it misbehaves."""

    def __init__(self, number: int) -> None:
        self.name, self.mood, self.seconds = node_name(number), "", 1.0
        policy = CohortPolicy(self.name, peers_of(COUNT), 3, 1)
        node = SecureNode(
            IDENTITIES[number], policy, MANIFEST.federation, MANIFEST.digest, MemoryOutbox()
        )
        self.node = MaskedRun(node, MANIFEST)
        self.delta = np.random.default_rng(number).normal(size=SPEC.size).astype(np.float32)

    def answers(self, message: Message) -> list[tuple[float, Message]]:
        return [(self.seconds, Message(self.record(message.content), reply_to=message))]

    def record(self, content: RecordDict) -> RecordDict:
        kind, data = flower.read_envelope(content, 1 << 20)
        stage = request_from_bytes(data)
        assert kind == REQUEST and isinstance(stage, SignedStage)
        request = Request.from_bytes(stage.request.opened(STAGE_TAG, COORDINATOR.public))
        assert request.institution == self.name
        if self.mood == request.stage:
            return self.signed(request.plan, b"noise")
        if self.mood == "other kind":
            return flower.envelope_record("update", b"")
        if self.mood == "no envelope":
            return RecordDict()
        plan, size = request.plan, len(request.vector) // 4
        assert size == (SPEC.size if request.stage == "input" else 0)
        try:
            answer = (
                self.node.input(request.message, plan, SPEC, lambda: self.delta)
                if request.stage == "input"
                else self.node.answer(request.stage, request.message, plan)
            )
        except FedloraError as error:
            return self.envelope(Decline(self.name, "", 0, 0, str(error), False))
        if self.mood == "garbage" and request.stage == "deal":
            deal = Deal.from_bytes(answer)
            answer = replace(
                deal, sealed=tuple(bytes(len(part)) for part in deal.sealed)
            ).to_bytes()
        if self.mood == "lie" and request.stage == "open":
            answer = self.lie(answer, request.plan)
        if self.mood == "other attempt":
            plan = replace(plan, attempt=plan.attempt - 1)
        return self.signed(plan, answer)

    def signed(self, plan: RoundPlan, message: bytes) -> RecordDict:
        staged = Staged(self.name, plan.manifest, plan.round, plan.attempt, message)
        return self.envelope(staged)

    def envelope(self, reply: Reply) -> RecordDict:
        key = IDENTITIES[int(self.name[-3:])]
        return flower.envelope_record(REQUEST, reply_to_bytes(key, MANIFEST.federation, reply))

    def lie(self, answer: bytes, plan: RoundPlan) -> bytes:
        """Another share than the one that was dealt, properly signed."""
        state = self.node.node._state
        assert state is not None
        context = slot_of(plan, MANIFEST.base_digest).context(state.epoch)
        opening = Opening.from_bytes(answer)
        wrong = replace(opening, shares=opening.shares[:-32] + bytes(32))
        signed = wrong.signed(context, survivors_digest(context, state.dealers, NAMES))
        signature = IDENTITIES[int(self.name[-3:])].sign(OPENING_TAG, *signed)
        return replace(wrong, signature=signature).to_bytes()


def everybody(grid: FakeGrid, nodes: dict[str, int]) -> Everybody:
    members = {name: peer.identity for name, peer in peers_of(COUNT).items()}
    coordinator = Coordinator(MANIFEST.federation, COORDINATOR, lambda: members)
    carrier = GridCarrier(grid, lambda: nodes, grid.clock())
    who = Everybody(MANIFEST, coordinator, carrier, Path("unused"), 60.0, 0.01)
    who.names = NAMES
    return who


class Federation:
    def __init__(self) -> None:
        self.institutions = [Institution(number) for number in range(COUNT)]
        self.grid = FakeGrid(
            {10 + number: each.answers for number, each in enumerate(self.institutions)}
        )
        self.nodes = {name: 10 + number for number, name in enumerate(NAMES)}
        self.who = everybody(self.grid, self.nodes)
        self.cohort = SecureCohort(MANIFEST, self.who)

    def round(self, number: int) -> CohortSum:
        return self.cohort.total(RoundPlan(MANIFEST.digest, 0, number, number, START.digest), START)

    def plain(self, *without: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        total = np.zeros(SPEC.size)
        for number, each in enumerate(self.institutions):
            if number not in without:
                total += each.delta
        return total


def test_rounds_through_a_grid_give_the_plain_sum_in_three_exchanges() -> None:
    federation = Federation()
    for number in range(1, 5):
        found = federation.round(number)
        assert found.replies == COUNT and not found.failures
        assert np.abs(found.total - federation.plain()).max() < COUNT * 8.0 / TERMS.levels
    assert federation.grid.sent == COUNT * (2 + 4 * 3)  # one epoch of four attempts


@pytest.mark.parametrize("mood", ["input", "other kind", "no envelope"])
def test_a_carrier_that_answers_nonsense_is_a_drop_out(mood: str) -> None:
    federation = Federation()
    federation.round(1)
    federation.institutions[2].mood = mood
    found = federation.round(2)
    assert found.replies == 4 and [failure.client for failure in found.failures] == [NAMES[2]]
    assert np.abs(found.total - federation.plain(2)).max() < COUNT * 8.0 / TERMS.levels
    assert found.secure is not None and (found.secure.dealt, found.secure.members) == (5, 4)


def test_what_a_node_signed_for_another_attempt_is_a_drop_out() -> None:
    federation = Federation()
    federation.round(1)
    federation.institutions[2].mood = "other attempt"
    found = federation.round(2)
    assert found.replies == 4
    (failure,) = found.failures
    assert failure == Failure(NAMES[2], "found a staged of another attempt or kind")


def test_a_late_answer_is_a_drop_out_and_is_back_in_the_next_attempt() -> None:
    federation = Federation()
    federation.round(1)
    federation.institutions[0].seconds = 61.0
    found = federation.round(2)
    assert found.replies == 4 and "no answer within 60 s" in found.failures[0].reason
    federation.institutions[0].seconds = 1.0
    assert federation.round(3).replies == 5


def test_a_nodes_reason_reaches_the_coordinator() -> None:
    federation = Federation()
    federation.round(1)
    found = federation.cohort.total(RoundPlan(MANIFEST.digest, 0, 2, 1, START.digest), START)
    assert found.replies == 0
    assert any("is not open at this node" in failure.reason for failure in found.failures)


def test_a_liar_is_named_and_left_out_of_later_epochs() -> None:
    """The round still ends with the sum of all five inputs.

    From the next epoch on there are four.
    """
    federation = Federation()
    federation.institutions[3].mood = "lie"
    found = federation.round(1)
    assert found.replies == 5 and found.secure is not None and found.secure.liars == (NAMES[3],)
    assert np.abs(found.total - federation.plain()).max() < COUNT * 8.0 / TERMS.levels
    federation.institutions[3].mood = ""
    found = federation.round(5)  # beyond the epoch of attempts 1 to 4
    assert found.replies == 4 and found.failures[0].reason.startswith("left out")
    assert np.abs(found.total - federation.plain(3)).max() < COUNT * 8.0 / TERMS.levels


def test_a_dealer_that_several_can_not_open_is_left_out_without_being_called_a_liar(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One attempt is lost; the next epoch goes on without it.

    Where all are needed it is asked again.
    """
    federation = Federation()
    federation.institutions[1].mood = "garbage"
    found = federation.round(1)
    assert (
        found.replies == 0
        and "1 shares of node-001 were opened, expected 4" in found.failures[0].reason
    )
    assert "no proof" in caplog.text and NAMES[1] in caplog.text
    federation.institutions[1].mood = ""
    found = federation.round(2)
    assert found.replies == 4 and "no proof" in found.failures[0].reason
    assert found.secure is not None and (found.secure.liars, found.secure.suspected) == ((), ())
    federation.who._quorum = 1.0
    assert federation.round(5).replies == 5


class Sink(FakeGrid):
    """Takes each message on its way and keeps nothing; nobody answers."""

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        self.sent += len(list(messages))
        return [f"message-{self.sent}"]


def peak_of(asking: Callable[[], Iterator[tuple[str, bytes | Failure]]]) -> int:
    tracemalloc.start()
    try:
        for _ in asking():
            pass
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def peak(count: int, size: int = 1 << 18) -> int:
    """Bytes at most while the input is asked of so many."""
    spec = AdapterSpec((TensorSpec("lora.a", (size,)),))
    state, plan = AdapterState.zeros(spec), RoundPlan(MANIFEST.digest, 0, 1, 1, START.digest)
    messages = {f"node-{number}": b"" for number in range(count)}
    nodes = {name: 10 + number for number, name in enumerate(messages)}
    grid = Sink(dict.fromkeys(nodes.values(), lambda message: []))
    who = everybody(grid, nodes)
    return peak_of(lambda: who.ask("input", messages, plan, state))


def test_memory_does_not_grow_with_nodes_times_parameters() -> None:
    """Each node's request holds the model, and is gone once it is sent."""
    few, many = peak(5), peak(50)
    assert many < few + 2 * (1 << 20)  # a model is 1 MiB


def test_who_has_no_node_is_a_drop_out() -> None:
    federation = Federation()
    del federation.nodes[NAMES[4]]
    found = federation.round(1)
    assert found.replies == 4 and found.failures[0].reason == "not connected"
