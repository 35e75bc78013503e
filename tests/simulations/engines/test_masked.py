"""Secure aggregation in the sequential engine: the same rounds, masked; accidents and attacks."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedlora.common.config.load import parse_config
from fedlora.common.config.schema import Config, FaultsConfig
from fedlora.common.errors import BadInput, Spent
from fedlora.common.manifest.manifest import RunManifest, SecureTerms
from fedlora.common.manifest.plan import RoundPlan, Update
from fedlora.common.model.state import AdapterState
from fedlora.common.privacy.calibration import LEVELS
from fedlora.common.privacy.modes import guarantee_named
from fedlora.common.secagg.cohort import borne, threshold
from fedlora.server.rounds.cohort import CohortSum
from fedlora.server.secagg.log import SumLog
from fedlora.server.secagg.sums import SecureCohort
from fedlora.simulations.begin import begin
from fedlora.simulations.engines.masked import Institutions
from fedlora.simulations.engines.sequential import sequential
from fedlora.simulations.report.pages import write_report
from tests.server.fakes import SPEC, START, manifest_of
from tests.simulations.experiments.test_simulate import config, cpu, data, run_whole, stopped_after

__all__ = ["data"]
SECURE = [
    "federation.clients=5",
    "federation.quorum=0.6",
    "aggregation.secure=true",
    "aggregation.minimum_cohort=3",
]


def terms(colluders: int = 1, attempts: int = 3) -> SecureTerms:
    return SecureTerms("2n/3+1", colluders, attempts, 32, LEVELS, (8.0,))


class Trainer:
    """Answers with a vector of its own; `calls` counts how often data was touched."""

    def __init__(self, name: str) -> None:
        self.name, self.calls = name, 0

    def delta(self, round_number: int) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
        seed = [int(self.name.split("-")[1]), round_number]
        return np.random.default_rng(seed).normal(size=SPEC.size).astype(np.float32)

    def train(self, plan: RoundPlan, state: AdapterState) -> Update:
        self.calls += 1
        return Update(self.name, plan.manifest, plan.round, plan.attempt, self.delta(plan.round))


class Federation:
    """`count` institutions behind the state machines, without a model."""

    def __init__(
        self, count: int, mode: str = "record", minimum: int = 3, **faults: float | str
    ) -> None:
        self.manifest = manifest_of(
            9, spare=9, mode=mode, noise_multiplier=1.0 if mode == "record" else 0.0
        )
        object.__setattr__(self.manifest, "secure", terms())
        object.__setattr__(self.manifest, "minimum_cohort", minimum)
        settings = parse_config(
            f"[federation]\nclients = {count}\n"
            f"[aggregation]\nsecure = true\nminimum_cohort = {minimum}\n"
            f"[privacy]\nmode = '{mode}'\n"
            + "[faults]\n"
            + "".join(f"{name} = {json.dumps(value)}\n" for name, value in faults.items())
        )
        self.names = [f"client-{number}" for number in range(count)]
        self.trainers = {name: Trainer(name) for name in self.names}
        self.institutions = Institutions(
            self.names,
            self.manifest,
            settings.faults,
            self.trainers.__getitem__,
            lambda plan: self.names,
            quorum=0.01,
        )
        self.cohort = SecureCohort(self.manifest, self.institutions)

    def round(self, number: int, attempt: int) -> CohortSum:
        return self.cohort.total(
            RoundPlan(self.manifest.digest, 0, number, attempt, START.digest), START
        )

    def plain(self, number: int, names: list[str]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        total = np.zeros(SPEC.size)
        for name in names:
            total += self.trainers[name].delta(number)
        return total


def test_rounds_over_several_epochs_give_the_plain_sum() -> None:
    """Epochs of 3 attempts: a steady round asks for input, confirmation and opening only."""
    federation = Federation(5)
    for number in range(1, 8):
        found = federation.round(number, number)
        assert found.replies == found.asked == 5 and not found.failures
        assert (
            np.abs(found.total - federation.plain(number, federation.names)).max()
            < 5 * 8.0 / LEVELS
        )
        assert found.secure is not None
        assert (found.secure.cohort, found.secure.threshold, found.secure.members) == (5, 4, 5)
    assert federation.institutions.masked_vectors == 7 * 5


@pytest.mark.parametrize("stage", ["keys", "shares", "input", "confirm", "open"])
def test_everybody_drops_out_at_a_stage(stage: str) -> None:
    """The round is lost, nothing is raised, nobody is asked again for the attempt."""
    asked = {"keys": "offer", "shares": "deal"}.get(stage, stage)
    federation = Federation(5, "record", 3, **{stage: 1.0})
    found = federation.round(1, 1)
    assert found.replies == 0 and not found.total.any() and found.secure is None
    assert f"dropped out before {asked}" in str(found.failures)


def test_some_drop_out_at_every_stage_and_the_sum_is_that_of_the_others() -> None:
    federation = Federation(10, keys=0.02, shares=0.02, input=0.1, confirm=0.05, open=0.05)
    good = 0
    for number in range(1, 16):
        found = federation.round(number, number)
        if not found.replies:
            continue
        good += 1
        assert found.secure is not None and found.replies == found.secure.members >= threshold(
            found.secure.cohort
        )
        gone = {
            failure.client
            for failure in found.failures
            if "confirm" not in failure.reason and "open" not in failure.reason
        }
        names = [name for name in federation.names if name not in gone]
        # one who missed the keys is out for the epoch without being asked
        if len(names) == found.replies:
            assert np.abs(found.total - federation.plain(number, names)).max() < 10 * 8.0 / LEVELS
    assert good >= 5


@pytest.mark.parametrize(
    ("attack", "why"),
    [("sybil", "not approved"), ("small-u2", "expected at least 4"), ("two-lists", "did not make")],
)
def test_an_attack_loses_the_round_and_touches_nothing(attack: str, why: str) -> None:
    federation = Federation(5, attack=attack)
    found = federation.round(1, 1)
    assert found.replies == 0 and not found.total.any()
    assert re.search(why, str(found.failures))
    if attack != "two-lists":  # that one comes after the inputs
        assert all(trainer.calls == 0 for trainer in federation.trainers.values())


def test_a_share_that_is_changed_on_its_way_is_a_drop_out() -> None:
    federation = Federation(5, attack="corrupt-share")
    found = federation.round(1, 1)
    assert found.replies == 5 and [failure.client for failure in found.failures] == ["client-0"]


def test_a_lost_round_is_tried_again_with_noise_and_not_without() -> None:
    """Without noise of its own an update leaves once a round: no second attempt."""
    for mode, again in (("record", 5), ("none", 0)):
        federation = Federation(5, mode, confirm=1.0)
        assert federation.round(1, 1).replies == 0
        federation.institutions._faults = FaultsConfig()
        found = federation.round(1, 2)
        assert found.replies == again
        if not again:
            assert any("leaves once only" in failure.reason for failure in found.failures)


def test_a_manifest_without_terms_has_no_masked_sums() -> None:
    federation = Federation(3)
    with pytest.raises(BadInput, match="expected the terms"):
        SecureCohort(manifest_of(1), federation.institutions)


def test_nobody_is_asked() -> None:
    federation = Federation(3)
    federation.institutions._choose = lambda plan: []
    found = federation.round(1, 1)
    assert (found.asked, found.replies, found.failures) == (0, 0, ())


# --- whole runs -----------------------------------------------------------------------------------


def test_a_whole_run(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    """Every round is of masked vectors; summary, log and statement say so."""
    run, summary = run_whole(config(tiny_bert, data, "record", *SECURE), tmp_path / "run")
    assert summary["secure_aggregation"] is True
    secure = summary["secure"]
    assert isinstance(secure, dict)
    assert (secure["cohort"], secure["threshold"], secure["colluders"]) == ([5, 5], [4, 4], 1)
    assert not any(secure["dropouts"].values()) and len(secure["dropouts"]) == 5
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert all(line["secure"]["members"] == 5 for line in lines)
    page = write_report(tmp_path / "run").read_text()
    assert "4 sums of 5 institutions with t = 4, at least 3 demanded, 5 in the smallest sum" in page
    assert any("aggregated securely" in line for line in summary["privacy_statement"])  # type: ignore[attr-defined]
    assert RunManifest.from_bytes(run.manifest.to_bytes()) == run.manifest
    assert run.manifest.secure is not None and len(run.manifest.secure.update_bounds) == 2


def test_without_noise_secure_and_plain_runs_agree(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    """The same seeds: the adapters differ by the rounding of the fixed point alone."""
    quiet = [each for each in SECURE if "secure=" not in each and "minimum" not in each]
    plain, one = run_whole(config(tiny_bert, data, "none", *quiet), tmp_path / "plain")
    masked, two = run_whole(config(tiny_bert, data, "none", *SECURE), tmp_path / "masked")
    vectors = [each.checkpoint.load().released.vector for each in (plain, masked)]
    assert np.abs(vectors[0] - vectors[1]).max() < 1e-3 * np.abs(vectors[0]).max()
    assert one["secure_aggregation"] is False and one["secure"] is None
    assert abs(float(one["loss"]) - float(two["loss"])) < 1e-3  # type: ignore[arg-type]


def test_a_secure_run_that_was_stopped_goes_on(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    """Every institution has restarted: no secrets, the next attempt begins a new epoch."""
    settings = config(tiny_bert, data, "record", *SECURE)
    run = stopped_after(2, settings, tmp_path / "run")
    run.ledger.close()
    _, summary = run_whole(settings, tmp_path / "run", resume=True)
    assert summary["rounds"] == 4
    assert summary["secure"]["sums"] == 5  # type: ignore[index]  # of round 2 twice: what was not committed was learnt


def test_what_was_proven_before_a_stop_still_counts(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    """The engine's cohort reads back, as the deployment's, who lied and which keys were seen."""
    run = begin(config(tiny_bert, data, "record", *SECURE), tmp_path / "run", cpu())
    first, plan = (
        sequential(run),
        RoundPlan(run.manifest.digest, 0, 1, 1, run.checkpoint.load().state.digest),
    )
    found = first.total(plan, run.checkpoint.load().state)
    assert found.replies == 5 and found.secure is not None
    SumLog(run.paths.folder).note(replace(found.secure, liars=("client-000",)))
    again = sequential(run)
    assert isinstance(first, SecureCohort) and isinstance(again, SecureCohort)
    assert again._kept.liars == {"client-000"}
    assert again._kept._seen == first._kept._seen != {}
    run.ledger.close()


def test_faults_on_ray_are_refused_before_anything_is_read(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    settings = config(tiny_bert, data, "record", *SECURE, "faults.input=0.5")
    with pytest.raises(BadInput, match="sequential engine only"):
        begin(settings, tmp_path / "run", cpu(engine="ray"))


def test_a_run_below_t_ends_with_the_reason(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(Spent, match="expected at least 4"):
        run_whole(config(tiny_bert, data, "record", *SECURE, "faults.input=1.0"), tmp_path / "run")


# --- what is refused at the start -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "[federation]\nclients = 4",
            "minimum_cohort = 5: expected at most the 4 institutions of a round",
        ),
        ("[federation]\nclients = 20\nparticipation = 0.2", "expected at most the 4 institutions"),
        ("[federation]\nclients = 20\nparticipation = 0.5", "expected 1 with participation < 1"),
        ("[federation]\nclients = 2000", "every pair shares a mask"),
        (
            "[aggregation]\nmax_colluders = 3",
            "expected at most 2: nodes would refuse a cohort of 5, 7",
        ),
        ("[aggregation]\nminimum_cohort = 2", "expected an integer >= 3"),
        ('[aggregation]\nstrategy = "krum"', "expected one of fedavg, flexlora, median"),
    ],
)
def test_combinations_that_cannot_work(text: str, said: str) -> None:
    if "[aggregation]" in text:
        text = text.replace("[aggregation]", "[aggregation]\nsecure = true")
    else:
        text += "\n[aggregation]\nsecure = true"
    with pytest.raises(BadInput, match=said):
        parse_config(text)


def test_faults_without_secure_aggregation() -> None:
    with pytest.raises(BadInput, match="expected none without"):
        parse_config("[faults]\ninput = 0.5")
    assert Config().faults == FaultsConfig()
    assert borne(5) == 1


def test_the_bound_of_a_coordinate_is_not_the_clip() -> None:
    """A noised update is longer than the clip: the bound leaves ten deviations of its noise."""
    manifest = manifest_of(1, mode="record", noise_multiplier=4.0)
    phase = manifest.phases[0]
    bound = guarantee_named("record").coordinate_bound(phase)
    deviation = phase.learning_rate * phase.noise_multiplier * phase.clip / phase.expected_units
    assert bound == pytest.approx(phase.learning_rate * 2 * phase.clip + 10 * deviation)
    # there noise is added to the whole numbers
    assert guarantee_named("client").coordinate_bound(phase) == phase.clip
    with pytest.raises(BadInput, match="expected record, shared-record, client or none"):
        guarantee_named("other").coordinate_bound(phase)
