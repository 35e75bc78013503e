"""The examples run, on a tiny base, and show what they say that they show."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from fedlora.common.config import task_names
from fedlora.common.config.load import parse_config
from fedlora.common.errors import BadInput
from fedlora.common.model.base import base_digest
from fedlora.common.tasks import known
from fedlora.simulations import ServerState
from fedlora.simulations.examples import (
    own_attack,
    own_base,
    own_partition,
    own_strategy,
    own_task,
    private_federation,
)
from fedlora.simulations.federation import corpus

EXAMPLES = (private_federation, own_strategy, own_partition, own_task, own_base, own_attack)


@pytest.fixture(autouse=True)
def _few_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough for every institution and label, and for δ."""
    monkeypatch.setattr(corpus, "TRAIN", 600)
    monkeypatch.setattr(corpus, "TEST", 60)


def test_a_private_federation(
    tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = private_federation.main(tmp_path, str(tiny_bert), rounds=3)
    printed = capsys.readouterr().out
    assert result.epsilon is not None and 2.9 < result.epsilon <= 3.0
    assert "all attempts" in printed and "round   3" in printed
    assert all(sentence in printed for sentence in result.statement)
    assert (tmp_path / "run" / "report.html").is_file()


def test_a_strategy_of_ones_own(tiny_bert: Path, tmp_path: Path) -> None:
    result = own_strategy.main(tmp_path, str(tiny_bert), rounds=3)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert result.summary["strategy"] == manifest["strategy"] == "Nesterov"
    assert result.epsilon is not None and result.epsilon <= 3.0


def test_nesterov_is_the_papers(tmp_path: Path) -> None:
    """Two steps by hand: v₁ = g, x₁ = η(βg + g); v₂ = βv₁ + g, x₂ = x₁ + η(βv₂ + g)."""
    from tests.server.fakes import START

    rule, mean = own_strategy.Nesterov(0.5, 0.9), np.ones(START.spec.size)
    state, memory = rule.apply(START, ServerState(), mean)
    assert state.vector - START.vector == pytest.approx(0.5 * 1.9, rel=1e-6)
    after, _ = rule.apply(state, memory, mean)
    assert after.vector - state.vector == pytest.approx(0.5 * (0.9 * 1.9 + 1), rel=1e-6)


def test_a_partition_of_ones_own(tiny_bert: Path, tmp_path: Path) -> None:
    result = own_partition.main(tmp_path, str(tiny_bert), rounds=2)
    assert result.summary["own"] == {"partition": "by_length"}
    counts = np.array(result.summary["partition"]["counts"]).sum(axis=1)
    assert len(counts) == 5 and counts.max() - counts.min() <= 1


def test_a_task_of_ones_own(tiny_bert: Path, tmp_path: Path) -> None:
    result = own_task.main(tmp_path, str(tiny_bert), rounds=2)
    assert result.summary["task"] == "smoothed-classification" and result.summary["accuracy"] > 0
    assert result.epsilon is not None and result.epsilon <= 3.0
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["task"] == "smoothed-classification"
    (answer,) = result.adapter.predict(["my laptop makes a burning smell"])
    assert answer in corpus.CLASSES


def test_a_base_of_ones_own(tiny_bert: Path, tmp_path: Path) -> None:
    """A private head above it is trained, released, and loaded again."""
    result = own_base.main(tmp_path, str(tiny_bert), rounds=3)
    assert result.epsilon is not None and result.epsilon <= 3.0
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["base_digest"] == base_digest(tmp_path / "mixer")
    (answer,) = result.adapter.predict(["my laptop makes a burning smell"])
    assert answer in corpus.CLASSES


PACKAGED_BASE = """
import sys
from importlib.metadata import EntryPoint
from fedlora.common.config.schema import LoraConfig, ModelConfig
from fedlora.common.model import architectures
from fedlora.common.model.network import build_model
from fedlora.common.tasks.classification import SequenceClassification

offered = EntryPoint(
    "word-mixer", "fedlora.simulations.examples.own_base:register", architectures.GROUP
)
known = [offered] if sys.argv[2] == "offered" else []
architectures.entry_points = lambda group, name: [each for each in known if each.name == name]
model = ModelConfig(sys.argv[1], max_length=24, pooling="mean")
lora = LoraConfig(rank=2, targets=("mixed.0",))
print(build_model(model, lora, SequenceClassification(("a", "b")), 1).spec.size)
"""


def test_a_base_that_a_package_offers(tiny_bert: Path, tmp_path: Path) -> None:
    """Under the entry point `fedlora.bases`, by its model type; in a process that knows it not."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    mixer = own_base.Mixer(own_base.MixerConfig(words=len(tokenizer), width=8))
    mixer.save_pretrained(tmp_path / "mixer")
    tokenizer.save_pretrained(tmp_path / "mixer")
    known, unknown = (
        subprocess.run(
            [sys.executable, "-c", PACKAGED_BASE, str(tmp_path / "mixer"), offered],
            capture_output=True,
            text=True,
            check=False,
        )
        for offered in ("offered", "not")
    )
    assert known.returncode == 0 and int(known.stdout) == 2 * (16 + 8) + 2 * 8 + 2, known.stderr
    assert unknown.returncode != 0 and "BadInput" in unknown.stderr


def test_an_attack_of_ones_own(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mean of five goes the other way where one sends nine times its update against its sense."""

    def losses(folder: str) -> tuple[float, float]:
        found = own_attack.main(tmp_path / folder, str(tiny_bert), rounds=3)
        return found["fedavg"].summary["loss"], found["multi-krum"].summary["loss"]

    mean, near = losses("attacked")
    monkeypatch.setattr(own_attack, "FACTOR", 1.0)
    honest, _ = losses("honest")
    assert mean > 1.1 * honest and near < mean


def test_a_task_that_a_package_offers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the entry point `fedlora.tasks`: a configuration may name it, and it is loaded then."""

    def offered(group: str) -> list[EntryPoint]:
        module = "fedlora.simulations.examples.own_task"
        return [EntryPoint("smoothed-classification", f"{module}:SmoothedClassification", group)]

    monkeypatch.setattr(task_names, "entry_points", offered)
    monkeypatch.setattr(task_names, "_added", set())
    monkeypatch.delitem(known.TASKS, "smoothed-classification", raising=False)
    task_names.installed_tasks.cache_clear()
    text = '[model]\ntask = "smoothed-classification"'
    assert parse_config(text).model.task == "smoothed-classification"
    task = known.task_named("smoothed-classification", ("a", "b"))
    assert isinstance(task, own_task.SmoothedClassification)
    monkeypatch.setattr(task_names, "entry_points", lambda group: [])
    monkeypatch.setattr(task_names, "_added", set())
    task_names.installed_tasks.cache_clear()
    with pytest.raises(BadInput, match="expected one of sequence-classification"):
        parse_config(text)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda each: each.__name__.rpartition(".")[2])
def test_examples_are_short_and_can_be_started(example: object) -> None:
    path = Path(str(example.__file__))  # type: ignore[attr-defined]
    assert len(path.read_text().splitlines()) < 100
    assert f"python -m fedlora.simulations.examples.{path.stem}" in path.read_text()


def test_an_example_is_a_program(tmp_path: Path) -> None:
    """Started as its docstring says, it begins: here it ends at a base that is not there."""
    code = (
        "import runpy, sys; from fedlora.simulations.examples import private_federation as e;"
        "e.main(__import__('pathlib').Path(sys.argv[1]), 'no-such-base')"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode and "no-such-base" in done.stderr
