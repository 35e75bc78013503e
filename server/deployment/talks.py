"""Talks with several nodes at once: each is a chain of requests, and goes on as its answers come.

A request that was lost on the way is asked again, with the same bytes, for a while: what a node has
kept it does not do twice. So a process that is killed and comes back in that time costs no talk.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from fedlora.common.errors import FedloraError
from fedlora.server.rounds.cohort import Failure

log = logging.getLogger(__name__)

SHORTEST_POLL, LONGEST_POLL = 0.02, 0.5  # seconds between two looks
PAUSE = 2.0  # seconds until what was lost is asked again
# seconds without an answer after which a talk is given up: SuperLink lets a SuperNode that was
# killed in again after two minutes
PATIENCE = 240.0


@dataclass(frozen=True)
class Asking:
    """A request, made whenever it is sent; after `seconds` without an answer it counts as lost."""

    make: Callable[[], bytes]
    seconds: float = math.inf


# gives requests and takes their answers in turn; returns the answer that counts
Talk = Generator[Asking, bytes, bytes]


class Post(Protocol):
    """What carries one request, and brings the answers that came in."""

    def send(self, name: str, request: bytes, seconds: float) -> str | Failure:
        """The number under which its answer will come; or why it can't be sent."""

    def received(self, waiting: Mapping[str, str]) -> list[tuple[str, bytes | Failure]]:
        """Answers to the numbers that are `waiting`, by name."""

    def now(self) -> float:
        """Seconds."""

    def sleep(self, seconds: float) -> None:
        """May raise KeyboardInterrupt to end a run at its last checkpoint."""


@dataclass(eq=False)
class _Turn:
    """Where a talk stands: what it asks; when that is sent, or was, and under which number."""

    name: str
    talk: Talk
    asking: Asking
    when: float
    number: str = ""
    lost: float = math.inf  # since when nothing but losses came


def converse(
    post: Post, talks: Mapping[str, Talk], deadline: float
) -> Iterator[tuple[str, bytes | Failure]]:
    """Each name once, as its talk ends, within `deadline` seconds."""
    end, pause = post.now() + deadline, SHORTEST_POLL
    turns = [_Turn(name, talk, next(talk), post.now()) for name, talk in talks.items()]
    while turns and post.now() < end:
        heard = [*_sent(post, turns, end), *_received(post, turns)]
        for turn, answer in heard:
            ended = _went_on(turn, answer, post.now())
            if ended is not None:
                turns.remove(turn)
                yield turn.name, ended
        pause = SHORTEST_POLL if heard else min(2 * pause, LONGEST_POLL)
        if turns:
            post.sleep(min(pause, max(0.0, end - post.now())))
    for turn in turns:
        yield turn.name, Failure(turn.name, f"no answer within {deadline:g} s")


def _sent(post: Post, turns: list[_Turn], end: float) -> Iterator[tuple[_Turn, Failure]]:
    """Send what is due; whose request can't be sent."""
    for turn in turns:
        now = post.now()
        if turn.number and now - turn.when > turn.asking.seconds:
            turn.number = ""  # its answer is waited for no longer
            yield turn, Failure(turn.name, f"no answer within {turn.asking.seconds:g} s")
        elif not turn.number and turn.when <= now:
            sent = post.send(turn.name, turn.asking.make(), max(end - now, 1.0))
            if isinstance(sent, Failure):
                yield turn, sent
            else:
                turn.number, turn.when = sent, now


def _received(post: Post, turns: list[_Turn]) -> Iterator[tuple[_Turn, bytes | Failure]]:
    waiting = {turn.number: turn for turn in turns if turn.number}
    names = {number: turn.name for number, turn in waiting.items()}
    for number, answer in post.received(names) if names else ():
        yield waiting[number], answer


def _went_on(turn: _Turn, answer: bytes | Failure, now: float) -> bytes | Failure | None:
    """What the talk came to; None where it goes on, with its next request or this one again."""
    turn.number = ""
    if isinstance(answer, Failure):
        turn.lost = min(turn.lost, now)
        if now - turn.lost >= PATIENCE:
            return answer
        log.warning("%s: %s; it is asked again", turn.name, answer.reason)
        turn.when = now + PAUSE
        return None
    turn.lost, turn.when = math.inf, now
    try:
        turn.asking = turn.talk.send(answer)
    except StopIteration as stop:
        found: bytes = stop.value
        return found
    except FedloraError as error:
        return Failure(turn.name, str(error))
    return None
