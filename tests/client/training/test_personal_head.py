"""A head of an institution's own: at its optimum, scored by others, and never worse."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from fedlora.client.training import personal_head as module
from fedlora.client.training.local import ClientData
from fedlora.client.training.personal_head import FOLDS, PULLS, personal_head
from fedlora.common.config.schema import LoraConfig, ModelConfig
from fedlora.common.data.records import unit_groups
from fedlora.common.errors import BadInput
from fedlora.common.model.network import AdapterModel, build_model
from fedlora.common.model.state import HEAD_PREFIX, AdapterState
from fedlora.common.tasks.batch import rows_of
from fedlora.common.tasks.classification import SequenceClassification
from fedlora.common.tasks.token_classification import TokenClassification

WIDTH, RECORDS = 32, 240


def built(base: Path, task: object) -> AdapterModel:
    pooling = "words" if isinstance(task, TokenClassification) else "mean"
    settings = ModelConfig(base=str(base), pooling=pooling, max_length=8)
    return build_model(settings, LoraConfig(rank=2), task, seed=3)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def model(tiny_bert: Path) -> AdapterModel:
    return built(tiny_bert, SequenceClassification(("a", "b", "c")))


def client(targets: np.ndarray, units: list[str] | None = None) -> ClientData:
    encoded = rows_of([[1]] * len(targets), targets.astype(np.int64), {})
    return ClientData("here", encoded, unit_groups(units, len(targets)))


def released(model: AdapterModel, seed: int = 1) -> AdapterState:
    rng = np.random.default_rng(seed)
    values = rng.normal(0, 0.3, model.spec.size).astype(np.float32)
    return AdapterState(model.spec, values)


def separable(seed: int = 0) -> tuple[torch.Tensor, np.ndarray]:
    """Features of three classes, each around a corner of its own."""
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, 3, RECORDS)
    corners = rng.normal(0, 1, (3, WIDTH))
    features = corners[targets] + rng.normal(0, 0.3, (RECORDS, WIDTH))
    return torch.from_numpy(features.astype(np.float32)), targets


def test_it_is_where_the_gradient_of_its_objective_is_zero(model: AdapterModel) -> None:
    """The slow reference: mean cross entropy and half the pull times the squared distance."""
    features, targets = separable()
    start = released(model)
    found = personal_head(model, client(targets), features, start)
    assert found.pull is not None and found.own["loss"] < 0.2 < found.released["loss"]
    head = model.spec.head_mask()
    assert np.array_equal(found.state.vector[~head], start.vector[~head])
    before = {n: v for n, v in start.named().items() if n.startswith(HEAD_PREFIX)}
    values = {
        n: torch.from_numpy(v.copy()).double().requires_grad_(True)
        for n, v in found.state.named().items()
        if n.startswith(HEAD_PREFIX)
    }
    weight, bias = values.values()
    scores = functional.linear(features.double(), weight, bias)
    away = sum((values[n] - torch.from_numpy(v.copy())).square().sum() for n, v in before.items())
    value = functional.cross_entropy(scores, torch.from_numpy(targets)) + found.pull / 2 * away
    slopes = torch.autograd.grad(value, list(values.values()))
    steepest = max(float(each.abs().max()) for each in slopes)
    moved = max(float(np.abs(v.detach().numpy() - before[n]).max()) for n, v in values.items())
    nearest = min(abs(found.pull - each) for each in PULLS if each != found.pull)
    assert steepest < 0.1 * nearest * moved  # at another pull's optimum it would be that


def test_where_labels_say_nothing_the_released_head_is_kept(model: AdapterModel) -> None:
    rng = np.random.default_rng(2)
    features = torch.from_numpy(rng.normal(0, 1, (60, WIDTH)).astype(np.float32))
    targets, zero = rng.integers(0, 3, 60), np.zeros(model.spec.size, np.float32)
    start = AdapterState(model.spec, zero)  # log 3 each, which no head beats by more than luck
    found = personal_head(model, client(targets), features * 3, start)
    assert found.pull is None and found.state is start and found.own == found.released


def test_a_unit_is_in_one_fold_with_all_its_records(model: AdapterModel) -> None:
    """Records of noise, each there six times: known by heart, were one unit in several folds."""
    rng = np.random.default_rng(4)
    features = rng.normal(0, 1, (40, WIDTH)).astype(np.float32).repeat(6, axis=0)
    targets = rng.integers(0, 3, 40).repeat(6)
    start = AdapterState(model.spec, np.zeros(model.spec.size, np.float32))
    people = [str(record // 6) for record in range(len(targets))]
    as_units = personal_head(model, client(targets, people), torch.from_numpy(features), start)
    by_record = personal_head(model, client(targets), torch.from_numpy(features), start)
    assert as_units.own["accuracy"] < 0.6 < 0.95 < by_record.own["accuracy"]


def test_what_has_no_such_head(model: AdapterModel, tiny_bert: Path) -> None:
    features, targets = separable()
    few, start = (
        client(targets, [str(row % (FOLDS - 1)) for row in range(RECORDS)]),
        released(model),
    )
    found = personal_head(model, few, features, start)
    assert found.state is start and found.pull is None and found.own == {}
    words = built(tiny_bert, TokenClassification(("O", "B-x")))
    with pytest.raises(BadInput, match="expected one whose head answers records"):
        module.check_head(words)
