"""What somebody who writes Python finds in `fedlora.simulations`, and what it takes and gives."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

import fedlora.simulations as front
from fedlora.common.config.toml import UNDECIDED
from fedlora.common.errors import BadInput
from fedlora.simulations import Options, load_config, plan, sequential, simulate, sweep, verify
from fedlora.simulations.begin import begin
from fedlora.simulations.options import Own
from tests.server import releases
from tests.simulations.experiments.test_simulate import config, cpu, data

__all__ = ["data"]


def test_every_name_is_there_and_known_to_type_checkers() -> None:
    for name in front.__all__:
        assert getattr(front, name) is not None
    assert set(front.__all__) == set(front.FACE) <= set(dir(front))
    tree = ast.parse(Path(str(front.__file__)).read_text(encoding="utf-8"))
    guarded = next(node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in guarded.body if isinstance(node, ast.ImportFrom)]
    typed = {
        (each.asname or each.name): f"{node.module}:{each.name}"
        for node in imports
        for each in node.names
    }
    table = {
        name: f"fedlora.{where}" if ":" in where else f"fedlora.{where}:{name}"
        for name, where in front.FACE.items()
    }
    assert typed == table
    with pytest.raises(AttributeError, match="no attribute 'simulated'"):
        front.simulated  # noqa: B018


def test_nothing_heavy_is_loaded_before_it_is_needed() -> None:
    """The front door, a configuration and the check of a release need no torch."""
    code = (
        "import sys; from fedlora.simulations import load_config, verify;"
        "load_config(privacy={'epsilon': 1.0});"
        "print(sorted({'torch', 'transformers', 'peft', 'opacus', 'sklearn'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_configuration_by_name_by_file_and_from_nothing(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text('seed = 3\n[lora]\ntargets = ["query"]\n')
    said = load_config(path, ["privacy.epsilon=1.5", 'model.base="1e5"'])
    assert said == load_config(path, privacy={"epsilon": 1.5}, model={"base": "1e5"})
    assert said.seed == 3 and load_config(str(path), seed=4).seed == 4
    assert load_config("ag_news", lora={"targets": ["key", "value"]}).lora.targets == (
        "key",
        "value",
    )
    assert load_config(data={"train": Path("a.csv")}).data.train == "a.csv"
    with pytest.raises(BadInput) as caught:
        load_config(privacy={"epsilon": float("nan"), "epsilom": 1}, federation={"clients": None})
    assert len(caught.value.faults) == 3
    assert any(each.startswith("privacy.epsilon = nan: ") for each in caught.value.faults)
    with pytest.raises(BadInput, match=r"nothing\.toml"):
        load_config("nothing.toml")


def test_a_run_from_python(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    settings = config(tiny_bert, data, "record")
    before, seen = plan(settings, cpu()), list[int]()
    assert not list(tmp_path.iterdir())  # a plan leaves nothing, and spends nothing
    signals = [each.signal or 0.0 for each in before.phases]
    assert all(f"≤ {each:.3g}" in str(before) for each in signals) and min(signals) > 0
    assert ("noise drowns" in str(before)) is (min(signals) < 1)
    result = simulate(
        settings, str(tmp_path / "run"), cpu(), on_round=lambda number, figures: seen.append(number)
    )
    assert seen == [1, 2, 3, 4]
    assert result.summary == json.loads((result.folder / "summary.json").read_text())
    assert result.epsilon is not None
    assert before.epsilon == result.epsilon <= 8.0 and before.delta == 1e-4
    assert [each.phase.noise_multiplier for each in before.phases] == [
        each["noise_multiplier"] for each in result.summary["schedule"]
    ]
    assert before.bytes_a_round == 4 * result.summary["trainable_parameters"]
    assert before.bytes_back == before.bytes_a_round
    assert list(before.epsilon_by_round.values()) == sorted(before.epsilon_by_round.values())
    assert "all attempts" in str(before) and "trainable parameters" in str(before)
    assert any("ε" in sentence for sentence in result.statement)
    assert set(result.adapter.predict(["w1 good", "w2 bad"])) <= {"0", "1"}
    assert result.adapter is result.adapter
    assert result.summary["own"] == {} and not (result.folder / "own.json").exists()


def test_a_plan_says_that_lora_has_no_rounds_where_rules_gave_it_none(
    tiny_bert: Path, data: Path
) -> None:
    settings = config(tiny_bert, data, "record")
    for moves, unheard in (("auto", True), ("lora", False)):
        left_open = replace(settings.training, head_rounds=UNDECIDED, moves=moves)
        found = plan(replace(settings, training=left_open), cpu())
        assert ("asks for them" in str(found)) is unheard
        assert ([each.phase.name for each in found.phases] == ["head"]) is unheard
    given = replace(settings.training, head_rounds=settings.federation.rounds)
    assert "asks for them" not in str(plan(replace(settings, training=given), cpu()))


def test_a_configuration_that_no_file_could_say(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    settings = config(tiny_bert, data, "record")
    wrong = replace(settings, privacy=replace(settings.privacy, epsilon=float("nan"), clip=0.0))
    for start in (lambda: simulate(wrong, tmp_path / "run", cpu()), lambda: plan(wrong, cpu())):
        with pytest.raises(BadInput) as caught:
            start()
        assert len(caught.value.faults) == 2
    assert not (tmp_path / "run").exists()


@dataclass(frozen=True)
class Halved:
    """Takes half of each mean."""

    def apply(self, state, memory, mean):  # type: ignore[no-untyped-def]
        vector = (state.vector + 0.5 * mean).astype(np.float32)
        return front.AdapterState(state.spec, vector), memory


def test_a_strategy_of_ones_own_is_named_and_kept(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    settings = config(tiny_bert, data, "none")
    plain = simulate(settings, tmp_path / "plain", cpu())
    own = simulate(settings, tmp_path / "own", cpu(), strategy=Halved())
    manifest = json.loads((own.folder / "manifest.json").read_text())
    assert own.summary["strategy"] == manifest["strategy"] == "Halved"
    assert own.summary["own"] == {"strategy": "Halved"}
    assert own.summary["adapter_digest"] != plain.summary["adapter_digest"]
    for folder, strategy in ((own.folder, None), (plain.folder, Halved())):
        with pytest.raises(BadInput, match="another strategy, partition, cohort or loss"):
            simulate(settings, folder, cpu(resume=True), strategy=strategy)
    again = simulate(settings, own.folder, cpu(resume=True), strategy=Halved())
    assert again.summary["adapter_digest"] == own.summary["adapter_digest"]


def thirds(records: front.Records, units: front.UnitIndex) -> list[int]:
    return [unit % 3 for unit in range(len(units))]


def test_a_partition_of_ones_own_splits_no_unit_and_stays(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    """Units of several records each; dealt out anew, one would be two institutions' in one run."""
    settings = config(tiny_bert, data, "record", "data.unit=person")
    result = simulate(settings, tmp_path / "run", cpu(), partition=thirds)
    assert result.summary["own"] == {"partition": "thirds"}
    run = begin(settings, tmp_path / "run", cpu(resume=True), own_of(thirds))
    units = run.federation.partition.units_of(1)
    assert units.tolist() == list(range(1, len(run.federation.units), 3))
    run.ledger.close()

    def shifted(records: front.Records, units: front.UnitIndex) -> list[int]:
        return [(unit + 1) % 3 for unit in range(len(units))]

    shifted.__name__ = "thirds"
    for other in (shifted, None):
        with pytest.raises(BadInput, match="another strategy, partition, cohort or loss"):
            simulate(settings, tmp_path / "run", cpu(resume=True), partition=other)


@pytest.mark.parametrize(
    ("owners", "said"),
    [
        (lambda records, units: [0] * len(records), "whole number for each of"),
        (lambda records, units: [0.0] * len(units), "found float64"),
        (lambda records, units: [3] * len(units), "found clients 3 to 3, expected 0 to 2"),
        (lambda records, units: [-1] * len(units), "found clients -1 to -1"),
        (lambda records, units: [0, 2] * (len(units) // 2) + [0] * (len(units) % 2), "client 1"),
    ],
    ids=["a-record-each", "no-numbers", "too-many", "negative", "nobody"],
)
def test_what_is_no_partition(
    tiny_bert: Path, data: Path, tmp_path: Path, owners: object, said: str
) -> None:
    settings = config(tiny_bert, data, "record", "data.unit=person")
    with pytest.raises(BadInput, match=said):
        begin(settings, tmp_path / "run", cpu(), own_of(owners))
    assert not (tmp_path / "run" / "checkpoint").exists()


def own_of(partition: object) -> Own:
    return Own(partition=partition)  # type: ignore[arg-type]


def test_a_cohort_of_ones_own_is_told_to_whoever_reads_the_statement(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    asked = []

    def watched(run: front.SimulatedRun) -> front.Cohort:
        cohort = sequential(run)

        class Watched:
            def total(self, plan, state):  # type: ignore[no-untyped-def]
                asked.append(plan.attempt)
                return cohort.total(plan, state)

        return Watched()

    result = simulate(config(tiny_bert, data, "record"), tmp_path / "run", cpu(), cohort=watched)
    assert asked == [1, 2, 3, 4] and result.summary["own"] == {"cohort": "watched"}
    assert "researcher's own (watched)" in result.statement[-1]
    assert "researcher&#39;s own (watched)" in (result.folder / "report.html").read_text()


def test_actors_know_the_configuration_alone(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    settings = config(tiny_bert, data, "none")
    for own in ({"partition": thirds}, {"cohort": sequential}):
        with pytest.raises(BadInput, match="actors know the configuration alone"):
            simulate(settings, tmp_path / "run", cpu(engine="ray"), **own)


def test_a_sweep_from_python(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    settings = config(tiny_bert, data, "none", "federation.rounds=2")
    found = sweep(settings, "server.head_learning_rate", [0.05, 0.1], tmp_path, cpu())
    assert [trial["value"] for trial in found.trials] == ["0.05", "0.1"]
    assert found.page == tmp_path / "sweep.html" and found.page.is_file()
    first = (tmp_path / "server.head_learning_rate=0.05" / "summary.json").stat().st_mtime_ns
    assert sweep(settings, "server.head_learning_rate", ["0.05"], tmp_path, cpu()).trials == (
        found.trials[0],
    )
    assert (
        tmp_path / "server.head_learning_rate=0.05" / "summary.json"
    ).stat().st_mtime_ns == first
    with pytest.raises(BadInput, match=r"section\.key"):
        sweep(settings, "seed", [1], tmp_path, cpu())


def test_a_release_is_verified_from_python(tmp_path: Path) -> None:
    of = releases.party()
    export, key = releases.exported(tmp_path, of), tmp_path / "coordinator.pub"
    key.write_text(of.coordinator.public.text + "\n")
    assert verify(export, key)[-1] == verify(str(export), str(key))[-1]
    assert "verified with the coordinator's key" in verify(export, key)[-1]
    assert "integrity only" in verify(export)[-1]


def test_options_are_frozen() -> None:
    with pytest.raises(AttributeError):
        Options().device = "cpu"  # type: ignore[misc]
