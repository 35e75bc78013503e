"""RoLoRA in the round loop: a round leaves the other half alone, whatever a strategy remembers."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

from fedlora.common.manifest.plan import RoundPlan
from fedlora.common.model.state import AdapterState
from fedlora.server.rounds.checkpoint import Checkpoint, Progress
from fedlora.server.rounds.cohort import CohortSum
from fedlora.server.rounds.loop import Rules, run_rounds
from fedlora.server.strategies.fedavg import FedAvg, ServerOptimizer
from tests.common.manifest.test_turns import SPEC, by_turns
from tests.oracles import server_states

START = AdapterState(SPEC, np.linspace(-1, 1, SPEC.size, dtype=np.float32))
ROUNDS = 6


def mean_of(number: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return np.random.default_rng(number).normal(size=SPEC.size)


@dataclass
class Cohort:
    """One update a round, of its half; the first attempt of every round is lost."""

    states: list[AdapterState] = field(default_factory=list)
    plans: list[RoundPlan] = field(default_factory=list)

    def total(self, plan: RoundPlan, state: AdapterState) -> CohortSum:
        again = any(each.round == plan.round for each in self.plans)
        self.plans.append(plan)
        if again:
            self.states.append(state)
        moved = SPEC.moved_by("lora.B" if plan.round % 2 else "lora.A")
        return CohortSum(np.where(moved, mean_of(plan.round), 0.0), int(again), 1, (), 0.0)


def gone(folder: Path, optimizer: str, stop: int = 0) -> tuple[Cohort, Progress | None]:
    """The whole run, or one that is killed as round `stop` is told."""
    (phase,) = by_turns(ROUNDS, spare=2 * ROUNDS).phases
    run = replace(by_turns(ROUNDS), phases=(replace(phase, name="lora"),))
    begun = (folder / "manifest.json").exists()
    checkpoint = Checkpoint.open(folder, SPEC) if begun else Checkpoint.create(folder, run, START)
    cohort = Cohort()

    def told(record: object, progress: Progress) -> None:
        if progress.round == stop:
            raise KeyboardInterrupt

    strategies = [FedAvg(ServerOptimizer(optimizer, 0.1, 0.9, 0.99))]
    try:
        found = run_rounds(checkpoint, cohort, strategies, Rules(), lambda *_: {}, told)
    except KeyboardInterrupt:
        return cohort, None
    return cohort, found


@pytest.mark.parametrize("optimizer", ["none", "momentum", "adam", "yogi"])
def test_each_half_goes_as_if_the_other_s_rounds_were_not(optimizer: str, tmp_path: Path) -> None:
    cohort, found = gone(tmp_path / "run", optimizer)
    assert found is not None and [each.round for each in cohort.plans] == [
        1,
        1,
        2,
        2,
        3,
        3,
        4,
        4,
        5,
        5,
        6,
        6,
    ]
    for half, rounds in (("B", (1, 3, 5)), ("A", (2, 4, 6))):
        mask = SPEC.moved_by(f"lora.{half}")
        expected = server_states(
            optimizer,
            [0.1] * 3,
            0.9,
            0.99,
            START.vector[mask].tolist(),
            [mean_of(number)[mask].tolist() for number in rounds],
        )
        np.testing.assert_allclose(found.state.vector[mask], expected[-1], rtol=1e-4, atol=1e-6)
    for number, (before, after) in enumerate(
        zip(cohort.states, [*cohort.states[1:], found.state], strict=True), start=1
    ):
        changed = before.vector != after.vector
        assert np.array_equal(changed, SPEC.moved_by("lora.B" if number % 2 else "lora.A"))


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_run_that_was_killed_goes_on_with_the_same_half(stop: int, tmp_path: Path) -> None:
    _, whole = gone(tmp_path / "whole", "adam")
    killed, nothing = gone(tmp_path / "run", "adam", stop)
    assert nothing is None and killed.plans[-1].round == stop
    again, found = gone(tmp_path / "run", "adam")
    assert again.plans[0].round == stop and again.plans[0].attempt > killed.plans[-1].attempt
    assert whole is not None and found is not None and found.state == whole.state
