"""The grid's carrier and the cohort over it, against nodes that are late, dead, double-tongued or
wrong, all in process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from flwr.app import Message, RecordDict
from flwr.app.error import Error
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.common.config.schema import AggregationConfig, LoraConfig, ModelConfig
from fedlora.common.manifest.manifest import Network, Phase, RunManifest
from fedlora.common.manifest.plan import RoundPlan
from fedlora.common.model.state import AdapterSpec, AdapterState, TensorSpec
from fedlora.common.protocol import flower
from fedlora.common.protocol.messages import (
    PLAN_TAG,
    Answer,
    Consent,
    Decline,
    Reply,
    Task,
    reply_to_bytes,
    request_from_bytes,
)
from fedlora.common.protocol.vectors import vector_from_bytes, vector_to_bytes
from fedlora.common.trust.identity import Identity, PublicIdentity
from fedlora.server.coordinator.coordinator import Coordinator
from fedlora.server.deployment.cohorts import ClearCohort
from fedlora.server.deployment.flower import REQUEST, Clock, GridCarrier
from fedlora.server.deployment.institutions import Institutions
from fedlora.server.rounds.cohort import Failure
from fedlora.server.strategies.gathered import Gather, Summed, gathering

SPEC = AdapterSpec((TensorSpec("head.weight", (3,)),))
STATE = AdapterState.zeros(SPEC)
# a learning rate at which no finite value of these tests is beyond the bound on an update's norm
PHASE = Phase("adapter", 3, 4, 2, 0.02, 128.0, 0.7, 1.0, 0.0, "adamw", 1e9, True, 0.0)
MANIFEST = RunManifest(
    federation="test",
    run="0" * 32,
    task="sequence-classification",
    labels=("a", "b"),
    base_digest="sha256:b",
    spec_digest=SPEC.digest,
    projection_digest="",
    max_length=64,
    mode="none",
    unit="",
    epsilon=0.0,
    delta=0.0,
    strategy="fedavg",
    participation=1.0,
    minimum_cohort=1,
    seed=0,
    network=Network.of(ModelConfig(pooling="default"), LoraConfig(targets=("query", "value"))),
    phases=(PHASE,),
)
PLAN = RoundPlan(MANIFEST.digest, phase=0, round=2, attempt=4, adapter=STATE.digest)
DEADLINE = 60.0
COORDINATOR = Identity.generate()
FOLDER = TemporaryDirectory()  # for the plans that were sent
SUPERLINK = 1  # the node id in whose name Flower reports a dead node

Behaviour = Callable[[Message], list[tuple[float, Message]]]


@pytest.fixture(autouse=True)
def _identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower stamps messages with the process's task, which a run sets."""
    for name, value in (("_task_id", 1), ("_run_id", 7), ("_node_id", SUPERLINK)):
        monkeypatch.setattr(TaskIdentity, name, value)


@dataclass
class FakeGrid(Grid):
    """Nodes answer by script: `nodes[id]` turns a message into (seconds until, reply) pairs."""

    nodes: dict[int, Behaviour]
    online: dict[int, float] = field(default_factory=dict)  # from when on; 0 where missing
    time: float = 0.0
    sent: int = 0
    sleeps: list[float] = field(default_factory=list)
    pulled: list[set[str]] = field(default_factory=list)
    _due: list[tuple[float, Message]] = field(default_factory=list)

    def clock(self) -> Clock:
        return Clock(lambda: self.time, self._sleep)

    def _sleep(self, seconds: float) -> None:
        assert seconds >= 0
        assert len(self.sleeps) < 1000, "the cohort never gave up"
        self.sleeps.append(seconds)
        self.time += seconds

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            self.sent += 1
            message.metadata.__dict__["_message_id"] = f"message-{self.sent}"
            if message.metadata.dst_node_id not in self.nodes:
                continue  # an in-memory grid leaves out what it can't take
            behaviour = self.nodes[message.metadata.dst_node_id]
            self._due += [(self.time + seconds, reply) for seconds, reply in behaviour(message)]
            ids.append(message.metadata.message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        self.pulled.append(set(message_ids))
        arrived = [reply for due, reply in self._due if due <= self.time]
        self._due = [(due, reply) for due, reply in self._due if due > self.time]
        return arrived

    def set_run(self, run: Run) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Run:
        raise NotImplementedError

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return [node for node in self.nodes if self.online.get(node, 0.0) <= self.time]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        raise NotImplementedError


@cache
def key_of(name: str) -> Identity:
    return Identity.generate()


def name_of(message: Message) -> str:
    return message.metadata.group_id


def signed(reply: Reply, by: str | None = None) -> RecordDict:
    key = key_of(reply.institution if by is None else by)
    return flower.envelope_record(REQUEST, reply_to_bytes(key, MANIFEST.federation, reply))


def answer(message: Message, value: float = 1.0) -> Answer:
    """A node's update, after it has read what it was asked."""
    kind, data = flower.read_envelope(message.content, 1 << 20)
    task = request_from_bytes(data)
    assert kind == REQUEST and isinstance(task, Task)
    plan = RoundPlan.from_bytes(task.plan.opened(PLAN_TAG, COORDINATOR.public))
    assert not vector_from_bytes(task.vector, 3, "task").any()
    delta = vector_to_bytes(np.full(3, value, dtype=np.float32))
    return Answer(name_of(message), plan.manifest, plan.round, plan.attempt, delta)


def update(message: Message, value: float = 1.0, **changes: object) -> RecordDict:
    return signed(replace(answer(message, value), **changes))  # type: ignore[arg-type]


def declined(message: Message, reason: str, refused: bool = True) -> RecordDict:
    return signed(Decline(name_of(message), "", 0, 0, reason, refused))


def answers(content: Callable[[Message], RecordDict], after: float = 0.0) -> Behaviour:
    return lambda message: [(after, Message(content(message), reply_to=message))]


def good(value: float = 1.0, after: float = 0.0) -> Behaviour:
    return answers(lambda message: update(message, value), after)


def silent(message: Message) -> list[tuple[float, Message]]:
    return []


def error(code: int, reason: str, source: int | None = None) -> Behaviour:
    def behaviour(message: Message) -> list[tuple[float, Message]]:
        reply = Message(Error(code, reason), reply_to=message)
        if source is not None:
            reply.metadata.__dict__["_src_node_id"] = source
        return [(0.0, reply)]

    return behaviour


def twice(first: Behaviour, second: Behaviour) -> Behaviour:
    return lambda message: first(message) + second(message)


class Everybody(Institutions):
    """Asks each of `names`, with the whole deadline at each stage."""

    names: Sequence[str] = ()
    left = DEADLINE

    def gather(self) -> Mapping[str, PublicIdentity]:
        return self.coordinator.members()

    def asked(
        self, members: Mapping[str, PublicIdentity], plan: RoundPlan
    ) -> tuple[list[str], list[Failure]]:
        return list(self.names), []


def cohort_of(
    grid: FakeGrid,
    nodes: dict[str, int] | None = None,
    clock: Clock | None = None,
    gather: Gather = Summed,
) -> ClearCohort:
    nodes = {f"client-{node}": node for node in grid.nodes} if nodes is None else nodes
    members = {name: key_of(name).public for name in nodes}
    coordinator = Coordinator(MANIFEST.federation, COORDINATOR, lambda: members)
    carrier = GridCarrier(grid, lambda: nodes, clock or grid.clock())
    who = Everybody(MANIFEST, coordinator, carrier, Path(FOLDER.name), DEADLINE, 1.0)
    who.names = list(nodes)
    return ClearCohort(who, gather)


def test_the_sum_of_good_updates() -> None:
    grid = FakeGrid({10: good(1.0), 11: good(2.0, after=0.5), 12: good(4.0, after=3.0)})
    found = cohort_of(grid).total(PLAN, STATE)
    assert found.total.dtype == np.float64
    np.testing.assert_array_equal(found.total, [7.0, 7.0, 7.0])
    assert (found.replies, found.asked, found.failures) == (3, 3, ())
    assert 3.0 <= grid.time < 4.0


def test_of_a_run_by_turns_the_half_that_moves_is_what_may_come(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All of it, as in other runs, is no answer; the sum has the half where it belongs."""
    tensors = (TensorSpec("q.lora_A.weight", (1, 3)), TensorSpec("q.lora_B.weight", (2, 1)))
    spec = AdapterSpec(tensors)
    run = replace(MANIFEST, network=replace(MANIFEST.network, variant="rolora"))
    state = AdapterState.zeros(spec)
    for number, expected in ((1, [0, 0, 0, 9, 9]), (2, [9, 9, 9, 0, 0])):
        sizes = {10: 3 - number % 2, 11: 5, 12: 3 - number % 2}
        monkeypatch.setattr(f"{__name__}.MANIFEST", run)
        plan = RoundPlan(run.digest, 0, number, number, state.digest)

        def sending(count: int, number: int = number) -> Behaviour:
            told = (run.digest, number, number, vector_to_bytes(np.full(count, 4.5, np.float32)))
            return answers(lambda message: signed(Answer(name_of(message), *told)))

        grid = FakeGrid({node: sending(count) for node, count in sizes.items()})
        found = cohort_of(grid).total(plan, state)
        np.testing.assert_array_equal(found.total, expected)
        assert found.replies == 2 and "found 20 bytes" in found.failures[0].reason


def test_a_robust_mean_stands_in_for_the_sum_where_it_is_asked_for() -> None:
    grid = FakeGrid({10: good(1.0), 11: good(2.0), 12: good(1e6)})
    gather = gathering(AggregationConfig(strategy="median"))
    found = cohort_of(grid, gather=gather).total(PLAN, STATE)
    np.testing.assert_array_equal(found.total / found.replies, [2.0, 2.0, 2.0])


@settings(deadline=None)  # each plan is synced to a disk
@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=0, max_size=12), st.data())
def test_only_what_arrives_in_time_is_added(values: list[float], data: st.DataObject) -> None:
    delays = [
        data.draw(st.sampled_from([0.0, 1.0, DEADLINE - 1, DEADLINE + 1, 1e6])) for _ in values
    ]
    nodes = {
        10 + i: good(value, delay)
        for i, (value, delay) in enumerate(zip(values, delays, strict=True))
    }
    grid = FakeGrid(nodes)
    found = cohort_of(grid).total(PLAN, STATE)
    timely = [value for value, delay in zip(values, delays, strict=True) if delay <= DEADLINE]
    np.testing.assert_allclose(found.total, np.full(3, np.sum(timely)), rtol=1e-12, atol=1e-6)
    assert (found.replies, found.asked) == (len(timely), len(values))
    assert found.replies + len(found.failures) == found.asked
    assert grid.time <= DEADLINE


BAD: dict[str, tuple[Behaviour, str]] = {
    "silent": (silent, "no answer within 60 s"),
    "late-input": (good(after=DEADLINE + 0.1), "no answer within 60 s"),
    "dead-node": (
        error(5, "Node Unavailable", source=SUPERLINK),
        "Flower error 5: Node Unavailable",
    ),
    "crashed": (
        error(2, "Traceback (most recent call last):\n  File x\nValueError: no"),
        "2: ValueError: no",
    ),
    "declined": (answers(lambda message: declined(message, "budget is spent")), "budget is spent"),
    "msg-wrong-sender": (
        answers(lambda message: update(message, institution="client-10")),
        "found the institution 'client-10'",
    ),
    "refusal-for-another": (
        answers(lambda message: signed(Decline("client-10", "", 0, 0, "no", True))),
        "found the institution 'client-10'",
    ),
    "another's-key": (
        answers(lambda message: signed(answer(message), by="client-10")),
        "did not make",
    ),
    "msg-wrong-run": (
        answers(lambda message: update(message, manifest="sha256:x")),
        "found an answer for another run",
    ),
    "msg-wrong-round": (
        answers(lambda message: update(message, round=3)),
        "found round 3 attempt 4",
    ),
    "msg-replayed": (
        answers(lambda message: update(message, attempt=3)),
        "found round 2 attempt 3",
    ),
    "vec-nan": (answers(lambda message: update(message, np.nan)), "a value that is not finite"),
    "vec-short": (
        answers(lambda message: update(message, vector=bytes(8))),
        "found 8 bytes, expected 12",
    ),
    "msg-wrong-stage": (
        answers(lambda message: signed(Consent(name_of(message), "", "", 0.0, 0.0))),
        "found a consent",
    ),
    "no-trainer": (
        answers(lambda _: flower.envelope_record("error", b"no\ntrainer")),
        "no trainer",
    ),
    "no-message": (answers(lambda _: flower.envelope_record(REQUEST, b"")), "reply: found bytes"),
    "foreign-message": (answers(lambda _: RecordDict()), "found no record 'fedlora'"),
    "another-node": (
        lambda message: [(0.0, _from(message, 10))],
        "answered by node 10, expected node 11",
    ),
}


def _from(message: Message, source: int) -> Message:
    reply = Message(update(message), reply_to=message)
    reply.metadata.__dict__["_src_node_id"] = source
    return reply


@pytest.mark.parametrize("name", BAD)
def test_a_bad_answer_costs_that_client_only(name: str) -> None:
    behaviour, reason = BAD[name]
    grid = FakeGrid({10: good(1.0), 11: behaviour, 12: good(4.0)})
    found = cohort_of(grid).total(PLAN, STATE)
    np.testing.assert_array_equal(found.total, [5.0, 5.0, 5.0])
    assert (found.replies, found.asked) == (2, 3)
    (failure,) = found.failures
    assert failure.client == "client-11"
    assert reason in failure.reason
    assert failure.reason.isprintable()


@pytest.mark.parametrize("refused", [True, False])
def test_a_failure_says_whether_asking_again_is_vain(refused: bool) -> None:
    declines = answers(lambda message: declined(message, "no", refused))
    (failure,) = cohort_of(FakeGrid({10: declines})).total(PLAN, STATE).failures
    assert failure == Failure("client-10", "no", refused)


@pytest.mark.parametrize("gap", [0.0, 0.01, 5.0])
def test_a_second_answer_is_refused(gap: float) -> None:
    grid = FakeGrid({10: twice(good(1.0), good(50.0, after=gap)), 11: good(2.0, after=10.0)})
    found = cohort_of(grid).total(PLAN, STATE)
    np.testing.assert_array_equal(found.total, [3.0, 3.0, 3.0])
    assert (found.replies, found.failures) == (2, ())


def test_a_good_answer_after_a_bad_one_is_refused() -> None:
    bad_then_good = twice(error(0, "no"), good(50.0))
    found = cohort_of(FakeGrid({10: bad_then_good, 11: good()})).total(PLAN, STATE)
    np.testing.assert_array_equal(found.total, [1.0, 1.0, 1.0])
    assert [failure.client for failure in found.failures] == ["client-10"]


def test_the_last_attempts_straggler_does_not_count_in_this_one() -> None:
    late = good(50.0, after=DEADLINE + 5)
    calls = iter([late, good(1.0, after=10.0)])
    grid = FakeGrid({10: lambda message: next(calls)(message)})
    cohort = cohort_of(grid)
    assert cohort.total(PLAN, STATE).replies == 0
    found = cohort.total(replace(PLAN, attempt=5), STATE)
    np.testing.assert_array_equal(found.total, [1.0, 1.0, 1.0])
    assert (found.replies, found.failures) == (1, ())


def test_clients_without_a_reachable_node_fail() -> None:
    grid = FakeGrid({10: silent})
    carrier = GridCarrier(grid, lambda: {"client-10": 10, "client-11": 11}, grid.clock())
    assert carrier.online() == {"client-10"}
    asked = dict.fromkeys(["client-10", "client-11", "client-12"], b"x")
    assert dict(carrier.ask(asked, DEADLINE)) == {
        "client-10": Failure("client-10", "no answer within 60 s"),
        "client-11": Failure("client-11", "the message could not be sent"),
        "client-12": Failure("client-12", "no node is registered for it"),
    }


def test_one_node_may_answer_for_several_clients() -> None:
    grid = FakeGrid({10: good(1.0)})
    found = cohort_of(grid, {"a": 10, "c": 10}).total(PLAN, STATE)
    np.testing.assert_array_equal(found.total, [2.0, 2.0, 2.0])
    assert (found.replies, found.asked) == (2, 2)


def test_nobody_asked() -> None:
    grid = FakeGrid({10: good()})
    found = cohort_of(grid, {}).total(PLAN, STATE)
    assert (found.replies, found.asked, found.failures) == (0, 0, ())
    assert grid.sent == 0


def test_polling_slows_down_and_asks_only_for_what_is_open() -> None:
    grid = FakeGrid({10: good(), 11: silent})
    cohort_of(grid).total(PLAN, STATE)
    assert grid.sleeps[0] == pytest.approx(0.02)
    assert max(grid.sleeps) == pytest.approx(0.5)
    assert len(grid.sleeps) < 140
    assert grid.pulled[0] == {"message-1", "message-2"}
    assert all(ids == {"message-2"} for ids in grid.pulled[1:])


def test_an_interrupt_while_waiting_is_passed_on() -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    grid = FakeGrid({10: silent})
    with pytest.raises(KeyboardInterrupt):
        cohort_of(grid, clock=Clock(lambda: 0.0, interrupt)).total(PLAN, STATE)
