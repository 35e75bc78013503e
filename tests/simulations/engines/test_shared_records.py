"""Records with shared noise in simulation: whole runs of a tiny model, and what they charge."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fedlora.client.training.trainer import Trainer
from fedlora.common.config.load import parse_config
from fedlora.common.config.parts import Terms
from fedlora.common.config.schema import config_to_toml
from fedlora.common.errors import BadInput
from fedlora.common.manifest.plan import RoundPlan
from fedlora.common.privacy.modes import guarantee_of
from fedlora.common.privacy.shared_record_level import SharedRecordLevel
from fedlora.common.privacy.unit_release import COARSEST
from fedlora.server.defaults.decide import decided
from fedlora.server.defaults.public_facts import PublicFacts
from fedlora.server.runs.schedule import make_manifest
from fedlora.simulations.begin import begin
from fedlora.simulations.engines.sequential import SequentialCohort
from fedlora.simulations.report.pages import write_report
from tests.server.fakes import facts_of
from tests.simulations.engines.test_masked import SECURE
from tests.simulations.experiments.test_simulate import config, cpu, data, run_whole, stopped_after
from tests.simulations.test_cli import call

__all__ = ["data"]
FACTS = PublicFacts(50, 2)
SHARED = [*SECURE, "privacy.noise=shared", "training.steps=1", "training.head_steps=1"]


def test_a_whole_run(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    """Two phases; what is stated is charged; every attempt has an entry that says nothing."""
    run, summary = run_whole(config(tiny_bert, data, "record", *SHARED), tmp_path / "run")
    manifest, ledger = run.manifest, run.ledger
    guarantee = guarantee_of(manifest)
    stated = guarantee.stated_epsilon()
    assert isinstance(guarantee, SharedRecordLevel) and manifest.largest_cohort == 5
    assert 0.99 * 8.0 < stated <= 8.0
    assert (summary["epsilon"], summary["epsilon_charged"], summary["unit"], summary["mode"]) == (
        stated,
        stated,
        "record",
        "shared-record",
    )
    assert summary["epsilon_alone"] == guarantee.epsilon_alone()
    assert [each["steps"] for each in summary["schedule"]] == [4, 4]  # type: ignore[attr-defined]
    for budget in ("population population", *(f"client-{number}" for number in range(5))):
        reserved = ledger.reserved_for(budget, manifest.digest)
        assert reserved is not None and reserved.epsilon >= stated
    said = json.dumps(summary["privacy_statement"])
    assert "If all other institutions sided with the coordinator" in said
    page = write_report(tmp_path / "run").read_text()
    assert "own institution&#39;s part of the noise" in page and "each record is protected" in page
    assert "The sums over institutions are" in page and "Each institution's updates" not in page
    kept = (tmp_path / "run" / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in kept.splitlines()]
    assert [line["secure"]["members"] for line in lines] == [5] * 4
    assert 0 < lines[0]["epsilon"] < lines[-1]["epsilon"] <= stated
    assert len({line["loss"] for line in lines}) == 4  # each round moves the model


def test_the_command_runs_it_to_the_end(
    tiny_bert: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, out = tmp_path / "config.toml", tmp_path / "run"
    path.write_text(config_to_toml(config(tiny_bert, data, "record", *SHARED)))
    words = ("run", str(path), "--device", "cpu", "--out", str(out))
    code, _, error = call(monkeypatch, capsys, *words, "--set", "federation.rounds=3")
    assert code == 0, error
    summary = json.loads((out / "summary.json").read_text())
    assert summary["mode"] == "shared-record" and summary["rounds"] == 3
    assert summary["epsilon"] <= 8.0 < summary["epsilon_alone"]


def test_a_run_that_was_stopped_goes_on(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    settings = config(tiny_bert, data, "record", *SHARED)
    run = stopped_after(2, settings, tmp_path / "run")
    spent = run.ledger.spent("client-0")
    run.ledger.close()
    again, summary = run_whole(settings, tmp_path / "run", resume=True)
    assert summary["rounds"] == 4 and again.ledger.spent("client-0") == spent


def test_what_leaves_a_trainer_leaves_under_masks_only_and_no_hash_of_it_is_kept(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    changes = ("training.sampling_rate=1.0", "privacy.clip=0.01")
    run = begin(config(tiny_bert, data, "record", *SHARED, *changes), tmp_path / "r", cpu())
    state = run.checkpoint.load().state
    plan = RoundPlan(run.manifest.digest, 1, 3, 1, state.digest)
    plain = SequentialCohort(run.federation, run.manifest, run.ledger, run.moments)
    found = plain.total(plan, state)
    assert found.replies == 0 and all("under masks only" in each.reason for each in found.failures)
    masked = run.federation.trainer(0, run.manifest, run.ledger, run.moments, masked=True)
    assert isinstance(masked, Trainer)
    one = masked.train(plan, state)
    two = masked.train(RoundPlan(run.manifest.digest, 1, 3, 2, state.digest), state)
    assert one.delta.dtype == np.float64
    # at rate 1 and without noise the same sum again, and of so many units, each of one clip
    assert np.array_equal(one.delta, two.delta) and one.delta.any()
    phase = run.manifest.phases[1]
    step = phase.learning_rate * phase.clip / phase.expected_units
    assert np.linalg.norm(one.delta) <= run.federation.partition.sizes[0] * step * (1 + 1e-9)
    kept = [each.body["update"] for each in run.ledger.entries() if each.body["kind"] == "commit"]
    assert len(set(kept)) == 2


def test_noise_and_grid_are_chosen_together(tiny_bert: Path, data: Path) -> None:
    """32 bits where they are fine enough, else 64; never coarser than is stated."""
    many = [f"training.{name}=20000" for name in ("expected_units", "head_expected_units")]
    many.append("federation.spare_rounds=0")
    settings = config(tiny_bert, data, "record", *SHARED, *many)
    made = {
        moved: make_manifest(
            Terms.of(decided(settings, FACTS)), facts_of(settings, {"head": 10, "adapter": moved})
        )
        for moved in (1000, 10**6)
    }
    bits = [run.secure.bits for run in made.values() if run.secure is not None]
    assert bits == [32, 64]
    for run in made.values():
        guarantee = SharedRecordLevel(run)
        assert 0.995 * 8 <= guarantee.stated_epsilon() <= 8
        assert 0.995 * 4 <= guarantee.epsilon_of([2, 0]) <= 4
        for release in guarantee.releases():
            assert release.sensitivity <= (1 + COARSEST) * release.levels


@pytest.mark.parametrize(("units", "left"), [(60_000, 289), (5_000, 37)])
def test_what_docs_say_of_ten_institutions_and_the_default_schedule(units: int, left: int) -> None:
    """docs/privacy.md: what is left to one that is alone, and what a Rényi bound costs."""
    made = {}
    for noise in ("own", "shared"):
        text = f'[federation]\nclients = 10\n[privacy]\nepsilon = 8.0\nnoise = "{noise}"\n'
        more = "[aggregation]\nsecure = true\nminimum_cohort = 7\nmax_colluders = 1\n"
        settings = decided(parse_config(text + "delta = 1e-5\n" + more), PublicFacts(units, 4))
        facts = facts_of(settings, {"head": 1_540, "lora": 80_000, "adapter": 81_540})
        made[noise] = make_manifest(Terms.of(settings), facts)
    assert round(guarantee_of(made["shared"]).epsilon_alone() or 0) == left
    for own, shared in zip(made["own"].phases, made["shared"].phases, strict=True):
        assert 1.06 < shared.noise_multiplier / own.noise_multiplier < 1.08


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (("aggregation.secure=false",), r"noise = \"shared\": expected \[aggregation\] secure"),
        (("training.steps=2",), r"\[training\] steps = 2: expected 1 .*before any noise covers"),
        (("training.head_steps=3",), r"\[training\] head_steps = 3: expected 1"),
        (("training.optimizer=adamw",), r"optimizer = \"adamw\": expected \"sgd\""),
        (("training.head_optimizer=adamw",), r"head_optimizer = \"adamw\": expected \"sgd\""),
        (("privacy.head_clip=0.5",), "head_clip = 0.5: expected 0"),
        (("model.head_hidden=8",), "head_hidden = 8: expected 0"),
        (("privacy.mode=none",), r"mode = \"none\": expected \"record\" with noise"),
        (("privacy.mode=client",), r"mode = \"client\": expected \"record\" with noise"),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    tiny_bert: Path, data: Path, changes: tuple[str, ...], said: str
) -> None:
    with pytest.raises(BadInput, match=said):
        config(tiny_bert, data, "record", *SHARED, *changes)


def test_nothing_is_noised_that_is_not_known_to_move(tiny_bert: Path, data: Path) -> None:
    settings = config(tiny_bert, data, "record", *SHARED)
    with pytest.raises(BadInput, match=r"what each\s+phase moves"):
        make_manifest(Terms.of(decided(settings, FACTS)), facts_of(settings, {}))
    loud = config(tiny_bert, data, "record", *SHARED, "privacy.epsilon=0.00001")
    with pytest.raises(BadInput, match=r"no noise keeps|can't be drawn"):
        make_manifest(Terms.of(decided(loud, FACTS)), facts_of(loud, {"head": 9, "adapter": 10**8}))
