"""Nothing of a user's is lost, no result passes for another, no ε is printed too low."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from fedlora.common.config.load import load_config
from fedlora.common.config.schema import config_to_toml
from fedlora.common.errors import BadInput, QuorumLost, Refused
from fedlora.common.manifest.manifest import RunManifest
from fedlora.common.privacy.modes import guarantee_of
from fedlora.server.runs.metrics import _round_of
from fedlora.server.runs.run import conduct
from fedlora.simulations.begin import begin
from fedlora.simulations.cli import _stopped
from fedlora.simulations.experiments import quickstart, simulate
from fedlora.simulations.experiments.progress import _figure
from fedlora.simulations.experiments.sweep import sweep
from fedlora.simulations.report.pages import write_report
from tests.simulations.experiments.test_simulate import config, cpu, data  # noqa: F401  (a fixture)


def test_quickstart_removes_what_it_wrote_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    quickstart._make_room(folder)
    for name in quickstart.WRITTEN:
        (folder / name).write_text("x")
    (folder / "thesis.tex").write_text("years")
    quickstart._make_room(folder)
    assert sorted(path.name for path in folder.iterdir()) == [quickstart.MARK, "thesis.tex"]
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("years")
    with pytest.raises(BadInput, match="found other files"):
        quickstart._make_room(other)


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [("epsilon", 2.9949, "2.995"), ("epsilon", 1.00049, "1.001"), ("loss", 0.1239, "loss 0.124")],
)
def test_a_printed_epsilon_is_never_rounded_down(name: str, value: float, shown: str) -> None:
    assert _figure(name, value).endswith(shown)


def test_what_a_stopped_command_says_can_be_done() -> None:
    assert _stopped(["run", "ag_news"]).endswith("fedlora-sim run ag_news --resume")
    assert _stopped(["run", "ag_news", "--resume"]).count("--resume") == 1
    assert "--resume" not in _stopped(["quickstart", "--out", "qs"])


def test_a_sweep_names_bad_values_first_and_never_shows_another_trial(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text('[data]\ntrain = "t.jsonl"\ntest = "t.jsonl"\n')
    ran: list[object] = []

    def over(*values: str) -> object:
        settings = load_config(path)
        return sweep(settings, "federation.rounds", values, tmp_path / "s", run=ran.append)  # type: ignore[arg-type]

    with pytest.raises(BadInput) as caught:
        over("1", "nan", "0")
    expected = "expected an integer >= 1 and <= 100000"
    assert caught.value.faults == (
        f"--over federation.rounds = nan: {expected}",
        f"--over federation.rounds = 0: {expected}",
    )
    for key, said in (
        ("federation.ruonds", 'federation.ruonds: unknown key; did you mean "rounds"?'),
        ("lora.rank.x", '"lora.rank.x=1": expected section.key=VALUE'),
        (
            "training.head_rounds",
            "training.head_rounds=1: config [training] head_rounds = 1: expected 0",
        ),
    ):
        settings = load_config(path, ["model.task=causal-lm", "federation.rounds=3"])
        with pytest.raises(BadInput) as caught:
            sweep(settings, key, [1, "1"], tmp_path / "s")
        (fault,) = caught.value.faults
        assert fault.startswith(f"--over {said}")
    assert not ran
    done = tmp_path / "s" / "federation.rounds=1"
    done.mkdir(parents=True)
    (done / "summary.json").write_text(json.dumps({"accuracy": 1.0, "epsilon": 0.1}))
    (done / "config.toml").write_text("seed = 9\n")
    with pytest.raises(BadInput, match="another configuration"):
        over("1")
    (done / "config.toml").write_text(config_to_toml(load_config(path, ["federation.rounds=1"])))
    (done / "summary.json").write_text(
        json.dumps({"accuracy": 1.0, "ended": "round 1: nobody answered"})
    )
    with pytest.raises(BadInput, match="ended early"):
        over("1")


def test_spent_attempts_leave_the_last_adapter(
    tiny_bert: Path,
    data: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = config(tiny_bert, data, "none")

    def fails_later(run, cohort, observe):  # type: ignore[no-untyped-def]
        def stop(number: int, figures: object) -> None:
            if number == 2:
                raise QuorumLost("round 3: nobody answered")

        return conduct(run, cohort, stop)

    monkeypatch.setattr(simulate, "conduct", fails_later)
    with pytest.raises(QuorumLost, match="round 3"):
        simulate.simulate(settings, tmp_path / "run", cpu())
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["ended"] == "round 3: nobody answered"
    assert summary["rounds"] == 1  # the observer stopped it before round 2 was committed
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "run" / "report.html").is_file()


def test_attempts_that_are_spent_before_the_first_round_leave_what_there_is(
    tiny_bert: Path,
    data: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(self: object, *_: object) -> object:
        raise BadInput("on fire")

    monkeypatch.setattr("fedlora.client.training.local.LocalTraining.update", fails)
    with pytest.raises(Refused, match=r"attempts .* are spent"):
        simulate.simulate(config(tiny_bert, data, "record"), tmp_path / "run", cpu())
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["rounds"] == 0 and "on fire" in summary["ended"]
    manifest = RunManifest.from_bytes((tmp_path / "run/checkpoint/manifest.json").read_bytes())
    assert summary["epsilon"] == guarantee_of(manifest).stated_epsilon(), "of the whole schedule"
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "run" / "metrics.jsonl").is_file() and (
        tmp_path / "run" / "report.html"
    ).is_file()


def test_counts_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    table = {"task": "t", "clients": 1, "rounds": 1, "privacy_statement": [], "labels": []}
    broken = {"clients": ["a"], "labels": ["x", "y"], "counts": [["many", 1]]}
    (tmp_path / "summary.json").write_text(json.dumps(table | {"partition": broken}))
    with pytest.raises(BadInput, match="partition counts"):
        write_report(tmp_path)


@pytest.mark.parametrize("line", ['{"round": 1}', "5", "null", '{"round": null}', '{"rou'])
def test_lines_that_nobody_wrote_are_dropped(line: str) -> None:
    assert _round_of(line) == math.inf


def test_a_projection_of_a_killed_beginning_is_not_used(
    tiny_bert: Path,
    data: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It was fitted on what was public then: with another seed those are a client's records."""
    settings = config(tiny_bert, data, "none", "model.projection=4", "model.pooling=layers")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("fedlora.simulations.begin.Checkpoint.create", killed)
        begin(settings, tmp_path / "run", cpu())
    other = replace(settings, seed=99)
    again = begin(other, tmp_path / "run", cpu())
    fresh = begin(other, tmp_path / "fresh", cpu())
    assert again.manifest.projection_digest == fresh.manifest.projection_digest != ""


@pytest.mark.parametrize(
    ("override", "rows"), [("model.projection=6", 16), ("model.projection=0", 40)]
)
def test_features_that_do_not_fit_are_refused_before_a_budget_is_charged(
    tiny_bert: Path,
    data: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    override: str,
    rows: int,
) -> None:
    """Of the largest institution while they are made, and of all that are kept."""
    settings = config(tiny_bert, data, "record", override)
    monkeypatch.setattr("fedlora.common.model.features.available", lambda device: 4 * 96 * rows)
    with pytest.raises(BadInput, match=r"^\[training\] head_rounds: \d+ rows of 96 features take"):
        begin(settings, tmp_path / "run", cpu())
    assert not list((tmp_path / "run").glob("ledger.sqlite*"))
