"""Mode "client" in simulation: whole runs of a tiny model, what they leave, what is charged."""

from __future__ import annotations

import hashlib
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from fedlora.client.training.moments import MomentStore
from fedlora.client.training.trainer import Trainer, charge
from fedlora.common.config.parts import Terms
from fedlora.common.errors import BadInput, Refused
from fedlora.common.privacy.calibration import LEVELS
from fedlora.common.privacy.institution_level import InstitutionLevel
from fedlora.common.privacy.modes import guarantee_of
from fedlora.common.privacy.skellam import Release, epsilon_of_releases
from fedlora.common.secagg.cohort import threshold
from fedlora.server.defaults.decide import decided
from fedlora.server.defaults.public_facts import PublicFacts
from fedlora.server.runs.run import conduct
from fedlora.server.runs.schedule import make_manifest
from fedlora.simulations.begin import begin
from fedlora.simulations.engines.sequential import SequentialCohort, sequential
from fedlora.simulations.experiments.planning import plan
from fedlora.simulations.report.pages import write_report
from tests.server.fakes import facts_of
from tests.simulations.engines.test_masked import SECURE
from tests.simulations.experiments.test_simulate import config, cpu, data, run_whole, stopped_after

__all__ = ["data"]
FACTS = PublicFacts(50, 2)
CLIENT = [*SECURE, "privacy.clip=0.5", "privacy.head_phase_clip=0.5"]


def test_a_whole_run(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    """Two phases; ε is stated for institutions, charged for records; no attempt is free."""
    run, summary = run_whole(config(tiny_bert, data, "client", *CLIENT), tmp_path / "run")
    manifest, ledger = run.manifest, run.ledger
    stated, charged = (
        guarantee_of(manifest).stated_epsilon(),
        guarantee_of(manifest).charged_epsilon(),
    )
    assert 0.99 * 8.0 < stated <= 8.0 and charged > stated
    assert (summary["epsilon"], summary["epsilon_charged"], summary["unit"]) == (
        stated,
        charged,
        "institution",
    )
    assert set(summary["epsilon_by_client"].values()) == {stated}  # type: ignore[attr-defined]
    assert [each["steps"] for each in summary["schedule"]] == [4, 4]  # type: ignore[attr-defined]
    for budget in ("population population", *(f"client-{number}" for number in range(5))):
        reserved = ledger.reserved_for(budget, manifest.digest)
        assert (
            reserved is not None
            and reserved.epsilon >= charged
            and reserved.delta == manifest.delta
        )
    assert manifest.skellam is not None and manifest.secure is not None
    size = run.federation.model.spec.size
    assert manifest.skellam.coordinates == (int(run.federation.model.spec.head_mask().sum()), size)
    assert manifest.skellam.carriers == threshold(3) - 1 == 2
    assert summary["noise_source"] == "Skellam on whole numbers, shared between the institutions"
    page = write_report(tmp_path / "run").read_text()
    assert "all records of one together" in page and "For a single record at an institution" in page
    assert "The unit is an institution" in json.dumps(summary["privacy_statement"])
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["secure"]["members"] for line in lines] == [5] * 4
    assert 0 < lines[0]["epsilon"] < lines[-1]["epsilon"] <= stated


def test_every_attempt_is_reserved_and_no_hash_of_a_clear_update_is_kept(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    """Also attempts that were lost after their inputs.

    What is committed says which plan, and nothing of the data.
    """
    settings = config(tiny_bert, data, "client", *CLIENT, "federation.spare_rounds=3")
    run = begin(settings, tmp_path / "run", cpu())
    cohort, lost = sequential(run), {"left": 1}
    exchange = cohort._exchange  # type: ignore[attr-defined]
    ask, plans = exchange.ask, []

    def losing(stage, messages, plan, state):  # type: ignore[no-untyped-def]
        plans.append(plan)
        if stage == "confirm" and lost["left"]:
            lost["left"] = 0
            return iter(())
        return ask(stage, messages, plan, state)

    exchange.ask = losing
    assert conduct(run, cohort).round == 4
    entries = [
        entry.body for entry in run.ledger.entries() if entry.body.get("budget") == "client-0"
    ]
    attempts = [body["attempt"] for body in entries if body["kind"] == "reserve"]
    assert attempts == [1, 2, 3, 4, 5]
    allowed = {"sha256:" + hashlib.sha256(plan.to_bytes()).hexdigest() for plan in plans}
    assert {body["update"] for body in entries if body["kind"] == "commit"} <= allowed


def test_a_run_that_was_stopped_goes_on(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    settings = config(tiny_bert, data, "client", *CLIENT)
    run = stopped_after(2, settings, tmp_path / "run")
    spent = run.ledger.spent("client-0")
    run.ledger.close()
    again, summary = run_whole(settings, tmp_path / "run", resume=True)
    assert summary["rounds"] == 4 and again.ledger.spent("client-0") == spent


def test_what_leaves_a_trainer_is_clipped_and_only_under_masks(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    """The in-process engine without masks is refused, whoever builds it.

    A masked trainer clips the whole update.
    """
    run = begin(
        config(tiny_bert, data, "client", *CLIENT, "training.learning_rate=5.0"),
        tmp_path / "r",
        cpu(),
    )
    plain = SequentialCohort(run.federation, run.manifest, run.ledger, run.moments)
    from fedlora.common.manifest.plan import RoundPlan

    state = run.checkpoint.load().state
    plan = RoundPlan(run.manifest.digest, 1, 3, 1, state.digest)
    found = plain.total(plan, state)
    assert found.replies == 0 and all("under masks only" in each.reason for each in found.failures)
    masked = run.federation.trainer(0, run.manifest, run.ledger, run.moments, masked=True)
    assert isinstance(masked, Trainer)
    one = masked.train(plan, state).delta
    assert 0.49 < np.linalg.norm(one.astype(np.float64)) <= 0.5
    head = masked.train(RoundPlan(run.manifest.digest, 0, 1, 2, state.digest), state).delta
    assert not head[~state.spec.head_mask()].any() and head.any()


def test_a_manifest_that_understates_is_refused_before_anything_is_charged(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    from dataclasses import replace

    run = begin(config(tiny_bert, data, "client", *CLIENT), tmp_path / "run", cpu())
    lower = replace(run.manifest, epsilon=7.0)
    with pytest.raises(Refused, match="its schedule costs"):
        run.federation.trainer(0, lower, run.ledger, MomentStore(tmp_path), masked=True)
    assert run.ledger.reserved_for("client-0", lower.digest) is None


def test_noise_is_calibrated_for_all_phases_together(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    settings = config(tiny_bert, data, "client", *CLIENT, "federation.spare_rounds=0")
    moved = {"head": 10, "adapter": 1000}
    manifest = make_manifest(Terms.of(decided(settings, FACTS)), facts_of(settings, moved))
    head, adapter = (phase.noise_multiplier for phase in manifest.phases)
    releases = [Release(head, LEVELS, 10, 2), Release(adapter, LEVELS, 1000, 2)]
    assert InstitutionLevel(manifest).releases() == releases
    assert 0.995 * 8.0 <= epsilon_of_releases(releases, 1e-4) <= 8.0
    assert 0.995 * 4.0 <= epsilon_of_releases(releases[:1], 1e-4) <= 4.0
    assert charge(guarantee_of(manifest)).epsilon == epsilon_of_releases(releases, 1e-4, moved=2)
    many = "federation.clients=200"  # ten deviations of their noise need the wider ring
    loud = config(tiny_bert, data, "client", *CLIENT, "privacy.epsilon=0.02", many)
    wide = make_manifest(Terms.of(decided(loud, FACTS)), facts_of(loud, moved))
    assert manifest.secure is not None and wide.secure is not None
    assert (manifest.secure.bits, wide.secure.bits) == (32, 64)
    # and finer noise could not be drawn
    assert manifest.secure.levels == LEVELS > wide.secure.levels


def test_a_plan_says_whose_epsilon_it_is(tiny_bert: Path, data: Path) -> None:
    console = Console(record=True, width=200, file=io.StringIO())
    console.print(plan(config(tiny_bert, data, "client", *CLIENT), cpu()))
    assert re.search(
        r"all attempts +(8|7\.9\d*) at δ = 0.0001, for one institution", console.export_text()
    )


def test_what_cannot_be(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    settings = config(tiny_bert, data, "client", *CLIENT)
    # nothing is noised that is not known to move
    with pytest.raises(BadInput, match='mode = "client": expected'):
        make_manifest(Terms.of(decided(settings, FACTS)), facts_of(settings, {}))
    with pytest.raises(BadInput, match=r"\[privacy\] delta = 0.3: expected less than 1/5"):
        begin(
            config(tiny_bert, data, "client", *CLIENT, "privacy.delta=0.3"),
            tmp_path / "delta",
            cpu(),
        )
