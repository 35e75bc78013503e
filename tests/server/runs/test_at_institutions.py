"""What is told from noisy counts: shares, their errors, the worst institution and the spread."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedlora.common.manifest.manifest import EvaluationTerms, Groups, RunManifest
from fedlora.common.manifest.plan import RoundPlan
from fedlora.common.model.state import AdapterState
from fedlora.server.rounds.checkpoint import Checkpoint
from fedlora.server.rounds.cohort import CohortSum, Failure
from fedlora.server.rounds.counted import count_hold_outs, kept_counts
from fedlora.server.rounds.loop import ALONE, Rules
from fedlora.server.runs.at_institutions import at_institutions, figures
from tests.server.fakes import START, manifest_of

TERMS = EvaluationTerms(0.2, 1, 100.0, 2.0, ("right",))


def run_of(**changes: object) -> RunManifest:
    terms = replace(TERMS, **changes)  # type: ignore[arg-type]
    return replace(
        manifest_of(2, mode="record", noise_multiplier=2.0), epsilon=9.0, evaluation=terms
    )


def kept(*counts: tuple[float, ...]) -> dict[str, Any]:
    each = {f"n{place}": [value / 100 for value in row] for place, row in enumerate(counts)}
    total = np.sum(list(each.values()), axis=0).tolist()
    return {"total": total, "each": each, "replies": len(counts), "failures": []}


def test_the_error_of_a_share_is_what_it_scatters_by() -> None:
    """200 units of which 80 % are right, again and again with new noise: within 2 %."""
    rng, noise = np.random.default_rng(0), 4.0
    right = rng.binomial(200, 0.8, 20_000)
    pairs = np.stack([200 - right, right], axis=1) + rng.normal(0, noise, (20_000, 2))
    found = [figures({"right": pair}, noise) for pair in pairs]
    shares, errors = (np.array([row[name] for row in found]) for name in ("accuracy", "error"))
    assert shares.std() == pytest.approx(float(np.mean(errors)), rel=0.02)
    assert shares.mean() == pytest.approx(0.8, abs=0.001)


def test_the_worst_and_the_spread_are_of_what_can_be_told_apart() -> None:
    told = at_institutions(run_of(), kept((10.0, 90.0), (40.0, 60.0), (1.0, 2.0), (-5.0, 0.5)))
    assert told is not None and told["worst"] == "n1"
    rows = told["institutions"]
    assert rows["n0"]["accuracy"] == pytest.approx(0.9) and rows["n2"]["accuracy"] is None
    within = np.var([0.9, 0.6], ddof=1) - np.mean([rows[n]["error"] ** 2 for n in ("n0", "n1")])
    assert told["spread"] == pytest.approx(math.sqrt(within)) and told["noise"] == 2.0
    assert told["together"]["units"] == pytest.approx(198.5)
    alike = at_institutions(run_of(), kept((10.0, 90.0), (10.5, 89.5)))
    assert alike is not None and alike["spread"] == 0.0


def test_classes_are_told_from_either_kind_of_count() -> None:
    by_class = at_institutions(run_of(counts=("classes",)), kept((10.0, 90.0, 50.0, 50.0)))
    confused = at_institutions(run_of(counts=("confusion",)), kept((90.0, 10.0, 50.0, 50.0)))
    for told in (by_class, confused):
        assert told is not None and told["together"]["accuracy"] == pytest.approx(0.7)
        assert [row["accuracy"] for row in told["classes"].values()] == pytest.approx([0.9, 0.5])
    run = replace(run_of(counts=("groups",)), groups=Groups("ward", ("south",)))
    grouped = at_institutions(run, kept((10.0, 90.0, 50.0, 50.0)))
    assert grouped is not None and grouped["together"]["accuracy"] == pytest.approx(0.7)
    shares = [row["accuracy"] for row in grouped["groups"].values()]
    assert [*grouped["groups"]] == ["south", "all others"] and shares == pytest.approx([0.9, 0.5])
    bins = at_institutions(
        run_of(counts=("loss",)), kept((50.0, 20.0, 9.0, 0.0, 0.0, 0.0, 0.0, 1.0))
    )
    assert bins is not None and bins["together"]["accuracy"] is None
    assert bins["loss"]["to 0.05"] == pytest.approx(50) and bins["loss"]["above 5"] == 1
    assert at_institutions(manifest_of(2), {}) is None


class Counting:
    """A cohort of three that answers with counts, as often as it is asked."""

    def __init__(self, manifest: RunManifest) -> None:
        self.manifest, self.plans, self.replies = manifest, list[RoundPlan](), 3

    def total(self, plan: RoundPlan, state: AdapterState) -> CohortSum:
        self.plans.append(plan)
        each = {f"n{n}": np.array([0.1, 0.9], np.float32) for n in range(self.replies)}
        total = np.sum(list(each.values()), axis=0, dtype=np.float64) + np.zeros(2)
        failures = () if self.replies else (Failure("n0", "away"),)
        return CohortSum(total, self.replies, 3, failures, 0.1, each=each)


def test_the_released_adapter_is_evaluated_once(tmp_path: Path) -> None:
    manifest = run_of()
    checkpoint, cohort = Checkpoint.create(tmp_path / "c", manifest, START), Counting(manifest)
    released = AdapterState(START.spec, START.vector * 2)
    for _ in range(2):  # the second time as a run that is resumed
        count_hold_outs(tmp_path, checkpoint, cohort, released, Rules(), ALONE)
    expected = RoundPlan(manifest.digest, 1, 3, 1, released.digest)
    assert cohort.plans == [expected]
    assert kept_counts(tmp_path)["each"]["n2"] == pytest.approx([0.1, 0.9])


def test_what_was_lost_is_asked_again_as_often_as_the_noise_is_for(tmp_path: Path) -> None:
    manifest = run_of(attempts=2)
    checkpoint, cohort = Checkpoint.create(tmp_path / "c", manifest, START), Counting(manifest)
    cohort.replies = 0
    for _ in range(3):
        count_hold_outs(tmp_path, checkpoint, cohort, START, Rules(minimum=3), ALONE)
    assert [plan.attempt for plan in cohort.plans] == [1, 2]
    assert "0 of 3 asked answered" in kept_counts(tmp_path)["lost"]
    told = at_institutions(manifest, kept_counts(tmp_path))
    assert told is not None and "together" not in told and "away" in told["lost"]
    cohort.replies = 3
    count_hold_outs(tmp_path, checkpoint, cohort, START, Rules(), ALONE)
    assert len(cohort.plans) == 2  # both were reserved for: no third, whoever is there now
