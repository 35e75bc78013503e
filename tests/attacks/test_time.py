"""Answers that data were touched for leave at public ticks, whatever they say.

Before, the time of an answer told whether a unit of 12 records was among 40. `answer_time.py`
beside this file measures how well, at once and at a tick.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.client.service.answer import Resident
from fedlora.client.service.ticks import MOST_RUNS, Ticks
from fedlora.common.errors import BadInput
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

    def check(self, *arguments: object) -> None:
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


@pytest.fixture
def node(tmp_path: Path) -> Node:
    north, clock = Institution(tmp_path / "n"), Clock()
    work = Slow(north.ledger)
    work.clock = clock
    north.work = work
    north.resident = Resident(
        north.folder, north.folder.load_policy(), north.identity, north.ledger, work
    )
    north.resident._ticks = Ticks(5.0, clock.now, clock.sleep)
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

    node.north.resident._ticks.sleep = killed
    with pytest.raises(Killed):
        node.north.resident.ask_in_time(task_of(RUN))
    node.north.ledger.close()
    node.north.restart()
    assert isinstance(node.north.ask(task_of(RUN)), Answer) and not node.north.work.trained


@given(st.floats(0.1, 3600), st.lists(st.floats(0, 1e5), min_size=1, max_size=20))
def test_ticks_are_the_first_one_doubled(every: float, taken: list[float]) -> None:
    clock, before = Clock(), 0.0
    ticks = Ticks(every, clock.now, clock.sleep)
    for seconds in taken:
        began = clock.time = 0.0
        clock.time += seconds
        ticks.wait(("run", "train"), began)
        found = clock.time / every
        doubled = max(0, round(math.log2(found)))
        assert found == pytest.approx(2**doubled) and clock.time >= max(seconds, before) * (
            1 - 1e-9
        )
        before = clock.time


def test_the_ticks_of_few_runs_are_remembered() -> None:
    clock = Clock()
    ticks = Ticks(1.0, clock.now, clock.sleep)
    for number in range(3 * MOST_RUNS):
        ticks.wait((f"{number}", "train"), clock.time)
    assert len(ticks._last) == MOST_RUNS


def test_what_docs_say_how_to_measure_can_be_measured(
    tiny_bert: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["answer_time", str(tiny_bert), "--answers", "1", "--every", "0.5"]
    monkeypatch.setattr(sys, "argv", words)
    answer_time.main()
    assert capsys.readouterr().out.count("AUC") == 4
