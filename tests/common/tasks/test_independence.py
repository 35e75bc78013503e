"""Each task's loss couples no records: what one gives is its own, in whatever company."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from fedlora.client.training.step import ClipGroups, PerSampleGradients
from fedlora.common.config.load import parse_config
from fedlora.common.config.schema import LoraConfig, ModelConfig
from fedlora.common.data.records import Records, read_records, unit_groups
from fedlora.common.model.network import AdapterModel, build_model
from fedlora.common.model.state import AdapterState
from fedlora.common.tasks.batch import Encoded
from fedlora.common.tasks.classification import SequenceClassification
from fedlora.common.tasks.known import task_kind
from tests.oracles import clipped_sum_by_ones
from tests.tasks import IDS, MADE, SOUND, Made, text

RECORDS = 12
TASK = SequenceClassification(("no", "yes"))


@dataclass(frozen=True)
class Case:
    """A model that Opacus hooks, one that it does not, and records."""

    model: AdapterModel
    reference: AdapterModel
    gradients: PerSampleGradients
    data: Encoded


@pytest.fixture(scope="module", params=[*MADE, SOUND], ids=[*IDS, SOUND.id])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    made: Made = request.param
    folder: Path = tmp_path_factory.mktemp("data")
    path = made.write(folder / "test.jsonl", RECORDS, 1)
    base = request.getfixturevalue(made.base)
    pooling = "default" if made.metric == "perplexity" else "mean"
    if made.task == "token-classification":
        pooling = "words"
    if "a pair" in made.id and not made.model:
        pooling = "pairs"
    config = parse_config(made.config(base, folder), "test", [f"model.pooling={pooling}"])
    kind = task_kind(made.task)
    task = kind(kind.label_set(path, config.data))
    records = read_records(path, kind.columns(config.data), task.labels)
    models = [build_model(config.model, config.lora, task, 5) for _ in range(2)]
    for each in models:
        values = np.random.default_rng(3).normal(0, 0.05, each.spec.size)
        each.load(AdapterState(each.spec, values.astype(np.float32)))
    data = models[0].encoded(records)
    return Case(models[0], models[1], PerSampleGradients(models[0]), data)


def test_a_loss_does_not_move_with_its_company(case: Case) -> None:
    rows = np.arange(RECORDS, dtype=np.int64)
    model, data = case.reference, case.data
    with torch.no_grad():
        together = model.losses(data.batch(rows, model.pad, model.device))
        assert together.shape == (RECORDS,) and bool((together > 0).all())
        for row in rows:
            alone = model.losses(data.batch(np.array([row]), model.pad, model.device))
            assert float(alone[0]) == pytest.approx(float(together[row]), rel=1e-4)


def test_a_gradient_is_that_of_a_batch_of_one(case: Case) -> None:
    """Also to the last bit whatever else is drawn, since the batches' shapes are fixed."""
    units, data = unit_groups(None, RECORDS), case.data
    groups = ClipGroups.flat(case.model.spec, 1e4)

    def summed(*drawn: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        chosen = np.array(drawn, dtype=np.int64)
        return case.gradients.clipped_sum(data, units, chosen, groups, 256).vector

    every = summed(*range(RECORDS))
    expected = clipped_sum_by_ones(
        case.reference, data, units, np.arange(RECORDS, dtype=np.int64), groups
    )
    assert np.linalg.norm(every - expected) <= 1e-4 * np.linalg.norm(expected)
    assert np.linalg.norm(expected) > 0
    for row in (0, 5):
        without = summed(*(each for each in range(RECORDS) if each != row))
        assert np.linalg.norm(every - without - summed(row)) <= 1e-12 * np.linalg.norm(every)


def test_records_of_nobodys_are_read_like_any_other(case: Case) -> None:
    model, rng = case.model, np.random.default_rng(0)
    data = model.inputs.nobodys(model.task, np.array([2, 3]), rng)
    batch = data.batch(np.array([0, 1]), case.model.pad, case.model.device)
    assert bool(torch.isfinite(case.reference.losses(batch)).all())


def test_records_go_alone_where_a_head_rounds_by_their_place(tiny_bert: Path) -> None:
    """Of 65 inputs and two answers; a loss mostly rounds the difference away, and not always."""
    settings = ModelConfig(str(tiny_bert), max_length=24, pooling="mean", head_hidden=65)
    models = [build_model(settings, LoraConfig(rank=2), TASK, 5) for _ in range(2)]
    gradients = PerSampleGradients(models[0])
    rng = np.random.default_rng(0)
    for model in models:
        values = rng.normal(0, 0.3, model.spec.size).astype(np.float32)
        model.load(AdapterState(model.spec, values))
    labels = rng.integers(0, 2, RECORDS)
    records = Records([text(rng) for _ in range(RECORDS)], None, labels, None, {}, "test")
    data, units = models[0].encoded(records), unit_groups(None, RECORDS)
    groups = ClipGroups.flat(models[0].spec, 1e4)

    def summed(*drawn: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        chosen = np.array(drawn, dtype=np.int64)
        return gradients.clipped_sum(data, units, chosen, groups, 256).vector

    every = summed(*range(RECORDS))
    for row in range(RECORDS):
        without = summed(*(each for each in range(RECORDS) if each != row))
        assert np.linalg.norm(every - without - summed(row)) <= 1e-12 * np.linalg.norm(every)
