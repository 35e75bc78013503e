"""The round loop. One round, from plan to new adapter:

    1. begin an attempt: its number is durable before anybody hears of it
    2. plan: the manifest's digest, the phase, the round, the attempt and the state it starts from
    3. ask a cohort for the sum of its updates; below the quorum the attempt is spent, and the next begins
    4. apply: the strategy turns the mean update into the next state
    5. average the states of a phase's last rounds, where the configuration asks for it
    6. evaluate on public validation data, where it is due
    7. commit: from here on the round can't be lost

A `Cohort` is the one seam: Flower's grid, the in-process engine and the tests' fakes implement it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from fedlora.common.errors import QuorumLost, Refused
from fedlora.common.messages import RoundPlan, RunManifest, Update
from fedlora.common.randomness import Random, bernoulli
from fedlora.common.state import AdapterState
from fedlora.server.checkpoint import Checkpoint, Progress
from fedlora.server.strategies.averaging import add_to_average
from fedlora.server.strategies.base import ServerState, SumStrategy

Name = TypeVar("Name")


@dataclass(frozen=True)
class Failure:
    """A client that was asked and whose answer does not count. `refused`: by its policy or budget."""

    client: str
    reason: str
    refused: bool = False


@dataclass(frozen=True, eq=False)
class CohortSum:
    """What an attempt brought in: `total` is the float64 (size,) sum of `replies` updates."""

    total: npt.NDArray[np.float64]
    replies: int
    asked: int
    failures: tuple[Failure, ...]
    seconds: float
    examples: int | None = None  # only where a policy lets counts leave


class Cohort(Protocol):
    """Whoever can be asked for updates."""

    def total(self, plan: RoundPlan, state: AdapterState) -> CohortSum:
        """The checked updates' sum; a client that fails is listed, and does not raise."""

    def each(self, plan: RoundPlan, state: AdapterState) -> Iterator[Update]:
        """The checked updates one by one, for strategies that need them in clear."""


@dataclass(frozen=True)
class Rules:
    """How rounds end. `average_last` is the share of a phase's last rounds that are averaged."""

    quorum: float = 1.0
    average_last: float = 0.0
    patience: int = 0
    evaluate_every: int = 1


@dataclass(frozen=True)
class RoundRecord:
    """What is known of a committed round; all of it public."""

    round: int
    phase: str
    attempt: int
    seconds: float
    asked: int
    replies: int
    failures: tuple[Failure, ...]
    metrics: Mapping[str, float] = field(default_factory=dict)


Validate = Callable[[AdapterState, int], Mapping[str, float]]  # (released state, phase) -> metrics
Observe = Callable[[RoundRecord, Progress], None]


def run_rounds(
    checkpoint: Checkpoint,
    cohort: Cohort,
    strategies: Sequence[SumStrategy],
    rules: Rules,
    validate: Validate,
    observe: Observe,
) -> Progress:
    """From the last committed round to the last one, or until patience ends. `strategies` has one a phase.

    Raises QuorumLost or Refused when attempts are spent; the checkpoint then holds the last adapter.
    """
    manifest, progress = checkpoint.manifest, checkpoint.load()
    while progress.round < manifest.rounds and not _patience_is_over(progress, rules):
        started = time.monotonic()
        number = progress.round + 1
        phase = manifest.phase_of(number)
        attempt, answer = _ask(checkpoint, cohort, progress, phase, rules)
        state, memory = progress.state, progress.memory
        if answer.replies:
            state, memory = strategies[phase].apply(state, memory, answer.total / answer.replies)
        released, memory = _released(manifest, number, state, memory, rules)
        due = number % rules.evaluate_every == 0 or _ends_phase(manifest, number)
        metrics = validate(released, phase) if due else {}
        progress = _scored(_next(manifest, number, state, released, memory, progress), metrics)
        checkpoint.commit(progress)
        seconds = time.monotonic() - started
        observe(
            RoundRecord(
                number, manifest.phases[phase].name, attempt, seconds, answer.asked, answer.replies, answer.failures, metrics
            ),
            progress,
        )
    return progress


def participants(names: Sequence[Name], rate: float, source: Random) -> list[Name]:
    """A Poisson sample: each name joins with probability `rate`, independently of the others."""
    joins = bernoulli(source, len(names), rate)
    return [names[place] for place in np.flatnonzero(joins)]


def _ask(
    checkpoint: Checkpoint, cohort: Cohort, progress: Progress, phase: int, rules: Rules
) -> tuple[int, CohortSum]:
    """Attempt the next round until a quorum answers."""
    while True:
        attempt = checkpoint.begin_attempt(phase)
        plan = RoundPlan(checkpoint.manifest.digest, phase, progress.round + 1, attempt, progress.state.digest)
        answer = cohort.total(plan, progress.state)
        if answer.replies >= math.ceil(rules.quorum * answer.asked - 1e-9):
            return attempt, answer
        if all(failure.refused for failure in answer.failures) or _spent(checkpoint, phase):
            raise _lost(plan, answer, rules)


def _spent(checkpoint: Checkpoint, phase: int) -> bool:
    return checkpoint.attempts_begun(phase) >= checkpoint.manifest.phases[phase].attempts


def _lost(plan: RoundPlan, answer: CohortSum, rules: Rules) -> QuorumLost | Refused:
    """What to raise for a cohort below its quorum: a refusal where institutions refused."""
    reasons = "; ".join(f"{failure.client}: {failure.reason}" for failure in answer.failures[:5])
    more = f"; and {len(answer.failures) - 5} more" if len(answer.failures) > 5 else ""
    text = (
        f"round {plan.round}: {answer.replies} of {answer.asked} asked answered, "
        f"expected a share of {rules.quorum:g} ({reasons}{more})"
    )
    refused = answer.failures and all(failure.refused for failure in answer.failures)
    return Refused(text) if refused else QuorumLost(text)


def _released(
    manifest: RunManifest, number: int, state: AdapterState, memory: ServerState, rules: Rules
) -> tuple[AdapterState, ServerState]:
    """The state to evaluate and export: the running average once the phase's averaging has begun."""
    phase = manifest.phase_of(number)
    end = sum(each.rounds for each in manifest.phases[: phase + 1])
    averaged = round(rules.average_last * manifest.phases[phase].rounds)
    if number <= end - averaged:
        return state, memory
    return add_to_average(state, memory)


def _next(
    manifest: RunManifest,
    number: int,
    state: AdapterState,
    released: AdapterState,
    memory: ServerState,
    before: Progress,
) -> Progress:
    """A phase ends with its released state, and the next one starts there with an empty memory."""
    if _ends_phase(manifest, number):
        return Progress(number, released, released, ServerState(), before.best, before.stale)
    return Progress(number, state, released, memory, before.best, before.stale)


def _ends_phase(manifest: RunManifest, number: int) -> bool:
    return number == manifest.rounds or manifest.phase_of(number) != manifest.phase_of(number + 1)


def _scored(progress: Progress, metrics: Mapping[str, float]) -> Progress:
    """Note whether validation got better: accuracy where the task has one, else the loss."""
    if not metrics:
        return progress
    score = metrics.get("accuracy", -metrics["loss"])
    if progress.best is None or score > progress.best:
        return replace(progress, best=score, stale=0)
    return replace(progress, stale=progress.stale + 1)


def _patience_is_over(progress: Progress, rules: Rules) -> bool:
    return 0 < rules.patience <= progress.stale
