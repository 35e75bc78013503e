"""The round loop. One round, from plan to new adapter:

    0. wait until a quorum may answer: who is away or refuses costs no attempt
    1. begin an attempt: its number is durable before anybody hears of it; one whose large vectors a
       kill cut off goes on instead, by the same plan and the same answers
    2. plan: the manifest's digest, the phase, the round, the attempt and the state it starts from
    3. ask a cohort for the sum of its updates; below the quorum the attempt is spent, its reason is
       kept, and the next begins
    4. apply: the phase's strategy turns the mean update into the next state
    5. average the states of a phase's last rounds, where the configuration asks for it
    6. evaluate on public validation data, where it is due: a phase comes to its best round
    7. observe: a log line is written, and dropped by who resumes if the commit does not follow
    8. commit: from here on the round can't be lost

A `Cohort` is the one seam: Flower's grid, the in-process engine and the tests' fakes implement it.
Whatever is killed or interrupted when, the checkpoint holds the last committed round, and the loop
goes on from there.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from fedlora.common.disk.mapped import alike, by_stretches
from fedlora.common.errors import BadInput, FedloraError, QuorumLost, Refused, Spent
from fedlora.common.manifest.counts import answer_spec
from fedlora.common.manifest.manifest import RunManifest
from fedlora.common.manifest.plan import RoundPlan
from fedlora.common.manifest.turns import Mask
from fedlora.common.model.state import AdapterState, Vector, is_finite
from fedlora.server.rounds.checkpoint import Checkpoint, Progress
from fedlora.server.rounds.cohort import Attempted, Cohort, CohortSum, Failure, Lost, SecureRecord
from fedlora.server.strategies.strategy import ServerState, Strategy
from fedlora.server.strategies.tail_average import add_to_average

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rules:
    """How rounds end. `average_last` is the share of a phase's last rounds that are averaged.

    `patience` ends a run after that many evaluations without a better score. It counts in the last
    phase only: the others prepare it, and stopping there would skip what the run is for.
    """

    quorum: float = 1.0
    average_last: float = 0.0
    patience: int = 0
    evaluate_every: int = 1
    minimum: int = 1  # updates in a sum, as the manifest promises to each institution


@dataclass(frozen=True)
class RoundRecord(Attempted):
    """It brought a round, which is about to be committed."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    secure: SecureRecord | None = None
    update_norm: float = 0.0  # L2, of the mean update


Validate = Callable[[AdapterState, int], Mapping[str, float]]  # (released state, phase) -> metrics
Observe = Callable[[RoundRecord, Progress], None]
Ready = Callable[[], tuple[Failure, ...]]  # waits; who and what is in the way, nothing to begin
Lose = Callable[[Lost], None]
# whether the attempt of this plan was begun and not ended: then it goes on, as the same one
Unfinished = Callable[[RoundPlan], bool]
SAY_AGAIN = 60.0  # seconds between two lines about the same wait


@dataclass(frozen=True)
class Around:
    """What goes on around attempts: whom they wait for, who hears of those that are lost, and which
    one a kill left unfinished.
    """

    ready: Ready = tuple
    lose: Lose = lambda lost: None
    unfinished: Unfinished = lambda plan: False


ALONE = Around()


def run_rounds(
    checkpoint: Checkpoint,
    cohort: Cohort,
    strategies: Sequence[Strategy],
    rules: Rules,
    validate: Validate,
    observe: Observe,
    around: Around = ALONE,
) -> Progress:
    """From the last committed round to the last one, or until patience ends.

    `strategies` has one a phase. Raises Spent when a phase's attempts are, Refused where a refusal
    makes asking vain, QuorumLost where a run without privacy has tried as often as it was planned
    to; the checkpoint then holds the last adapter.
    """
    manifest, progress = checkpoint.manifest, checkpoint.load()
    while progress.round < manifest.rounds and not _patience_is_over(manifest, progress, rules):
        started = time.monotonic()
        number = progress.round + 1
        phase = manifest.phase_of(number)
        plan, answer = ask(checkpoint, cohort, progress.state, number, rules, around)
        moved = progress.state.spec.moved_by(manifest.recipe_of(number).name)
        state, memory = _apply(strategies[phase], plan, progress, answer, moved)
        averaged, memory = _averaged(manifest, number, state, memory, rules)
        due = number % rules.evaluate_every == 0 or _ends_phase(manifest, number)
        metrics = validate(averaged, phase) if due else {}
        progress = replace(progress, round=number, state=state, memory=memory)
        progress = _phase_ended(manifest, _scored(progress, averaged, metrics))
        attempted = _attempted(manifest, plan, answer, started)
        norm = _norm_of_mean(answer)
        observe(
            RoundRecord(**vars(attempted), metrics=metrics, secure=answer.secure, update_norm=norm),
            progress,
        )
        checkpoint.commit(progress)
    return progress


def ask(
    checkpoint: Checkpoint,
    cohort: Cohort,
    state: AdapterState,
    number: int,
    rules: Rules,
    around: Around,
) -> tuple[RoundPlan, CohortSum]:
    """Attempt a round from `state` until a quorum answers, a refusal makes it vain, or none is
    left. Raises Spent, Refused or QuorumLost.
    """
    manifest, phase = checkpoint.manifest, checkpoint.manifest.phase_of(number)
    size = answer_spec(manifest, phase, state.spec).size
    while True:
        left = manifest.accounted[phase].attempts - checkpoint.attempts_begun(phase)
        plan = RoundPlan(manifest.digest, phase, number, checkpoint.attempts_in_all, state.digest)
        unfinished = around.unfinished(plan)
        if unfinished or not checkpoint.spent(phase):
            _await(around.ready, number, max(1, left))
        if not unfinished:
            plan = replace(plan, attempt=checkpoint.begin_attempt(phase))
        started = time.monotonic()
        answer = _checked(cohort.total(plan, state), plan, size)
        if answer.counts(rules.quorum, rules.minimum):
            return plan, answer
        lost = _lost(plan, answer, rules)
        attempted = _attempted(manifest, plan, answer, started)
        around.lose(Lost(**vars(attempted), reason=str(lost)))
        if reason := checkpoint.spent(phase):
            raise Spent(f"{reason} ({lost})") from lost
        if (
            isinstance(lost, Refused)
            or checkpoint.attempts_begun(phase) >= manifest.accounted[phase].attempts
        ):
            raise lost
        log.warning("%s; the next attempt begins", lost)


def _await(ready: Ready, number: int, most: int) -> None:
    """Wait, as often as attempts are left, until one may find a quorum.

    Refused where only refusals are in the way, QuorumLost where nobody came: no attempt was begun.
    """
    said = -math.inf
    for _ in range(most):
        failures = ready()
        if not failures:
            return
        text = f"round {number}: no attempt is begun ({_reasons(failures)})"
        if all(failure.refused for failure in failures):
            raise Refused(text)
        if time.monotonic() - said >= SAY_AGAIN:
            log.warning("%s; waits on", text)
            said = time.monotonic()
    raise QuorumLost(text)


def _checked(answer: CohortSum, plan: RoundPlan, size: int) -> CohortSum:
    """BadInput for a sum that would broadcast, or make the adapter something that is no number."""
    where = f"round {plan.round}: the cohort's sum"
    if answer.total.shape != (size,) or answer.total.dtype != np.float64:
        raise BadInput(
            f"{where}: found {answer.total.dtype} {answer.total.shape}, expected float64 ({size},)"
        )
    if not is_finite(answer.total):
        raise BadInput(f"{where}: found a value that is not finite, expected finite float64")
    if not 0 <= answer.replies <= answer.asked:
        raise BadInput(f"{where}: found {answer.replies} replies, expected 0 to {answer.asked}")
    return answer


def _lost(plan: RoundPlan, answer: CohortSum, rules: Rules) -> QuorumLost | Refused:
    """What to raise for a cohort below its quorum: a refusal, where only those are in the way."""
    answered = f"{answer.replies} of {answer.asked} asked answered"
    text = (
        f"round {plan.round}: {answered if answer.asked else 'nobody was asked'}, expected a share"
        f" of {rules.quorum:g} and at least {rules.minimum} ({_reasons(answer.failures)})"
    )
    refused = answer.failures and all(failure.refused for failure in answer.failures)
    return Refused(text) if refused else QuorumLost(text)


def _reasons(failures: Sequence[Failure]) -> str:
    """The first five, and how many there are beside them."""
    more = f"; and {len(failures) - 5} more" if len(failures) > 5 else ""
    return "; ".join(f"{each.client}: {each.reason}" for each in failures[:5]) + more


def _attempted(
    manifest: RunManifest, plan: RoundPlan, answer: CohortSum, began: float
) -> Attempted:
    return Attempted(
        round=plan.round,
        phase=manifest.accounted[plan.phase].name,
        attempt=plan.attempt,
        seconds=time.monotonic() - began,
        asked=answer.asked,
        replies=answer.replies,
        failures=answer.failures,
    )


def _norm_of_mean(answer: CohortSum) -> float:
    """L2, of the mean update."""
    squares = (float(part @ part) for (part,) in by_stretches(answer.total))
    return math.sqrt(sum(squares)) / max(1, answer.replies)


def _apply(
    strategy: Strategy, plan: RoundPlan, before: Progress, answer: CohortSum, moved: Mask
) -> tuple[AdapterState, ServerState]:
    """The next state; the same where nobody was asked; FedloraError where it is not finite."""
    if not answer.replies:
        return before.state, before.memory
    mean = alike(answer.total, np.float64)
    for total, out in by_stretches(answer.total, mean):
        np.divide(total, answer.replies, out=out)
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is found below, and named
        state, memory = strategy.apply(before.state, before.memory, mean)
    state, memory = _standing(before, state, memory, moved)
    if all(is_finite(vector) for vector in (state.vector, *memory.vectors.values())):
        return state, memory
    raise FedloraError(
        f"round {plan.round}: the strategy's step left the range of float32, expected a finite"
        f" adapter; the one of round {before.round} is kept. A smaller [server] learning_rate may"
        " help"
    )


def _standing(
    before: Progress, state: AdapterState, memory: ServerState, moved: Mask
) -> tuple[AdapterState, ServerState]:
    """What a round leaves alone stands still, and so does what a strategy remembers of it.

    Else a momentum of one half of LoRA would move it in the other's round, and neither would be
    the same at all institutions while it was trained.
    """
    held = before.memory.vectors
    vectors = {
        name: _where(moved, new, held[name]) if name in held else new
        for name, new in memory.vectors.items()
    }
    vector = _where(moved, state.vector, before.state.vector)
    return AdapterState(state.spec, vector), ServerState(vectors, memory.counts)


def _where(moved: Mask, new: Vector, held: Vector) -> Vector:
    """`new` where a round moves a coordinate, else what was `held`."""
    if moved.all():
        return new
    found = alike(new, new.dtype)
    for mask, one, other, out in by_stretches(moved, new, held, found):
        out[:] = np.where(mask, one, other)
    return found


def _averaged(
    manifest: RunManifest, number: int, state: AdapterState, memory: ServerState, rules: Rules
) -> tuple[AdapterState, ServerState]:
    """The state to evaluate and export: the running average once averaging has begun."""
    phase = manifest.phase_of(number)
    averaged = round(rules.average_last * manifest.phases[phase].rounds)
    if number <= _last_round(manifest, phase) - averaged:
        return state, memory
    return add_to_average(state, memory)


def _scored(progress: Progress, candidate: AdapterState, metrics: Mapping[str, float]) -> Progress:
    """What the phase has to give, now that its newest `candidate` was looked at.

    The score is the accuracy where the task has one, else the loss. Nothing scored is replaced by
    what is not; of equals the later one is taken.
    """
    score = score_of(metrics)
    if progress.score is None or (score is not None and score >= progress.score):
        progress = replace(progress, released=candidate, score=score, released_round=progress.round)
    if not metrics:
        return progress
    if score is not None and (progress.best is None or score > progress.best):
        return replace(progress, best=score, stale=0)
    return replace(progress, stale=progress.stale + 1)


def score_of(metrics: Mapping[str, float]) -> float | None:
    """Higher is better; None where nothing was evaluated, or what was found is no number."""
    if not metrics:
        return None
    found = metrics["accuracy"] if "accuracy" in metrics else -metrics["loss"]
    return found if math.isfinite(found) else None


def _phase_ended(manifest: RunManifest, progress: Progress) -> Progress:
    """A phase ends with its best state, which is kept: a later one may turn out worse.

    The next starts there, with nothing remembered but the scores.
    """
    if not _ends_phase(manifest, progress.round):
        return progress
    over = replace(progress, state=progress.released, memory=ServerState())
    if progress.round == manifest.rounds:
        return over
    ended = progress.phases
    return replace(over, stale=0, score=None, released_round=progress.round, ended=ended)


def _last_round(manifest: RunManifest, phase: int) -> int:
    return sum(each.rounds for each in manifest.phases[: phase + 1])


def _ends_phase(manifest: RunManifest, number: int) -> bool:
    return number == _last_round(manifest, manifest.phase_of(number))


def _patience_is_over(manifest: RunManifest, progress: Progress, rules: Rules) -> bool:
    in_last_phase = progress.round >= _last_round(manifest, len(manifest.phases) - 2)
    return in_last_phase and 0 < rules.patience <= progress.stale
