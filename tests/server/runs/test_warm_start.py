"""A run's first state: as it was drawn, or as public records taught it; never what scores."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import count as numbers
from pathlib import Path

import numpy as np
import pytest
import torch

from fedlora.common.config.load import load_config
from fedlora.common.config.schema import Config
from fedlora.common.config.toml import UNDECIDED
from fedlora.common.errors import BadInput
from fedlora.common.model.features import pooled_features
from fedlora.common.model.projection import PROJECTION, Projection
from fedlora.common.model.state import AdapterState
from fedlora.common.tasks.batch import Batch
from fedlora.common.trust.identity import Identity
from fedlora.server.coordinator.coordinator import Coordinator
from fedlora.server.deployment.serve import _begun
from fedlora.server.rounds.checkpoint import Checkpoint
from fedlora.server.runs import warm_start
from fedlora.server.runs.warm_start import (
    PUBLIC_START,
    START_STATE,
    _add_gradient,
    _learnt,
    _rank,
    kept_start,
    started,
    taught,
)
from fedlora.simulations.begin import begin
from fedlora.simulations.experiments import planning
from fedlora.simulations.experiments.planning import Speed, plan
from fedlora.simulations.report.pages import write_report
from tests.conftest import WORDS
from tests.simulations.experiments.test_simulate import config, cpu, run_whole, write_data

PARTS = ("test", "validation")
BELOW = ("model.pooling=layers", "model.projection=6")
ONE = ("federation.rounds=2", "training.head_rounds=1", "federation.spare_rounds=0")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    folder = write_data(tmp_path / "data")
    for name, count in (("public", 96), ("validation", 60)):
        rng, rows = np.random.default_rng(count), []
        for number in range(count):  # what a label follows from, and nothing else
            words = [*rng.choice(WORDS, 3), ("good", "bad")[number % 2]]
            rows.append({"text": " ".join(words), "label": number % 2})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def settings(base: Path, data: Path, epochs: int, *more: str) -> Config:
    public = f'data.public="{data}/public.jsonl"'
    validation = f'data.validation="{data}/validation.jsonl"'
    epochs_of = f"training.public_epochs={epochs}"
    named = ("model.projection=0", public, validation, epochs_of)
    return config(base, data, "record", *ONE, *named, *more)


def test_public_records_teach_lora_and_head_before_any_round(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    run = begin(settings(tiny_bert, data, 12), tmp_path / "run", cpu())
    start, drawn = run.checkpoint.load().state, run.public.initial
    assert any(value.any() for name, value in start.named().items() if ".lora_B." in name)
    said = kept_start(tmp_path / "run", 12)
    assert said is not None and said["records"] == 96 and said["epochs"] == 12
    before = run.public.validation.evaluate(drawn)["loss"]
    assert said["validation"]["loss"] < 0.9 * before
    assert said["validation"] == run.public.validation.evaluate(start)
    assert "test" not in said  # before the last round nobody looks at it
    run.ledger.close()


def test_a_projection_is_fitted_on_the_base_that_public_records_turned(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    passed: list[tuple[int, int]] = []
    run = begin(
        settings(tiny_bert, data, 12, *BELOW),
        tmp_path / "run",
        cpu(),
        on_features=lambda *counts: passed.append(counts),
    )
    assert passed and all(done <= records for done, records in passed)
    public, model, start = run.public, run.public.model, run.checkpoint.load().state
    below_head = ~start.spec.head_mask()
    losses = [public.validation.evaluate(each)["loss"] for each in (public.initial, start)]
    assert public.initial.moves_base and losses[1] < losses[0]
    assert (start.vector[below_head] == public.initial.vector[below_head]).all()
    assert (start.vector != public.initial.vector).any()
    assert any("learnt from 96 public records" in sentence for sentence in run.caveats)

    kept = Projection.read(tmp_path / "run" / PROJECTION)
    rows, settled = np.arange(96, dtype=np.int64), public.recipe.model
    for state, same in ((public.initial, True), (AdapterState.zeros(start.spec), False)):
        model.load(state)
        model.projection = None
        means = pooled_features(model, public.learnt, rows).numpy()
        means = (means / settled.head_scale).astype(np.float32)
        fitted = Projection.fit(means, 6, settled.projection_ridge)
        assert (fitted.digest == kept.digest) == same

    run.ledger.close()
    again = begin(settings(tiny_bert, data, 12, *BELOW), tmp_path / "run", cpu(resume=True))
    assert again.checkpoint.load().state == start
    assert again.manifest.projection_digest == kept.digest == again.public.facts.projection_digest
    again.ledger.close()


def test_units_that_cannot_be_dealt_out_are_refused_before_anything_learns(
    tiny_bert: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedlora.simulations.begin.turned", lambda *parts: pytest.fail("it learns"))
    wrong = settings(tiny_bert, data, 12, *BELOW, "federation.clients=1000")
    with pytest.raises(BadInput, match="expected at least one for each of"):
        begin(wrong, tmp_path / "run", cpu())


def test_lora_that_learnt_below_a_projection_is_said_where_the_head_learnt_nothing(
    tmp_path: Path,
) -> None:
    said = {"records": 5, "epochs": 3, "best_epoch": 0, "below_projection": False, "validation": {}}
    (tmp_path / PUBLIC_START).write_text(json.dumps(said))
    assert not taught(tmp_path, 3)
    (tmp_path / PUBLIC_START).write_text(json.dumps({**said, "below_projection": True}))
    assert "5 public records" in "".join(taught(tmp_path, 3))


def test_the_best_epoch_on_what_scores_is_taken_and_may_be_none(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    text = (data / "public.jsonl").read_text()
    wrong = [{**row, "label": 1 - row["label"]} for row in map(json.loads, text.splitlines())]
    (data / "public.jsonl").write_text("".join(json.dumps(row) + "\n" for row in wrong))
    run = begin(settings(tiny_bert, data, 12), tmp_path / "run", cpu())
    said = kept_start(tmp_path / "run", 12)
    assert said is not None and said["best_epoch"] == 0
    assert run.checkpoint.load().state == run.public.initial
    assert not any("learnt from" in sentence for sentence in run.caveats)
    run.ledger.close()


def test_what_scores_or_is_tested_is_not_learnt(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    public = (data / "public.jsonl").read_text().splitlines()
    seen = {path: (data / f"{path}.jsonl").read_text().splitlines() for path in PARTS}
    shared = "".join(f"{row}\n" for part in seen.values() for row in part)
    (data / "public.jsonl").write_text(shared + "".join(f"{row}\n" for row in public))
    run = begin(settings(tiny_bert, data, 1), tmp_path / "run", cpu())
    said = kept_start(tmp_path / "run", 1)
    known = {json.loads(row)["text"] for part in seen.values() for row in part}
    fresh = [row for row in public if json.loads(row)["text"] not in known]
    assert said is not None and said["records"] == len(run.public.learnt_rows) == len(fresh)
    run.ledger.close()


@pytest.mark.parametrize("part", PARTS)
def test_a_file_that_scores_is_nothing_to_learn_from(
    part: str, tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    (data / "public.jsonl").write_text((data / f"{part}.jsonl").read_text())
    with pytest.raises(BadInput, match="public_epochs: found no public record to learn from"):
        begin(settings(tiny_bert, data, 1), tmp_path / "run", cpu())


def test_a_start_without_a_finite_loss_is_none(
    tiny_bert: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = begin(settings(tiny_bert, data, 1), tmp_path / "run", cpu())
    run.ledger.close()
    first = run.public.initial
    ruined = AdapterState(first.spec, np.full_like(first.vector, np.nan))
    monkeypatch.setattr(warm_start, "_learnt", lambda public, epochs: iter([ruined]))
    # guesses one label, which is a better guess than the other
    validation = run.public.validation
    rows = validation.rows[validation.data.targets[validation.rows] == 0]
    scoring = replace(run.public, validation=replace(validation, rows=rows))
    assert scoring.validation.evaluate(ruined)["accuracy"] == 1.0
    assert started(scoring, tmp_path)[0] == first
    assert not taught(tmp_path, 1)


def test_a_record_that_overflows_ends_nothing(
    tiny_bert: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = begin(settings(tiny_bert, data, 0), tmp_path / "run", cpu())
    run.ledger.close()
    recipe = replace(run.public.recipe, public_epochs=1)
    rows = np.arange(len(run.public.validation.rows), dtype=np.int64)
    public = replace(run.public, recipe=recipe, learnt_rows=rows)
    losses, calls = public.model.losses, numbers()

    def overflowing(batch: Batch) -> torch.Tensor:
        return losses(batch) * (torch.inf if not next(calls) else 1.0)

    monkeypatch.setattr(public.model, "losses", overflowing)
    (state,) = _learnt(public, 1)
    assert next(calls) == 2 and np.isfinite(state.vector).all()


def test_a_batch_of_long_records_goes_in_parts(
    tiny_bert: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = begin(settings(tiny_bert, data, 0), tmp_path / "run", cpu())
    run.ledger.close()
    public, model, rows = run.public, run.public.model, np.arange(30, dtype=np.int64)
    sizes: list[int] = []
    gradients: list[list[torch.Tensor]] = []
    losses = model.losses

    def sized(batch: Batch) -> torch.Tensor:
        sizes.append(batch.ids.numel())
        return losses(batch)

    monkeypatch.setattr(model, "losses", sized)
    for tokens in (2048, 40):
        monkeypatch.setattr(warm_start, "TOKENS", tokens)
        model.load(AdapterState(model.spec, np.full(model.spec.size, 0.05, dtype=np.float32)))
        _add_gradient(model, public.validation.data, rows)
        found = [each.grad for each in model.parameters.values()]
        gradients.append([each.clone() for each in found if each is not None])
        model.network.zero_grad()
    assert sizes[0] > 40 and max(sizes[1:]) <= 40
    for whole, parts in zip(*gradients, strict=True):
        assert whole.any() and torch.allclose(whole, parts, atol=1e-6)


def test_a_run_without_public_epochs_starts_as_it_was_drawn(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    run, summary = run_whole(settings(tiny_bert, data, 0), tmp_path / "run")
    assert kept_start(tmp_path / "run", 0) is None and summary["public_start"] is None
    assert not (tmp_path / "run" / PUBLIC_START).exists()
    assert len(run.public.validation.rows) == len(run.public.validation.data)


def test_a_public_file_that_nothing_learns_from_is_named(
    tiny_bert: Path, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    begin(settings(tiny_bert, data, 0), tmp_path / "run", cpu()).ledger.close()
    assert "[data] public: nothing learns from it" in caplog.text
    caplog.clear()
    begin(settings(tiny_bert, data, 1), tmp_path / "other", cpu()).ledger.close()
    assert "[data] public" not in caplog.text


def test_half_of_a_validation_part_teaches_and_does_not_score(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    named = settings(tiny_bert, data, 1)
    run = begin(replace(named, data=replace(named.data, public="")), tmp_path / "run", cpu())
    learnt, scoring = run.public.learnt_rows, run.public.validation.rows
    assert sorted([*learnt, *scoring]) == list(range(60)) and len(scoring) == 30
    run.ledger.close()


def test_a_statement_and_a_report_say_what_was_learnt_from(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    _, summary = run_whole(settings(tiny_bert, data, 2), tmp_path / "run")
    statement = summary["privacy_statement"]
    assert isinstance(statement, list)
    assert any("learnt from 96 public records" in sentence for sentence in statement)
    said = summary["public_start"]
    other = begin(settings(tiny_bert, data, 2), tmp_path / "other", cpu())
    other.ledger.close()
    scored = other.public.test.evaluate(other.checkpoint.load().state)
    assert isinstance(said, dict) and said.pop("test") == scored
    assert said == kept_start(tmp_path / "run", 2)
    page = write_report(tmp_path / "run").read_text()
    assert "Public records, before the first round" in page


def test_a_killed_run_goes_on_from_the_same_start(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    wanted = settings(tiny_bert, data, 2)
    first = begin(wanted, tmp_path / "run", cpu())
    start = first.checkpoint.load().state
    first.ledger.close()
    again = begin(wanted, tmp_path / "run", cpu(resume=True))
    assert again.checkpoint.load().state == start
    assert again.caveats == first.caveats
    again.ledger.close()


def test_nothing_to_learn_from_is_said(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    run = begin(settings(tiny_bert, data, 1), tmp_path / "run", cpu())
    run.ledger.close()
    empty = replace(run.public, learnt_rows=run.public.learnt_rows[:0])
    with pytest.raises(BadInput, match="public_epochs: found no public record"):
        started(empty, tmp_path)


def test_a_run_of_an_earlier_version_goes_on_as_it_began(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    begin(settings(tiny_bert, data, 0), tmp_path / "run", cpu()).ledger.close()
    path = tmp_path / "run" / "config.toml"
    kept = path.read_text()
    assert "public_epochs = 0\n" in kept
    path.write_text(kept.replace("public_epochs = 0\n", ""))
    wanted = settings(tiny_bert, data, 0)
    left = replace(wanted, training=replace(wanted.training, public_epochs=UNDECIDED))
    again = begin(left, tmp_path / "run", cpu(resume=True))
    assert "public_epochs = 0\n" in again.config
    assert not any("learnt from" in sentence for sentence in again.caveats)
    assert again.checkpoint.load().state == again.public.initial
    again.ledger.close()


def test_a_plan_says_how_long_public_records_take(tiny_bert: Path, data: Path) -> None:
    found = plan(settings(tiny_bert, data, 3), cpu())
    assert (found.start.epochs, found.start.records) == (3, 96) and found.start.minutes > 0
    assert found.minutes > sum(each.minutes for each in found.phases)
    assert "3 epochs over 96 public records" in " ".join(str(found).split())


def test_a_plan_counts_a_start_on_a_projection_by_its_passes(
    tiny_bert: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """96 records teach and 60 score: three passes for LoRA, one for the head, and looks."""
    monkeypatch.setattr(planning, "measure", lambda federation, config: Speed(0.0, 0.0, 60.0))
    minutes = [
        plan(settings(tiny_bert, data, n, *more), cpu()).start.minutes
        for n, more in ((0, ()), (2, ()), (2, BELOW))
    ]
    assert minutes == [0, 2 * 96 * 3 + 3 * 60, 2 * 96 * 4 + 6 * 60]


def test_no_finite_loss_ranks_below_any_and_of_equals_the_lower_loss_leads() -> None:
    ruined = _rank({"accuracy": 1.0, "loss": float("nan")})
    assert ruined < _rank({"accuracy": 0.1, "loss": 9.0}) < _rank({"accuracy": 0.1, "loss": 8.0})
    assert _rank({"accuracy": 0.1, "loss": 8.0}) < _rank({"accuracy": 0.2, "loss": 9.0})


@pytest.mark.parametrize("more", [(), BELOW])
def test_layers_that_are_computed_again_learn_as_those_that_are_kept(
    tiny_bert: Path, data: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    """Named inputs of a gradient never reach into such layers: LoRA learnt nothing, in silence."""
    found = []
    for again in ("false", "true"):
        wanted = settings(tiny_bert, data, 6, *more, f"training.checkpointing={again}")
        run = begin(wanted, tmp_path / again, cpu())
        run.ledger.close()
        found.append(run.checkpoint.load().state)
    assert found[0].moves_base and np.allclose(found[0].vector, found[1].vector, atol=1e-4)


def test_a_projection_of_what_scores_or_is_tested_is_fitted_without_it(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    public, digests = (data / "public.jsonl").read_text(), list[str]()
    for more in ("", *((data / f"{part}.jsonl").read_text() for part in PARTS)):
        (data / "public.jsonl").write_text(public + more)
        run = begin(settings(tiny_bert, data, 0, *BELOW), tmp_path / str(len(digests)), cpu())
        run.ledger.close()
        digests.append(run.manifest.projection_digest)
    assert len(set(digests)) == 1


def test_a_projection_that_public_texts_can_not_span_is_refused_before_anything_learns(
    tiny_bert: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warm_start, "_best", lambda public: pytest.fail("it learnt"))
    for directions in ("97", "2000"):
        wanted = settings(tiny_bert, data, 2, BELOW[0], f"model.projection={directions}")
        with pytest.raises(BadInput, match=f"found {directions} directions"):
            begin(wanted, tmp_path / directions, cpu())


@pytest.mark.parametrize("text", [None, "", "{", "[]", "{}"])
def test_a_run_does_not_go_on_without_what_its_start_gave(
    text: str | None, tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    """The sentence of the statement went with the file."""
    begin(settings(tiny_bert, data, 1), tmp_path / "run", cpu()).ledger.close()
    path = tmp_path / "run" / PUBLIC_START
    path.unlink()
    if text is not None:
        path.write_text(text)
    with pytest.raises(BadInput, match=r"public_start\.json"):
        begin(settings(tiny_bert, data, 1), tmp_path / "run", cpu(resume=True))


@pytest.mark.parametrize("damage", ["gone", "cut", "another"])
def test_a_start_that_is_damaged_costs_its_figure_and_not_what_the_rounds_gave(
    damage: str, tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    run = begin(settings(tiny_bert, data, 1), tmp_path / "run", cpu())
    run.ledger.close()
    path = tmp_path / "run" / START_STATE
    path.unlink()
    if damage != "gone":
        other = AdapterState.zeros(run.public.initial.spec).to_bytes()
        path.write_bytes(other if damage == "another" else other[:-1])
    _, summary = run_whole(settings(tiny_bert, data, 1), tmp_path / "run", resume=True)
    start = summary["public_start"]
    assert isinstance(start, dict) and "test" not in start and start["records"] == 96
    assert "Public records, before the first round" in write_report(tmp_path / "run").read_text()


def test_a_beginning_that_was_killed_leaves_nothing_of_what_it_learnt(
    tiny_bert: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as killed:
        killed.setattr(Checkpoint, "create", lambda *_: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception, match="killed"):
            begin(settings(tiny_bert, data, 1), tmp_path / "run", cpu())
    assert (tmp_path / "run" / START_STATE).exists()
    begin(settings(tiny_bert, data, 0), tmp_path / "run", cpu()).ledger.close()
    assert not any((tmp_path / "run" / name).exists() for name in (PUBLIC_START, START_STATE))


@pytest.mark.parametrize("damage", ["another", "gone"])
@pytest.mark.parametrize("side", ["simulation", "deployment"])
def test_a_run_goes_on_with_the_projection_of_its_manifest_alone(
    side: str, damage: str, tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    """What is validated and released would be of another network than institutions train."""
    wanted, folder = settings(tiny_bert, data, 1, *BELOW), tmp_path / "run"
    folder.mkdir()

    def go(resume: bool) -> None:
        if side == "simulation":
            begin(wanted, folder, cpu(resume=resume)).ledger.close()
        else:
            kept = load_config(folder / "config.toml") if resume else wanted
            _begun(folder, kept, Coordinator("demo", Identity.generate(), dict))

    go(resume=False)
    go(resume=True)
    path = folder / PROJECTION
    other = Projection.read(path).stand_in()
    path.unlink()
    if damage == "another":
        other.write(path)
    with pytest.raises(BadInput, match=r"projection\.safetensors: found sha256"):
        go(resume=True)
