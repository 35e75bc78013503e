"""The grid cohort against nodes that are late, dead, double-tongued or wrong, all in process."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from flwr.app import Message, RecordDict
from flwr.app.error import Error
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given
from hypothesis import strategies as st

from fedlora.common.config.schema import LoraConfig, ModelConfig
from fedlora.common.errors import BadInput, FedloraError, Refused
from fedlora.common.manifest.manifest import Network, Phase, RunManifest
from fedlora.common.manifest.plan import RoundPlan, Update
from fedlora.common.model.state import AdapterSpec, AdapterState, TensorSpec
from fedlora.common.protocol import flower
from fedlora.server.deployment.flower import Clock, GridCohort, enrol
from fedlora.server.rounds.cohort import Failure

SPEC = AdapterSpec((TensorSpec("head.weight", (3,)),))
STATE = AdapterState.zeros(SPEC)
PLAN = RoundPlan(manifest="sha256:m", phase=0, round=2, attempt=4, adapter=STATE.digest)
PHASE = Phase("adapter", 3, 4, 2, 0.02, 128.0, 0.7, 1.0, 0.0, "adamw", 1e-3, True, 0.0)
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
    network=Network.of(ModelConfig(), LoraConfig()),
    phases=(PHASE,),
)
DEADLINE = 60.0
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


def name_of(message: Message) -> str:
    return flower.read_plan(message.content, SPEC).client


def update(message: Message, value: float = 1.0, **changes: object) -> RecordDict:
    task = flower.read_plan(message.content, SPEC)
    delta = np.full(3, value, dtype=np.float32)
    good = Update(task.client, task.plan.manifest, task.plan.round, task.plan.attempt, delta)
    return flower.update_record(replace(good, **changes))  # type: ignore[arg-type]


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


def cohort_of(grid: FakeGrid, names: list[str] | None = None) -> GridCohort:
    nodes = {f"client-{node}": node for node in grid.nodes}
    return GridCohort(grid, nodes, lambda _: list(names or nodes), DEADLINE, grid.clock())


def test_the_sum_of_good_updates() -> None:
    grid = FakeGrid({10: good(1.0), 11: good(2.0, after=0.5), 12: good(4.0, after=3.0)})
    found = cohort_of(grid).total(PLAN, STATE)
    assert found.total.dtype == np.float64
    np.testing.assert_array_equal(found.total, [7.0, 7.0, 7.0])
    assert (found.replies, found.asked, found.failures) == (3, 3, ())
    assert 3.0 <= found.seconds < 4.0


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
    assert found.seconds <= DEADLINE


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
    "declined": (
        answers(
            lambda message: flower.refusal_record(name_of(message), Refused("budget is spent"))
        ),
        "budget is spent",
    ),
    "msg-wrong-sender": (
        answers(lambda message: update(message, client="client-10")),
        "found client-10",
    ),
    "refusal-for-another": (
        answers(lambda message: flower.refusal_record("client-10", Refused("no"))),
        "found client-10, expected client-11",
    ),
    "msg-wrong-run": (
        answers(lambda message: update(message, manifest="sha256:x")),
        "expected round 2",
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
        answers(lambda message: update(message, delta=np.zeros(2, dtype=np.float32))),
        "found 8 bytes of shape (2,), expected 12",
    ),
    "msg-wrong-stage": (answers(lambda _: flower.consent_record(["client-11"])), "found 'consent'"),
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


@pytest.mark.parametrize(("answer", "refused"), [(Refused("no"), True), (BadInput("no"), False)])
def test_a_failure_says_whether_asking_again_is_vain(answer: FedloraError, refused: bool) -> None:
    declines = answers(lambda message: flower.refusal_record(name_of(message), answer))
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
    grid = FakeGrid({10: good()})
    nodes = {"client-10": 10, "client-11": 11}
    names = ["client-10", "client-11", "client-12"]
    found = GridCohort(grid, nodes, lambda _: names, DEADLINE, grid.clock()).total(PLAN, STATE)
    reasons = {failure.client: failure.reason for failure in found.failures}
    assert reasons == {
        "client-11": "the message could not be sent",
        "client-12": "no node answers for it",
    }
    assert found.asked == 3


def test_one_node_may_answer_for_several_clients() -> None:
    grid = FakeGrid({10: good(1.0)})
    nodes = {"a": 10, "b": 10, "c": 10}
    found = GridCohort(grid, nodes, lambda _: ["a", "c"], DEADLINE, grid.clock()).total(PLAN, STATE)
    np.testing.assert_array_equal(found.total, [2.0, 2.0, 2.0])
    assert (found.replies, found.asked) == (2, 2)


def test_nobody_asked() -> None:
    grid = FakeGrid({10: good()})
    found = GridCohort(grid, {"a": 10}, lambda _: [], DEADLINE, grid.clock()).total(PLAN, STATE)
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
    clock = Clock(lambda: 0.0, interrupt)
    with pytest.raises(KeyboardInterrupt):
        GridCohort(grid, {"a": 10}, lambda _: ["a"], DEADLINE, clock).total(PLAN, STATE)


def consents(*clients: str) -> Behaviour:
    return answers(lambda _: flower.consent_record(clients))


def test_enrolment() -> None:
    def refuses(message: Message) -> RecordDict:
        assert flower.read_offer(message.content) == MANIFEST
        return flower.refusal_record("x", Refused("the data set's cap is ε = 1"))

    grid = FakeGrid(
        {
            10: consents("a", "b"),
            11: consents("c"),
            12: answers(refuses),
            13: silent,
            14: consents("d", "a"),
            15: error(5, "Node Unavailable", source=SUPERLINK),
        }
    )
    found = enrol(grid, MANIFEST, 99, DEADLINE, clock=grid.clock())
    assert found.nodes == {"a": 10, "b": 10, "c": 11}
    assert {failure.client: failure.reason for failure in found.declined} == {
        "12": "the data set's cap is ε = 1",
        "13": "no answer within 60 s",
        "14": "claims a, which node 10 answers for",
        "15": "Flower error 5: Node Unavailable",
    }


def test_enrolment_waits_for_nodes_that_come_later_and_no_longer_than_needed() -> None:
    grid = FakeGrid(
        {10: consents("a"), 11: consents("b"), 12: consents("c")},
        online={10: 0.0, 11: 3.0, 12: 50.0},
    )
    found = enrol(grid, MANIFEST, 2, DEADLINE, clock=grid.clock())
    assert found.nodes == {"a": 10, "b": 11}
    assert 3.0 <= grid.time < 4.0
    grid.time = 0.0
    assert enrol(grid, MANIFEST, 3, DEADLINE, clock=grid.clock()).nodes == {"a": 10, "b": 11}
    assert 8.0 <= grid.time < 9.0
    grid.time = 0.0
    found = enrol(grid, MANIFEST, 3, DEADLINE, patience=DEADLINE, clock=grid.clock())
    assert found.nodes == {"a": 10, "b": 11, "c": 12}


def test_no_client_is_a_refusal_with_the_reasons() -> None:
    grid = FakeGrid({10: answers(lambda _: flower.refusal_record("x", Refused("cap is ε = 1")))})
    with pytest.raises(Refused, match="node 10: cap is ε = 1"):
        enrol(grid, MANIFEST, 1, DEADLINE, clock=grid.clock())
    with pytest.raises(Refused, match="no node came online within 5 s"):
        enrol(FakeGrid({}), MANIFEST, 1, DEADLINE, clock=FakeGrid({}).clock())
