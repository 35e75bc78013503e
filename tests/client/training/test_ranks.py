"""A step on two devices is a step on one: the same sum, one draw, one noise, the same ε."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedlora.client.training.local import ClientData, LocalTraining
from fedlora.client.training.moments import MomentStore
from fedlora.client.training.ranks import RankLost, Ranks, Recipe, of_one_kind
from fedlora.client.training.step import ClipGroups, PerSampleGradients
from fedlora.client.training.trainer import Trainer
from fedlora.common.config.schema import LoraConfig, ModelConfig
from fedlora.common.data.records import Records, UnitIndex, unit_groups
from fedlora.common.errors import BadInput
from fedlora.common.ledger.ledger import Budget, Ledger
from fedlora.common.manifest.manifest import Network
from fedlora.common.model.features import FeatureCache
from fedlora.common.model.state import AdapterState
from fedlora.common.privacy.randomness import draw_units, gaussian
from fedlora.common.tasks.batch import Encoded
from fedlora.common.tasks.classification import SequenceClassification
from tests.client.training.test_trainer import PHASE, manifest, plan

CPU = torch.device("cpu")
TOKENS = 96


@pytest.fixture(scope="module")
def recipe(tiny_bert: Path) -> Recipe:
    settings = ModelConfig(base=str(tiny_bert), max_length=16, pooling="mean")
    lora = LoraConfig(rank=2, targets=("query", "value"))
    return Recipe(settings, lora, SequenceClassification(("a", "b")), 5, False, None)


@pytest.fixture(scope="module")
def ranks(recipe: Recipe) -> Iterator[Ranks]:
    both = Ranks(recipe.build(CPU), recipe, [CPU])
    yield both
    both.close()


@pytest.fixture(scope="module")
def one(recipe: Recipe) -> PerSampleGradients:
    return PerSampleGradients(recipe.build(CPU))


@pytest.fixture(scope="module")
def data(one: PerSampleGradients) -> Encoded:
    texts = [f"w{k} good " + "bad " * (k % 9) for k in range(24)]
    labels = np.arange(24, dtype=np.int64) % 2
    records = Records(texts, texts, labels, None, {}, "made up")
    return one.model.task.encode(records, one.model.tokenizer, 16)


def awake(gradients: PerSampleGradients, seed: int) -> AdapterState:
    values = np.random.default_rng(seed).normal(0, 0.1, gradients.model.spec.size)
    return AdapterState(gradients.model.spec, values.astype(np.float32))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("names", [None, [f"p{k // 3}" for k in range(24)]], ids=["record", "unit"])
def test_two_ranks_give_the_sum_of_one(
    ranks: Ranks, one: PerSampleGradients, data: Encoded, names: list[str] | None, packed: bool
) -> None:
    """Of a state that rank 0 was given just now, and of units whose records stay together."""
    units = unit_groups(names, len(data))
    drawn = np.arange(len(units) - 1, dtype=np.int64)
    groups = ClipGroups.split(one.model.spec, 0.05, 0.02)
    for seed in (1, 2):  # the second time the data are there already
        for each in (ranks, one):
            each.model.load(awake(each, seed))
        found, expected = (
            each.clipped_sum(data, units, drawn, groups, TOKENS, packed) for each in (ranks, one)
        )
        off = np.linalg.norm(found.vector - expected.vector)
        assert off <= 1e-6 * np.linalg.norm(expected.vector) > 0
        assert (found.units, found.nonfinite) == (expected.units, expected.nonfinite)
    none = np.array([], dtype=np.int64)
    assert not ranks.clipped_sum(data, units, none, groups, TOKENS, packed).vector.any()


def test_one_draw_one_noise_and_the_same_epsilon(
    ranks: Ranks,
    one: PerSampleGradients,
    data: Encoded,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    draws, noises, charged = [], [], []

    def draw(*given: Any) -> Any:
        draws.append(given[0])
        return draw_units(*given)

    def noise(*given: Any) -> Any:
        noises.append(given[1])
        return gaussian(*given)

    monkeypatch.setattr("fedlora.client.training.local.draw_units", draw)
    monkeypatch.setattr("fedlora.client.training.step.gaussian", noise)
    client = ClientData("here", data, unit_groups(None, len(data)))
    for name, gradients in (("one", one), ("two", ranks)):
        model, root = gradients.model, tmp_path / name
        root.mkdir()
        ledger = Ledger.open(root / "ledger.sqlite", root / "head.json", root / "key")
        training = LocalTraining(gradients, FeatureCache(model), TOKENS)
        budget, moments = Budget("here", 60.0, 1e-2), MomentStore(root / "moments")
        run = manifest(model, network=Network.of(ModelConfig(pooling="mean"), model.lora))
        run = replace(run, phases=(replace(PHASE, name="adapter"),))
        trainer, state = Trainer(client, training, ledger, budget, moments), model.state()
        trainer.consent(run)
        trainer.train(plan(run, state), state)
        charged.append(ledger.spent("here"))
        size = model.spec.size
        assert draws == [len(data)] * PHASE.steps and noises == [size] * PHASE.steps
        draws.clear()
        noises.clear()
    assert charged[0] == charged[1]


def test_a_rank_that_is_lost_ends_the_step_and_all_later_ones(
    recipe: Recipe, data: Encoded
) -> None:
    both = Ranks(recipe.build(CPU), recipe, [CPU])
    units, drawn = unit_groups(None, len(data)), np.arange(4, dtype=np.int64)
    groups = ClipGroups.flat(both.model.spec, 1.0)
    (process,) = (process for _, process in both.started)
    process.terminate()
    process.join()
    for _ in range(2):
        with pytest.raises(RankLost, match="ended"):
            both.clipped_sum(data, units, drawn, groups, TOKENS)


def test_a_rank_tells_the_kind_of_a_fault_and_no_text(recipe: Recipe) -> None:
    wrong = replace(recipe, model=replace(recipe.model, digest="sha256:" + "0" * 64))
    both = Ranks(recipe.build(CPU), wrong, [CPU])
    encoded = both.model.task.encode(
        Records(["w1"], ["w1"], np.zeros(1, dtype=np.int64), None, {}, "made up"),
        both.model.tokenizer,
        16,
    )
    units = UnitIndex(np.array([0, 1, 2]), np.array([0, 0]))
    groups = ClipGroups.flat(both.model.spec, 1.0)
    with pytest.raises(RankLost, match=r"^a rank could not compute its share \(BadInput\)$"):
        both.clipped_sum(encoded, units, np.array([0, 1]), groups, TOKENS)


def test_devices_are_of_one_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"cuda:0": "A", "cuda:1": "A", "cuda:2": "B"}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: names[str(device)])
    of_one_kind([torch.device("cuda:0"), torch.device("cuda:1")])
    of_one_kind([CPU, CPU])
    for other in ("cuda:2", "cpu"):
        with pytest.raises(BadInput, match="expected devices of one kind"):
            of_one_kind([torch.device("cuda:0"), torch.device(other)])
