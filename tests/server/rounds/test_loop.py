"""The round loop: what it asks, what it keeps, and that nothing that dies changes where it ends."""

from __future__ import annotations

import logging
import math
import re
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedlora.common.errors import BadInput, FedloraError, QuorumLost, Refused, Spent
from fedlora.common.manifest.plan import RoundPlan, Update
from fedlora.common.model.state import AdapterState, Vector
from fedlora.common.privacy.randomness import OsRandom, SeededRandom, participants
from fedlora.server.rounds.checkpoint import Checkpoint, Progress
from fedlora.server.rounds.cohort import CohortSum, Failure, Lost, replies_needed
from fedlora.server.rounds.loop import Around, Rules, run_rounds
from fedlora.server.strategies.fedavg import FedAvg, ServerOptimizer
from fedlora.server.strategies.strategy import ServerState
from tests.server.fakes import (
    SPEC,
    START,
    Behaviour,
    Disk,
    Killed,
    Run,
    full_disk,
    manifest_of,
    same,
    target,
)


def loud(update: Update) -> Update:
    raise BadInput(f"{update.client}: on fire")


def killed(update: Update) -> Update:
    raise KeyboardInterrupt


def refusing(update: Update) -> Update:
    raise Refused(f"{update.client}: the budget is spent")


# --- what a round does ----------------------------------------------------------------------------


def test_golden_federation(tmp_path: Path) -> None:
    """Plain FedAvg on three quadratics halves the distance to their minima's mean each round."""
    run = Run(tmp_path / "run", manifest_of(8), optimizer="none")
    run.cohort.wobble = 0.0
    found = run.go()
    centre = np.mean([target(client, SPEC.size) for client in range(3)], axis=0)
    step = 0.5 * 0.5  # of the clients, of the server
    np.testing.assert_allclose(
        found.state.vector, centre + (START.vector - centre) * (1 - step) ** 8, rtol=1e-5
    )


def test_each_plan_names_the_run_the_round_and_the_state(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", manifest_of(2, 3))
    states = []
    run.scores = lambda state, phase: states.append((state, phase)) or {"loss": 1.0}  # type: ignore[func-returns-value]
    run.go()
    plans = run.cohort.plans
    assert [(plan.phase, plan.round, plan.attempt) for plan in plans] == [
        (0, 1, 1),
        (0, 2, 2),
        (1, 3, 3),
        (1, 4, 4),
        (1, 5, 5),
    ]
    assert {plan.manifest for plan in plans} == {run.manifest.digest}
    assert [plan.adapter for plan in plans] == [
        START.digest,
        *(state.digest for state, _ in states[:-1]),
    ]
    assert [phase for _, phase in states] == [0, 0, 1, 1, 1]


def test_a_record_says_what_happened(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", manifest_of(1, 1), Rules(quorum=0.5))
    run.cohort.behaviours = {1: loud}
    run.go()
    first, second = run.log
    assert (first.round, first.phase, first.attempt, first.asked, first.replies) == (
        1,
        "head",
        1,
        3,
        2,
    )
    assert [(failure.client, failure.reason) for failure in first.failures] == [
        ("client-1", "client-1: on fire")
    ]
    assert (second.phase, set(second.metrics)) == ("adapter", {"loss"})
    assert first.seconds >= 0


def test_a_phase_has_its_own_strategy_and_an_empty_memory(tmp_path: Path) -> None:
    manifest = manifest_of(2, 2)
    whole = Run(tmp_path / "whole", manifest)
    checkpoint = whole.checkpoint()
    strategies = [
        FedAvg(ServerOptimizer("momentum", 1.0, 0.9, 0.99)),
        FedAvg(ServerOptimizer("adam", 0.1, 0.9, 0.99)),
    ]
    memories = []
    run_rounds(
        checkpoint,
        whole.cohort,
        strategies,
        Rules(),
        lambda state, phase: {},
        lambda record, progress: memories.append(set(progress.memory.vectors)),
    )
    assert memories == [{"velocity"}, set(), {"first", "second"}, set()]


def test_evaluation_is_due_every_so_often_and_at_the_end_of_a_phase(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", manifest_of(4, 5), Rules(evaluate_every=3))
    run.go()
    assert [record.round for record in run.log if record.metrics] == [3, 4, 6, 9]


def test_a_finished_run_asks_nobody(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", manifest_of(2))
    done, asked = run.go(), len(run.cohort.plans)
    same(run.go(), done)
    assert len(run.cohort.plans) == asked


# --- the average of the last rounds ---------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(
    head=st.integers(1, 6),
    adapter=st.integers(1, 6),
    share=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    optimizer=st.sampled_from(["none", "adam"]),
)
def test_a_phase_releases_the_mean_of_its_last_states(
    head: int, adapter: int, share: float, optimizer: str
) -> None:
    with tempfile.TemporaryDirectory() as name:
        run = Run(
            Path(name) / "run",
            manifest_of(head, adapter),
            Rules(average_last=share),
            optimizer=optimizer,
        )
        checkpoint, seen = run.checkpoint(), []
        strategy = _Recording(FedAvg(ServerOptimizer(optimizer, 0.5, 0.9, 0.99)))
        done = run_rounds(
            checkpoint,
            run.cohort,
            [strategy, strategy],
            run.rules,
            lambda state, phase: seen.append(state.vector) or {},  # type: ignore[func-returns-value]
            lambda record, progress: None,
        )
        for first, rounds in ((0, head), (head, adapter)):
            start = first + rounds - round(share * rounds)
            for place in range(first, first + rounds):
                kept = strategy.after[min(place, start) : place + 1]
                np.testing.assert_allclose(seen[place], np.mean(kept, axis=0), rtol=1e-5, atol=1e-6)
        if head > 1:
            # the next phase starts there
            np.testing.assert_array_equal(strategy.before[head], seen[head - 1])
        assert done.state == done.released
        np.testing.assert_array_equal(done.released.vector, seen[-1])


class _Recording:
    """A strategy that keeps what it was given and what it made of it."""

    def __init__(self, strategy: FedAvg) -> None:
        self._strategy = strategy
        self.before: list[Vector] = []
        self.after: list[Vector] = []

    def apply(
        self, state: AdapterState, memory: ServerState, mean: npt.NDArray[np.float64]
    ) -> tuple[AdapterState, ServerState]:
        self.before.append(state.vector)
        after, kept = self._strategy.apply(state, memory, mean)
        self.after.append(after.vector)
        return after, kept


# --- quorum and attempts --------------------------------------------------------------------------


def test_whoever_is_in_the_way_costs_no_attempt(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(tmp_path / "run", manifest_of(2, spare=1))
    answers = [(Failure("east", "not connected"),)] * 2 + [()] * 2
    run.around = Around(lambda: answers.pop(0))
    assert run.go().round == 2 and [plan.attempt for plan in run.cohort.plans] == [1, 2]
    assert [each.getMessage() for each in caplog.records] == [
        "round 1: no attempt is begun (east: not connected); waits on"
    ]


def test_waiting_ends_where_attempts_would_have_and_a_refusal_ends_it(tmp_path: Path) -> None:
    for refused, error in ((False, QuorumLost), (True, Refused)):
        run, asked = Run(tmp_path / str(refused), manifest_of(2)), list[int]()

        def in_the_way(refused: bool = refused, asked: list[int] = asked) -> tuple[Failure, ...]:
            asked.append(1)
            return (Failure("east", "away", refused),)

        run.around = Around(in_the_way)
        with pytest.raises(error, match="round 1: no attempt is begun"):
            run.go()
        assert len(asked) == (1 if refused else run.manifest.phases[0].attempts)
        assert run.checkpoint().attempts_in_all == 0


def test_an_attempt_that_a_kill_cut_off_goes_on_as_the_same_one(tmp_path: Path) -> None:
    """Else a kill in the middle of a long transfer would cost every institution an attempt."""
    for unfinished, expected in ((True, [1, 2]), (False, [2, 3])):
        run = Run(tmp_path / str(unfinished), manifest_of(2, spare=1))
        run.cohort.behaviours = {0: killed}
        with pytest.raises(KeyboardInterrupt):
            run.go()
        (cut_off,) = run.cohort.plans
        run.cohort.plans.clear()
        asked, run.cohort.behaviours = list[RoundPlan](), {}

        def is_unfinished(
            plan: RoundPlan, asked: list[RoundPlan] = asked, found: bool = unfinished
        ) -> bool:
            asked.append(plan)
            return found and len(asked) == 1

        run.around = Around(unfinished=is_unfinished)
        assert run.go().round == 2
        assert [plan.attempt for plan in run.cohort.plans] == expected
        assert asked[0] == cut_off and run.checkpoint().attempts_in_all == expected[-1]


def test_why_an_attempt_was_lost_is_kept(tmp_path: Path) -> None:
    run, lost = Run(tmp_path / "run", manifest_of(2)), list[Lost]()
    run.cohort.behaviours = {1: loud}
    run.around = Around(lose=lost.append)
    with pytest.raises(FedloraError):
        run.go()
    assert [each.attempt for each in lost] == [
        *range(1, run.manifest.phases[0].attempts + 1)
    ] and all(each.asked == 3 and "client-1: on fire" in each.reason for each in lost)


def test_a_reason_is_one_line_without_anybodys_folders() -> None:
    failure = Failure("east", "unix:/home/of/us/node/trainer.sock: \x1b[2Jgone\nround 9 fine")
    assert failure.reason == "unix:…/trainer.sock:  [2Jgone round 9 fine"
    kept = "found a/b/c and YWJj/ZGVm/Zw== of 3/4, expected 1/2"
    assert Failure("east", kept).reason == kept


def test_a_quorum_is_the_exact_share_of_those_asked() -> None:
    """All shares a person writes, 0.07 of 100 too, whose product in floats is just above 7."""
    for whole in (*range(1, 13), 100):
        for part in range(1, whole + 1):
            for asked in range(0, 121):
                assert replies_needed(asked, part / whole) == -(-part * asked // whole)


@pytest.mark.parametrize(("quorum", "round_reached"), [(0.6, 2), (2 / 3, 2), (0.7, 0), (1.0, 0)])
def test_below_the_quorum_the_attempts_run_out(
    tmp_path: Path, quorum: float, round_reached: int
) -> None:
    run = Run(tmp_path / "run", manifest_of(2, spare=1, mode="record"), Rules(quorum=quorum))
    run.cohort.behaviours = {1: loud}
    if round_reached:
        assert run.go().round == round_reached
        return
    with pytest.raises(
        Spent,
        match=r"all 3 attempts .*round 1: 2 of 3 asked answered, expected a share of .*on fire",
    ) as e:
        run.go()
    assert e.value.exit_code == 3
    assert [plan.attempt for plan in run.cohort.plans] == [1, 2, 3]
    same(run.checkpoint().load(), Progress(0, START, START))
    # nor does --resume find one more
    with pytest.raises(Refused, match="the last adapter is kept") as spent:
        run.go()
    assert spent.value.exit_code == 3


def test_a_lost_attempt_is_spent_and_the_next_one_counts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    undisturbed = Run(tmp_path / "a", manifest_of(3)).go()
    run = Run(tmp_path / "b", manifest_of(3, spare=2))
    run.cohort.behaviours = {0: _first_time(run, loud)}
    with caplog.at_level(logging.WARNING):
        found = run.go()
    assert found.state == undisturbed.state
    assert [record.attempt for record in run.log] == [1, 3, 4]
    assert "round 2: 2 of 3 asked answered" in caplog.text


def _first_time(run: Run, bad: Behaviour) -> Behaviour:
    """Behave badly in attempt 2 only."""
    return lambda update: bad(update) if update.attempt == 2 else update


def test_the_spare_attempts_of_a_phase_are_its_own(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", manifest_of(2, 2, spare=1, mode="record"))
    run.cohort.behaviours = {0: lambda update: loud(update) if update.attempt in (1, 4) else update}
    assert run.go().round == 4
    assert [run.checkpoint().attempts_begun(phase) for phase in (0, 1)] == [3, 3]


def test_when_attempts_are_spent_the_last_adapter_is_kept(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", manifest_of(3, mode="record"))
    run.cohort.behaviours = {0: _first_time(run, loud)}
    with pytest.raises(Refused, match="phase adapter: all 3 attempts"):
        run.go()
    kept = run.checkpoint().load()
    assert kept.round == 2
    assert kept.released != START


def test_a_refusal_is_not_asked_again(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", manifest_of(2, spare=5, mode="record"))
    run.cohort.behaviours = {1: refusing}
    with pytest.raises(Refused, match="client-1: the budget is spent"):
        run.go()
    assert len(run.cohort.plans) == 1
    run.cohort.behaviours = {0: loud, 1: refusing}  # something else stands in the way: it may go
    with pytest.raises(Spent):
        run.go()
    assert len(run.cohort.plans) == 7


def test_without_privacy_a_lost_quorum_is_no_end(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", manifest_of(2, spare=1))
    run.cohort.behaviours = {1: loud}
    with pytest.raises(QuorumLost) as error:
        run.go()
    assert error.value.exit_code == 4 and len(run.cohort.plans) == 3
    run.cohort.behaviours = {}
    assert run.go().round == 2


def test_many_failures_are_one_short_line(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", manifest_of(1), clients=9)
    run.cohort.behaviours = dict.fromkeys(range(9), loud)
    with pytest.raises(
        QuorumLost, match=r"0 of 9 asked .*client-4: on fire; and 4 more\)$"
    ) as error:
        run.go()
    assert "\n" not in str(error.value)


def test_a_round_that_asks_nobody_is_committed_unchanged(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", manifest_of(3))
    run.cohort.asked = lambda plan: range(0 if plan.round == 2 else 3)
    run.go()
    assert [(record.asked, record.replies) for record in run.log] == [(3, 3), (0, 0), (3, 3)]
    first, second, third = (plan.adapter for plan in run.cohort.plans)
    assert first != second == third


def test_nobody_answering_is_never_a_quorum(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", manifest_of(1), Rules(quorum=1e-12))
    run.cohort.behaviours = dict.fromkeys(range(3), loud)
    with pytest.raises(QuorumLost, match="0 of 3"):
        run.go()


# --- Poisson participation ------------------------------------------------------------------------


def test_participation_at_its_ends() -> None:
    assert participants(range(50), 0.0, OsRandom()) == []
    assert participants(range(50), 1.0, OsRandom()) == list(range(50))
    assert participants([], 0.5, OsRandom()) == []


def test_participants_join_independently_at_the_rate() -> None:
    source, rate, draws, names = SeededRandom(3, "participants"), 0.3, 4000, list("abcde")
    joined = np.zeros((draws, len(names)))
    for draw in range(draws):
        for name in participants(names, rate, source):
            joined[draw, names.index(name)] = 1
    assert np.abs(joined.mean(axis=0) - rate).max() < 4 * math.sqrt(rate * (1 - rate) / draws)
    size = joined.sum(axis=1)  # a fixed-size sample would have variance 0
    assert size.var() == pytest.approx(len(names) * rate * (1 - rate), rel=0.1)
    correlation = np.asarray(np.corrcoef(joined.T))[~np.eye(len(names), dtype=bool)]
    assert np.abs(correlation).max() < 4 / math.sqrt(draws)


# --- early stopping -------------------------------------------------------------------------------


def scored(tmp_path: Path, scores: list[float], patience: int, *rounds: int, every: int = 1) -> Run:
    run = Run(
        tmp_path / "run", manifest_of(*rounds), Rules(patience=patience, evaluate_every=every)
    )
    given_scores = iter(scores)
    run.scores = lambda state, phase: {"loss": 9.0, "accuracy": next(given_scores)}
    return run


NAN = math.nan


@pytest.mark.parametrize(
    ("scores", "patience", "reached"),
    [
        ([0.1, 0.2, 0.2, 0.1, 0.9], 2, 4),  # equal is not better
        ([0.1, 0.2, 0.1, 0.3, 0.2, 0.1], 2, 6),
        ([0.5, 0.4, 0.3, 0.2, 0.1, 0.0], 0, 6),
        ([0.5, 0.4, 0.3, 0.2, 0.1, 0.0], 1, 2),
        ([NAN, NAN, NAN, 0.5, 0.6, 0.7], 4, 6),  # what is no number is no score, and beats nothing
        ([NAN, NAN, NAN, 0.5, 0.6, 0.7], 3, 3),
    ],
)
def test_patience(tmp_path: Path, scores: list[float], patience: int, reached: int) -> None:
    assert scored(tmp_path, scores, patience, 6).go().round == reached


def test_patience_counts_evaluations(tmp_path: Path) -> None:
    assert scored(tmp_path, [0.5, 0.4, 0.3], 2, 9, every=2).go().round == 6


def test_patience_does_not_end_a_run_before_its_last_phase(tmp_path: Path) -> None:
    falling = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2]
    done = scored(tmp_path, falling, 2, 4, 4).go()
    # what the head phase reached is still the score to beat
    assert (done.round, done.best) == (6, 0.9)


@pytest.mark.parametrize(
    ("scores", "rounds", "best"),
    [
        ([0.5, 0.6, 0.7, 0.8], (2, 2), 4),
        ([0.5, 0.6, 0.7, 0.59], (2, 2), 3),  # a phase's best round, not its end
        ([0.5, 0.6, 0.5, 0.6], (2, 2), 4),  # of equals the later one
        ([0.5, 0.5, 0.4, 0.3], (2, 2), 2),
        ([0.9, 0.6, 0.5, 0.5], (2, 2), 1),
        ([0.5, 0.6, NAN, NAN], (2, 2), 2),
        ([NAN, NAN, NAN, NAN], (2, 2), 4),
        ([0.5, 0.9, 0.6, 0.7], (4,), 2),
        ([NAN, 0.9, NAN, 0.7], (4,), 2),  # what is no number replaces nothing
    ],
)
def test_a_phase_that_made_things_worse_is_not_released(
    tmp_path: Path, scores: list[float], rounds: tuple[int, ...], best: int
) -> None:
    run = scored(tmp_path, scores, 0, *rounds)
    states: list[AdapterState] = []
    inner = run.scores
    run.scores = lambda state, phase: states.append(state) or inner(state, phase)  # type: ignore[func-returns-value]
    done = run.go()
    assert done.release == states[best - 1]
    assert run.checkpoint().load().release == done.release


def test_a_run_that_ends_early_releases_the_better_phase(tmp_path: Path) -> None:
    run = scored(tmp_path, [0.5, 0.6, 0.1], 0, 2, 2)
    run.cohort.before = lambda: interrupt() if len(run.log) == 3 else None
    with pytest.raises(KeyboardInterrupt):
        run.go()
    found = run.checkpoint().load()
    assert (found.round, found.score, found.release) == (3, 0.1, found.ended[0].state)


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(("score", "kept"), [(0.7, True), (0.5, False), (None, False)])
def test_a_start_whose_score_is_known_is_left_for_nothing_worse(
    score: float | None, kept: bool, tmp_path: Path
) -> None:
    Checkpoint.create(tmp_path / "run", manifest_of(2), START, score)
    run = Run(tmp_path / "run", manifest_of(2))
    run.scores = lambda state, phase: {"loss": 9.0, "accuracy": 0.6}
    found = run.go()
    assert (found.release == START, found.released_round == 0) == (kept, kept)


def test_without_accuracy_the_loss_decides(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", manifest_of(5), Rules(patience=2))
    losses = iter([3.0, 2.0, 2.5, 2.1, 0.0])
    run.scores = lambda state, phase: {"loss": next(losses)}
    done = run.go()
    assert (done.round, done.best) == (4, -2.0)


def test_a_run_that_was_stopped_early_stays_stopped(tmp_path: Path) -> None:
    run = scored(tmp_path, [0.5, 0.4], 1, 6)
    done, asked = run.go(), len(run.cohort.plans)
    same(run.go(), done)
    assert len(run.cohort.plans) == asked


# --- bad updates, by name -------------------------------------------------------------------------

BAD_UPDATES: dict[str, tuple[Callable[[Vector], Vector], str]] = {
    "adapter-huge-norm": (
        lambda delta: delta + np.float32(1e6),
        "found an L2 norm of 2.646e[+]06, expected",
    ),
    "adapter-largest-float": (
        lambda delta: np.full_like(delta, np.finfo(np.float32).max),
        "L2 norm of 9",
    ),
    "st-wrong-shape": (
        lambda delta: delta[None],
        r"found float32 \(1, 7\), expected float32 \(7,\)",
    ),
    "st-wrong-shape-scalar": (lambda delta: delta[:1], r"found float32 \(1,\), expected"),
    "st-wrong-dtype": (lambda delta: delta.astype(np.float64), r"found float64 \(7,\), expected"),
    "vec-short": (lambda delta: delta[:-1], r"found float32 \(6,\), expected"),
    "vec-long": (lambda delta: np.append(delta, delta), r"found float32 \(14,\), expected"),
    "st-nan": (
        lambda delta: np.where(np.arange(7) == 3, np.nan, delta).astype(np.float32),
        "not finite",
    ),
}


@pytest.mark.parametrize("name", BAD_UPDATES)
@pytest.mark.parametrize("mode", ["none", "record"])
def test_a_bad_update_is_that_peer_s_failure_only(tmp_path: Path, name: str, mode: str) -> None:
    change, reason = BAD_UPDATES[name]
    manifest = manifest_of(2, mode=mode, noise_multiplier=1.0)
    without = Run(tmp_path / "without", manifest)
    without.cohort.asked = lambda plan: range(2)
    run = Run(tmp_path / "run", manifest, Rules(quorum=0.6))
    run.cohort.behaviours = {2: lambda update: replace(update, delta=change(update.delta))}
    assert run.go().state == without.go().state
    for record in run.log:
        (failure,) = record.failures
        assert failure.client == "client-2"
        assert not failure.refused
        assert re.search(reason, failure.reason), failure.reason


BAD_SUMS: dict[str, tuple[CohortSum, str]] = {
    "broadcast": (
        CohortSum(np.ones(1), 1, 1, (), 0.0),
        r"found float64 \(1,\), expected float64 \(7,\)",
    ),
    "scalar": (
        CohortSum(np.float64(1) * np.ones(()), 1, 1, (), 0.0),
        r"found float64 \(\), expected",
    ),
    "float32": (CohortSum(np.ones(7, dtype=np.float32), 1, 1, (), 0.0), "found float32"),
    "nan": (CohortSum(np.full(7, np.nan), 1, 1, (), 0.0), "not finite"),
    "more-replies-than-asked": (
        CohortSum(np.ones(7), 2, 1, (), 0.0),
        "found 2 replies, expected 0 to 1",
    ),
    "negative-replies": (CohortSum(np.ones(7), -1, 1, (), 0.0), "found -1 replies"),
}


@pytest.mark.parametrize("name", BAD_SUMS)
def test_a_bad_sum_never_reaches_the_adapter(tmp_path: Path, name: str) -> None:
    answer, reason = BAD_SUMS[name]
    run = Run(tmp_path / "run", manifest_of(2))
    run.cohort.total = lambda plan, state: answer  # type: ignore[method-assign]
    with pytest.raises(BadInput, match=reason):
        run.go()
    same(run.checkpoint().load(), Progress(0, START, START))


def test_an_adapter_that_leaves_float32_is_not_committed(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", manifest_of(5))

    def growing(plan: RoundPlan, state: AdapterState) -> CohortSum:
        return CohortSum(np.full(7, 10.0 ** (13 * plan.round)), 1, 1, (), 0.0)

    run.cohort.total = growing  # type: ignore[method-assign]
    with pytest.raises(
        FedloraError, match=r"round 3: .* left the range of float32.* round 2 is kept"
    ):
        run.go()
    kept = run.checkpoint().load()
    assert kept.round == 2
    assert np.isfinite(kept.state.vector).all()


# --- killed and resumed ---------------------------------------------------------------------------


def disturbed(folder: Path, disk: Disk, mode: str = "none", spare: int = 0) -> Run:
    """A run of two phases in which everything happens, and in which any step may be the last."""
    manifest = manifest_of(2, 4, spare=spare, mode=mode)
    rules = Rules(quorum=0.6, average_last=0.5, patience=3, evaluate_every=2)
    run = Run(folder, manifest, rules, optimizer="adam", step=disk.step)
    run.cohort.behaviours = {1: lambda update: loud(update) if update.round == 3 else update}
    return run


def undisturbed(patch: pytest.MonkeyPatch) -> tuple[Run, Progress, int]:
    with tempfile.TemporaryDirectory() as name, patch.context() as inner:
        disk = Disk().install(inner)
        run = disturbed(Path(name) / "run", disk)
        return run, run.go(), disk.steps


def until_done(
    run: Run, disk: Disk, fail_at: list[int], error: Callable[[], BaseException]
) -> Progress:
    """Start; fail at each of the steps, counted from each start; start once more."""
    expected = FedloraError if isinstance(error(), OSError) else type(error())
    for step in fail_at:
        disk.fail_at, disk.steps, disk.error = step, 0, error
        try:
            return run.go()
        except expected:
            pass
        except OSError:
            assert isinstance(error(), OSError)  # from outside the checkpoint: a log, an evaluation
        disk.restarted()
        _the_last_commit_is_whole(run)
    disk.steps = 0
    return run.go()


def _the_last_commit_is_whole(run: Run) -> None:
    if (run.folder / "manifest.json").exists():
        kept = Checkpoint.open(run.folder, SPEC).load()
        # The observer hears of a round just before its commit: a log is never behind.
        assert kept.round <= len(run.log) <= kept.round + 1


@pytest.mark.parametrize(("error", "stride"), [(Killed, 1), (KeyboardInterrupt, 3), (full_disk, 2)])
def test_stopped_at_any_step_and_resumed_it_ends_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Callable[[], BaseException], stride: int
) -> None:
    reference, expected, steps = undisturbed(monkeypatch)
    assert expected.round == 6
    assert steps > 80
    disk = Disk().install(monkeypatch)
    for step in range(0, steps, stride):
        run = disturbed(tmp_path / str(step), disk)
        same(until_done(run, disk, [step], error), expected)
        assert [record.round for record in run.log] == [1, 2, 3, 4, 5, 6]
        assert [record.metrics for record in run.log] == [
            record.metrics for record in reference.log
        ]
        disk.fail_at = None
        left = {path.name for path in run.folder.iterdir()}
        # stays where the very last step, its removal, was cut off
        left.discard("state-5.safetensors")
        assert left == {"attempts.json", "manifest.json", "progress.json", "state-6.safetensors"}


@settings(
    deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(steps=st.lists(st.integers(0, 60), min_size=2, max_size=8))
def test_killed_again_and_again_it_ends_with_the_same_bits(
    steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, expected, _ = undisturbed(monkeypatch)
    with tempfile.TemporaryDirectory() as name, monkeypatch.context() as inner:
        disk = Disk().install(inner)
        same(until_done(disturbed(Path(name) / "run", disk), disk, steps, Killed), expected)


@settings(
    deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(steps=st.lists(st.integers(0, 60), max_size=12), spare=st.integers(0, 3))
def test_killed_again_and_again_no_attempt_is_used_twice_or_beyond_what_was_accounted(
    steps: list[int], spare: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`Institutions` itself refuses a plan with an attempt that it has heard of."""
    with tempfile.TemporaryDirectory() as name, monkeypatch.context() as inner:
        disk = Disk().install(inner)
        run = disturbed(Path(name) / "run", disk, mode="record", spare=spare)
        try:
            until_done(run, disk, steps, Killed)
        except Refused as error:
            assert "are spent" in str(error)
        disk.fail_at = None
        heard = [sum(plan.phase == phase for plan in run.cohort.plans) for phase in (0, 1)]
        begun = [run.checkpoint().attempts_begun(phase) for phase in (0, 1)]
        for phase in (0, 1):
            assert heard[phase] <= begun[phase] <= run.manifest.phases[phase].attempts
        run.checkpoint().check_against_ledger(
            max((plan.attempt for plan in run.cohort.plans), default=0)
        )


def test_a_full_disk_in_the_middle_of_a_run_keeps_the_last_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, expected, steps = undisturbed(monkeypatch)
    disk = Disk(lasting=True).install(monkeypatch)
    for step in range(20, steps, 7):
        run = disturbed(tmp_path / str(step), disk)
        same(until_done(run, disk, [step], full_disk), expected)
