"""A comparison: methods are what they say, finished trials stay, the table is of all seeds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest

from fedlora.common.config.schema import Config
from fedlora.common.errors import BadInput
from fedlora.simulations import Options, compare, load_config
from fedlora.simulations.experiments.methods import METHODS
from tests.simulations.experiments.test_simulate import config, cpu, data
from tests.simulations.test_cli import call

__all__ = ["data"]
FEW = ("federation.rounds=2", "training.head_rounds=1", "federation.spare_rounds=0")


def test_each_method_is_what_it_says() -> None:
    given = load_config(federation={"rounds": 10}, training={"head_rounds": 4, "moves": "lora"})
    head, lora, both, ffa, turns = (
        METHODS[name](given) for name in ("head", "lora", "head+lora", "ffa", "rolora")
    )
    assert METHODS["given"](given) is given
    assert head.training.head_rounds == head.federation.rounds == 10
    assert (lora.training.head_rounds, lora.training.moves) == (0, "both")
    flexlora = METHODS["flexlora"](given)
    assert flexlora.aggregation.strategy == "flexlora" and not flexlora.training.carry_optimizer
    assert both == given and (ffa.lora.variant, turns.lora.variant) == ("ffa", "rolora")
    # of a configuration that has one phase alone, the rules divide the rounds
    alone = replace(given, training=replace(given.training, head_rounds=10))
    assert METHODS["head+lora"](alone).training.head_rounds == -1
    left_open = METHODS["head"](load_config())
    assert left_open.federation.rounds == left_open.training.head_rounds > 0
    units = {"head_rounds": 4, "expected_units": 6.0}
    federation = {"clients": 6, "partition": "by-column", "column": "where"}
    masked = load_config(federation=federation, training=units, aggregation={"secure": True})
    central = METHODS["central"](masked)
    assert (central.federation.clients, central.federation.partition) == (1, "iid")
    assert central.training.expected_units == 36 and not central.aggregation.secure
    prompts = load_config(model={"task": "causal-lm"}, data={"response": "r"})
    assert METHODS["head+lora"](prompts).training.head_rounds == 0
    # rounds of LoRA that rules may leave out are asked for, where a head comes before them
    bare, one = load_config(), load_config(federation={"rounds": 1})
    tasks = ("multi-label", "token-classification", "regression", "seq2seq")
    *headed, words = (replace(bare, model=replace(bare.model, task=task)) for task in tasks)
    found = [METHODS["ffa"](each).training.moves for each in (bare, *headed, one, words)]
    assert found == ["lora"] * 4 + ["auto", "both"]


def test_a_comparison_is_one_table_and_goes_on_where_it_was(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    settings = config(tiny_bert, data, "record", *FEW)
    ran: list[str] = []

    def asked(seeds: int) -> Any:
        return compare(
            settings,
            tmp_path / "all",
            cpu(),
            methods=("head",),
            epsilons=(8.0, None),
            seeds=seeds,
            on_trial=lambda name, _: ran.append(name),
        )

    first = asked(1)
    kept = tmp_path / "all" / "head" / "epsilon-8" / "seed-11" / "summary.json"
    written = kept.stat().st_mtime_ns
    assert len(ran) == 2 and all(cell.spread is None for cell in first.cells)
    found = asked(2)
    assert kept.stat().st_mtime_ns == written  # a finished trial is not run again
    assert [(c.method, c.epsilon, c.seeds) for c in found.cells] == [
        ("head", 8.0, 2),
        ("head", None, 2),
    ]
    seen = [
        json.loads(path.read_text())["accuracy"]
        for path in sorted((tmp_path / "all" / "head" / "none").glob("*/summary.json"))
    ]
    assert (found.cells[1].mean, found.cells[1].spread) == (fmean(seen), stdev(seen))
    assert {trial["epsilon"] is None for trial in found.trials if trial["asked"] is None} == {True}
    page = found.page.read_text()
    assert "<svg" in page and "ε ≤ 8" in page and "not accounted together" in page
    table = json.loads((tmp_path / "all" / "compare.json").read_text())
    assert table["cells"][0]["mean"] == found.cells[0].mean


def test_several_at_a_time_give_what_one_after_the_other_gives(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    """Without noise, to the last bit."""
    settings = config(tiny_bert, data, "none", *FEW)
    one, two = (
        compare(
            settings,
            tmp_path / str(workers),
            Options(device="cpu", threads=1),
            methods=("head",),
            epsilons=(None,),
            seeds=2,
            workers=workers,
        )
        for workers in (1, 2)
    )
    shown = [[(trial["seed"], trial["loss"]) for trial in each.trials] for each in (one, two)]
    assert shown[0] == shown[1] and len({loss for _, loss in shown[0]}) == 2


def test_what_can_not_be_compared_is_said_before_anything_runs(tmp_path: Path) -> None:
    def never(trial: Config, folder: Path, options: Options) -> Any:
        raise AssertionError("a trial ran")

    settings, wrong = load_config(), load_config(privacy={"head_clip": 0.5})
    cases: list[tuple[Config, dict[str, Any], str]] = [
        (settings, {"methods": ("haed",)}, '^method .haed.: .*did you mean "head"'),
        (settings, {"epsilons": (0.0,)}, "head: config .privacy. epsilon = 0"),
        (settings, {"seeds": 0}, "expected a method, an ε, a seed"),
        (wrong, {"methods": ("head",), "epsilons": (1.0, 0.0)}, "head: config"),
    ]
    for given, asked, said in cases:
        with pytest.raises(BadInput, match=said):
            compare(given, tmp_path, run=never, **asked)
    assert not list(tmp_path.iterdir())


def test_the_command_prints_the_table(
    tiny_bert: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from fedlora.common.config.schema import config_to_toml

    (tmp_path / "c.toml").write_text(config_to_toml(config(tiny_bert, data, "none", *FEW)))
    words = ["compare", str(tmp_path / "c.toml"), "--out", str(tmp_path / "out"), "--device", "cpu"]
    words += ["--methods", "lora, ffa", "--seeds", "1"]
    code, out, error = call(monkeypatch, capsys, *words, "--epsilon", "none")
    assert code == 0, error
    assert (
        "no privacy" in out
        and "lora" in out
        and "ffa" in out
        and (tmp_path / "out" / "compare.html").is_file()
    )
    code, _, error = call(monkeypatch, capsys, *words, "--epsilon", "low")
    assert code == 2 and "--epsilon low: expected numbers" in error
