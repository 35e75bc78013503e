"""Talks go on as answers come; what is lost is asked again, for a while."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from fedlora.common.errors import BadInput
from fedlora.server.deployment.talks import PATIENCE, PAUSE, Asking, Talk, converse
from fedlora.server.rounds.cohort import Failure


@dataclass
class Line:
    """Answers a request with its own bytes, at once; what is said of a request by `lost` is not."""

    lost: list[str] = field(default_factory=list)  # "fails", "is silent" or "can't be sent"
    time: float = 0.0
    sent: list[tuple[str, bytes]] = field(default_factory=list)
    answers: dict[str, bytes | Failure] = field(default_factory=dict)

    def send(self, name: str, request: bytes, seconds: float) -> str | Failure:
        number, fate = str(len(self.sent)), self.lost.pop(0) if self.lost else ""
        self.sent.append((name, request))
        if fate == "can't be sent":
            return Failure(name, fate)
        if fate != "is silent":
            self.answers[number] = Failure(name, fate) if fate else request
        return number

    def received(self, waiting: Mapping[str, str]) -> list[tuple[str, bytes | Failure]]:
        return [(number, self.answers.pop(number)) for number in waiting if number in self.answers]

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += seconds


def counting(name: str, last: int, seconds: float = math.inf) -> Talk:
    answer = b""
    for number in range(last):
        answer = yield Asking(lambda number=number: f"{name}{number}".encode(), seconds)  # type: ignore[misc]
    return answer


def test_each_talk_goes_its_way() -> None:
    line = Line()
    found = list(converse(line, {"a": counting("a", 3), "b": counting("b", 1)}, 60.0))
    assert found == [("b", b"b0"), ("a", b"a2")]
    assert [request for _, request in line.sent] == [b"a0", b"b0", b"a1", b"a2"]


def test_what_is_lost_is_asked_again_with_the_same_bytes() -> None:
    line = Line(["", "fails", "can't be sent", "", "is silent"])
    assert list(converse(line, {"a": counting("a", 3, seconds=9.0)}, 60.0)) == [("a", b"a2")]
    assert [request for _, request in line.sent] == [b"a0", b"a1", b"a1", b"a1", b"a2", b"a2"]
    assert 2 * PAUSE + 9 < line.time < 4 * PAUSE + 11


def test_who_stays_away_is_given_up_and_nobody_waits_for_it() -> None:
    line = Line(["fails"] * 10_000)
    talks = {"a": counting("a", 2)}
    assert list(converse(line, talks, 10 * PATIENCE)) == [("a", Failure("a", "fails"))]
    assert PATIENCE <= line.time < PATIENCE + 2 * PAUSE + 1


def test_a_talk_ends_with_the_attempt() -> None:
    line = Line(["is silent"])
    found = list(converse(line, {"a": counting("a", 2)}, 30.0))
    assert found == [("a", Failure("a", "no answer within 30 s"))] and line.time <= 31.0


def test_an_answer_that_is_refused_ends_one_talk() -> None:
    def picky() -> Talk:
        yield Asking(lambda: b"?")
        raise BadInput("another answer")

    found = dict(converse(Line(), {"a": picky(), "b": counting("b", 2)}, 30.0))
    assert found == {"a": Failure("a", "another answer"), "b": b"b1"}
