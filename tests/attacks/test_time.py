"""Answers that data were touched for leave at public ticks, whatever they say.

Before, the time of an answer told whether a unit of 12 records was among 40. `answer_time.py`
beside this file measures how well, at once and at a tick.
"""

from __future__ import annotations

import math
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.client.node import binding
from fedlora.client.service.answer import Resident
from fedlora.client.service.dialogue import PRIVATE_REASON
from fedlora.client.service.ticks import TICKS, TRAIN, Ticks
from fedlora.common.errors import BadInput, Refused
from fedlora.common.manifest.plan import Delta
from fedlora.common.protocol.messages import Answer, Consent, Decline, Started
from tests.attacks import answer_time
from tests.client.institution import (
    OTHERS,
    FakeWork,
    Institution,
    manifest_of,
    offer_of,
    start_of,
    task_of,
)

RUN = manifest_of()


@dataclass
class Clock:
    """Seconds that only work and waiting let pass."""

    time: float = 0.0
    waited: list[float] = field(default_factory=list)

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.waited.append(seconds)
        self.time += seconds


class Slow(FakeWork):
    """Takes `seconds` for whatever touches data, and may fail after it."""

    clock: Clock
    seconds: float = 1.0
    fails: bool = False
    read: int = 0  # how often data were, for an offer

    def check(self, *arguments: object) -> None:
        self.read += 1
        super().check(*arguments)  # type: ignore[arg-type]
        self._took()

    def consent(self, *arguments: object) -> str:
        self._took()
        return super().consent(*arguments)  # type: ignore[arg-type]

    def train(self, *arguments: object) -> tuple[Delta, str]:
        self._took()
        return super().train(*arguments)  # type: ignore[arg-type]

    def _took(self) -> None:
        self.clock.time += self.seconds
        if self.fails:
            raise BadInput("notes.jsonl row 5 label: found 'diabetes'")


@dataclass
class Node:
    """A node whose work and waiting take a clock's time alone."""

    north: Institution
    work: Slow
    clock: Clock

    def seconds(self, data: bytes) -> tuple[object, float]:
        """What it says, and after how long."""
        began = self.clock.time
        reply = self.north.read(self.north.resident.ask_in_time(data))
        return reply, self.clock.time - began


def tick_by(north: Institution, work: Slow, clock: Clock) -> None:
    """Let this work and this clock be the node's."""
    north.work = work
    north.resident = Resident(
        north.folder, north.folder.load_policy(), north.identity, north.ledger, work
    )
    ticks = north.resident._ticks
    north.resident._ticks = replace(ticks, now=clock.now, sleep=clock.sleep)


@pytest.fixture
def node(tmp_path: Path) -> Node:
    north, clock = Institution(tmp_path / "n"), Clock()
    work = Slow(north.ledger)
    work.clock = clock
    tick_by(north, work, clock)
    return Node(north, work, clock)


def test_an_answer_leaves_at_a_tick_however_long_it_took(node: Node) -> None:
    consent = node.north.resident.ask(offer_of(RUN))
    reply, took = node.seconds(start_of(RUN, {"north": consent, **OTHERS}))
    assert isinstance(reply, Started) and took == 5.0
    for attempt, seconds in enumerate((0.1, 1.0, 4.9), start=1):
        node.work.seconds = seconds
        reply, took = node.seconds(task_of(RUN, attempt=attempt))
        assert isinstance(reply, Answer) and took == 5.0
    node.work.seconds = 11.0
    assert node.seconds(task_of(RUN, attempt=4))[1] == 20.0


def test_in_a_run_no_tick_is_earlier_than_one_before(node: Node) -> None:
    """Else each answer near a tick would tell on which side its work ended."""
    node.north.begin(RUN)
    for attempt, seconds, tick in ((1, 4.9, 5.0), (2, 5.1, 10.0), (3, 4.9, 10.0), (4, 0.1, 10.0)):
        node.work.seconds = seconds
        assert node.seconds(task_of(RUN, attempt=attempt))[1] == tick


def test_a_failure_in_sight_of_data_leaves_at_the_same_tick(node: Node) -> None:
    for seconds in (0.1, 3.0):
        node.work.seconds, node.work.fails = seconds, True
        reply, took = node.seconds(offer_of(RUN))
        assert isinstance(reply, Decline) and took == 5.0
    node.work.fails = False
    reply, took = node.seconds(offer_of(RUN))
    assert isinstance(reply, Consent) and took == 5.0


def test_what_no_data_were_touched_for_leaves_at_once(node: Node) -> None:
    node.north.begin(RUN)
    node.clock.waited.clear()
    node.north.set_policy(node.north.folder.policy.read_text() + "require_secure = true\n")
    for data in (b"", task_of(RUN), offer_of(RUN)):
        reply, took = node.seconds(data)
        assert isinstance(reply, Decline) and took == 0.0
    assert not node.clock.waited


def test_what_leaves_has_one_size(node: Node) -> None:
    """Of an answer, and of a failure in sight of data, whatever went wrong."""
    node.north.begin(RUN)
    sizes = set()
    for attempt, seconds in enumerate((0.1, 4.0), start=1):
        node.work.seconds = seconds
        sizes.add(len(node.north.resident.ask_in_time(task_of(RUN, attempt=attempt))))
    assert len(sizes) == 1
    node.work.fails = True
    replies = {node.north.resident.ask_in_time(task_of(RUN, attempt=3)) for _ in range(2)}
    assert len({len(each) for each in replies}) == 1


def test_the_signed_answer_is_on_disk_before_it_is_waited_for(node: Node) -> None:
    node.north.begin(RUN)

    class Killed(BaseException):
        pass

    def killed(seconds: float) -> None:
        raise Killed

    node.north.resident._ticks = replace(node.north.resident._ticks, sleep=killed)
    with pytest.raises(Killed):
        node.north.resident.ask_in_time(task_of(RUN))
    node.north.ledger.close()
    node.north.restart()
    assert isinstance(node.north.ask(task_of(RUN)), Answer) and not node.north.work.trained


@given(st.floats(0.1, 3600), st.lists(st.floats(0, 1e5), min_size=1, max_size=20))
def test_ticks_are_the_first_one_doubled(every: float, taken: list[float]) -> None:
    clock, before = Clock(), 0.0
    with tempfile.TemporaryDirectory() as folder:
        ticks = Ticks(every, lambda run: Path(folder), clock.now, clock.sleep)
        for seconds in taken:
            began = clock.time = 0.0
            clock.time += seconds
            ticks.wait(("run", TRAIN), began)
            found = clock.time / every
            doubled = max(0, round(math.log2(found)))
            assert found == pytest.approx(2**doubled) and clock.time >= max(seconds, before) * (
                1 - 1e-9
            )
            before = clock.time


def test_no_restart_and_no_other_run_makes_a_tick_earlier(node: Node) -> None:
    """Before, ticks were in memory: 10 s fell to 5 at a restart, and after 64 other runs."""
    node.north.set_policy(node.north.folder.policy.read_text() + "offers = 1000\n")
    node.north.begin(RUN)
    node.work.seconds = 6.0
    assert node.seconds(task_of(RUN, attempt=1))[1] == 10.0
    node.work.seconds = 1.0
    for number in range(70):
        assert node.seconds(offer_of(replace(RUN, run=f"other {number}")))[1] == 5.0
    assert node.seconds(task_of(RUN, attempt=2))[1] == 10.0
    node.north.ledger.close()
    node.north.restart()
    node.work.ledger = node.north.ledger
    tick_by(node.north, node.work, node.clock)
    assert node.seconds(task_of(RUN, attempt=3))[1] == 10.0


def test_a_tick_stays_where_the_length_of_the_first_is_changed(tmp_path: Path) -> None:
    clock = Clock()
    for every, seconds, tick in ((5.0, 6.0, 10.0), (3.0, 1.0, 12.0), (20.0, 1.0, 20.0)):
        ticks = Ticks(every, lambda run: tmp_path, clock.now, clock.sleep)
        began = clock.time
        clock.time += seconds
        ticks.wait(("run", TRAIN), began)
        assert clock.time - began == tick


def test_where_a_tick_cannot_be_read_nothing_leaves_and_no_time_is_told(node: Node) -> None:
    node.north.begin(RUN)
    path = node.north.folder.run(RUN.digest) / TICKS
    for number, spoilt in enumerate((b"{}", b"[]", b'{"check":-1.0,"consent":0.0,"train":0.0}')):
        path.write_bytes(spoilt)
        node.work.seconds = 1.0 + number
        began = node.clock.time
        with pytest.raises(BadInput, match=r"ticks\.json"):
            node.north.resident.ask_in_time(task_of(RUN, attempt=1 + number))
        assert node.clock.time - began == 5.0


# --- offers, which nobody is charged for ----------------------------------------------------------


def write_data(north: Institution, text: str) -> None:
    (north.folder.root / "notes.jsonl").write_text(text)


def test_runs_that_are_offered_in_turn_have_their_data_read_once(node: Node) -> None:
    """Before, 150 offers of two runs were 150 readings, of which 2 were counted."""
    write_data(node.north, '{"text": "t", "label": "a"}\n')
    runs = [replace(RUN, run=name) for name in ("one", "other")]
    for number in range(30):
        assert isinstance(node.north.ask(offer_of(runs[number % 2])), Consent)
    assert node.work.read == 2
    assert '"offers":2' in (node.north.folder.offers / "today.json").read_text()


def test_every_reading_for_an_offer_is_counted(node: Node) -> None:
    node.north.set_policy(node.north.folder.policy.read_text() + "offers = 3\n")
    told = []
    for number in range(6):
        write_data(node.north, "x" * number)
        told.append(node.north.ask(offer_of(RUN)))
    assert [type(each) for each in told] == [Consent] * 3 + [Decline] * 3
    assert node.work.read == 3
    reasons = [getattr(each, "reason", "") for each in told[3:]]
    assert reasons[0] == PRIVATE_REASON and "expected at most 3 a day" in reasons[1]


def test_to_look_at_data_is_to_touch_them(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where nothing is read: an offer that was consented to, or the mark of another ledger."""
    for _ in range(2):
        reply, took = node.seconds(offer_of(RUN))
        assert isinstance(reply, Consent) and took == 5.0
    assert node.work.read == 1

    def another(path: Path, *others: object) -> None:
        node.clock.time += 3.0
        raise Refused("found the mark of ledger")

    monkeypatch.setattr(binding, "bind", another)
    reply, took = node.seconds(offer_of(replace(RUN, run="2")))
    assert isinstance(reply, Decline) and reply.reason == PRIVATE_REASON and took == 5.0


def test_a_policy_that_was_changed_has_the_data_read_again(node: Node) -> None:
    for line in ("", "rank = 63\n"):
        node.north.set_policy(node.north.folder.policy.read_text() + line)
        assert isinstance(node.north.ask(offer_of(RUN)), Consent)
    assert node.work.read == 2


def test_marks_are_looked_for_only_where_the_answer_waits(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before, it took as long as there are files, in requests whose answers left at once."""
    consent = node.north.resident.ask(offer_of(RUN))
    start = start_of(RUN, {"north": consent, **OTHERS})
    looked: list[object] = []

    def slow(data: object, *others: object) -> None:
        looked.append(data)
        node.clock.time += 3.5

    monkeypatch.setattr(binding, "bind", slow)
    monkeypatch.setattr(binding, "check_budgets", slow)
    for again in (start_of(RUN, {"north": b"another", **OTHERS}), task_of(RUN)):
        assert node.seconds(again)[1] == 0.0 and not looked
    assert node.seconds(start)[1] == 10.0
    assert node.seconds(task_of(RUN))[1] == 10.0
    assert node.seconds(offer_of(replace(RUN, run="2")))[1] == 10.0
    looked.clear()
    for kept in (start, task_of(RUN), offer_of(RUN)):
        assert node.seconds(kept)[1] == 0.0 and not looked


def test_one_file_in_two_budgets_is_noticed_once_data_are_in_sight(node: Node) -> None:
    """It was declined with its reason, at once, however many files were compared for it."""
    write_data(node.north, "x")
    text = node.north.folder.policy.read_text()
    more = '[budgets.more]\nepsilon = 2.0\ndelta = 1e-4\n[data.more]\npath = "{}"\n'
    more += 'budget = "more"\nlabels = ["c", "d"]\n'
    node.north.set_policy(text + more.format("./notes.jsonl"))
    reply, took = node.seconds(offer_of(RUN))
    assert isinstance(reply, Decline) and reply.reason == PRIVATE_REASON and took == 5.0
    assert "expected one budget for one file" in node.north.folder.refusals.read_text()
    assert not node.work.read
    with pytest.raises(BadInput, match="expected one budget for one file"):
        node.north.folder.load_policy()


def test_what_docs_say_how_to_measure_can_be_measured(
    tiny_bert: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["answer_time", str(tiny_bert), "--answers", "1", "--every", "0.5"]
    monkeypatch.setattr(sys, "argv", words)
    answer_time.main()
    assert capsys.readouterr().out.count("AUC") == 4
