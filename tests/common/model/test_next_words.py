"""Next words scored in chunks: the losses and gradients of all scores at once, in less memory."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fedlora.client.training.step import ClipGroups, PerSampleGradients
from fedlora.common.data.records import unit_groups
from fedlora.common.model import next_words
from fedlora.common.model.network import AdapterModel
from fedlora.common.tasks.batch import IGNORED, Batch
from fedlora.common.tasks.causal_lm import LEARNT, CausalLanguageModel
from fedlora.simulations.benchmarks.models import LANGUAGE
from tests.common.model.test_stored import built, encoded, published
from tests.oracles import clipped_sum_by_ones

CPU = torch.device("cpu")
TASK = CausalLanguageModel()
WORDS = 70  # of the base


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> AdapterModel:
    return build_alike(tmp_path_factory.mktemp("base"))


def build_alike(folder: Path) -> AdapterModel:
    return built(published("Llama", folder), replace(LANGUAGE, targets=("all-linear",)), "float32")


@pytest.fixture(params=[1, 7, 10_000])
def places(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many are scored together; 1 and 7 are less than a batch has."""
    monkeypatch.setattr(next_words, "CHUNK", {"cpu": request.param * 4 * WORDS})


def batch_of(model: AdapterModel, fixed: bool) -> Batch:
    data = encoded(model)
    return data.batch(np.arange(8), model.pad, CPU, (10, 24) if fixed else None)


def gradients(model: AdapterModel, losses: torch.Tensor) -> torch.Tensor:
    weights = torch.arange(1, len(losses) + 1)
    found = torch.autograd.grad((losses * weights).sum(), list(model.parameters.values()))
    return torch.cat([each.flatten() for each in found])


@pytest.mark.usefixtures("places")
@pytest.mark.parametrize("fixed", [False, True])
def test_losses_and_gradients_are_those_of_all_scores(model: AdapterModel, fixed: bool) -> None:
    batch = batch_of(model, fixed)
    whole = TASK.losses(model.logits(batch), batch)
    found = model.losses(batch)
    torch.testing.assert_close(found, whole, rtol=1e-6, atol=1e-6)
    expected = gradients(model, whole)
    apart = (gradients(model, found) - expected).norm()
    assert apart <= 1e-6 * expected.norm()


@pytest.mark.usefixtures("places")
def test_evaluation_is_that_of_all_scores(model: AdapterModel) -> None:
    batch = batch_of(model, fixed=False)
    with torch.no_grad():
        found, whole = model.measure(batch), TASK.measure(model.logits(batch), batch)
    assert found.keys() == whole.keys()
    for name, total in whole.items():
        np.testing.assert_allclose(found[name], total, rtol=1e-6)


@pytest.mark.usefixtures("places")
def test_the_private_sum_is_a_batch_of_one_loops(model: AdapterModel, tmp_path: Path) -> None:
    data, units = encoded(model), unit_groups(None, 8)
    drawn, groups = np.arange(8, dtype=np.int64), ClipGroups.flat(model.spec, 0.05)
    expected = clipped_sum_by_ones(model, data, units, drawn, groups)
    hooked = PerSampleGradients(build_alike(tmp_path))
    found = hooked.clipped_sum(data, units, drawn, groups, 96).vector
    assert np.linalg.norm(found - expected) <= 1e-6 * 8 * 0.05


def test_no_product_has_a_shape_that_follows_from_the_targets(
    model: AdapterModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a batch of fixed shape; a chunk in which nobody predicts may be left out."""
    monkeypatch.setattr(next_words, "CHUNK", {"cpu": 4 * WORDS * 30})
    found = model.next_words
    assert found is not None
    batch = batch_of(model, fixed=True)

    def sizes(targets: int, fixed: bool = True) -> list[int]:
        places = torch.arange(batch.ids.shape[1]).expand_as(batch.ids)
        learnt = torch.where(places >= targets, LEARNT, IGNORED)
        other = replace(batch, targets=learnt, fixed=fixed)
        return [len(each) for each in found._chunks(other, TASK.counted(other))]

    assert sizes(1) == sizes(2) == sizes(3) == [30] * 7 + [20]
    assert sizes(7) == [30] * 5 + [20]
    assert sizes(3, fixed=False) != sizes(2, fixed=False)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_overflows_where_nothing_is_predicted_is_nobodys_to_show(
    model: AdapterModel, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    """An adapter can let a token of its choice overflow in the last layer. Whether that was scored
    says whether others beside it predict there: a record's loss and gradient must not.
    """
    monkeypatch.setattr(next_words, "CHUNK", {"cpu": 4 * WORDS * 10})
    batch, found = batch_of(model, fixed=True), model.next_words
    assert found is not None
    spoilt = torch.zeros(*batch.ids.shape, 1)
    spoilt[0, 3] = value

    def overflown(module: object, inputs: object, output: dict[str, torch.Tensor]) -> object:
        output["last_hidden_state"] = output["last_hidden_state"] + spoilt
        return output

    def first(begins: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss and gradient of the first record, beside others who predict from there on."""
        places = torch.arange(batch.ids.shape[1]).expand_as(batch.ids)
        begin = torch.full((len(batch.ids), 1), begins)
        begin[0] = 8
        losses = model.losses(replace(batch, targets=torch.where(places >= begin, LEARNT, IGNORED)))
        only = torch.zeros(len(losses))
        only[0] = 1
        return losses[0].detach(), gradients(model, torch.where(only > 0, losses, 0.0))

    hook = found.backbone.register_forward_hook(overflown)
    try:
        (alone, own), (beside, same) = first(8), first(1)
    finally:
        hook.remove()
    assert torch.isfinite(alone) and torch.equal(alone, beside)
    assert torch.isfinite(own).all() and torch.equal(own, same)


def test_no_more_scores_are_held_than_a_chunk(
    model: AdapterModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(next_words, "CHUNK", {"cpu": 4 * WORDS * 8})
    largest = []
    assert model.next_words is not None
    hook = model.next_words.head.register_forward_hook(
        lambda module, inputs, scores: largest.append(scores.numel())
    )
    try:
        gradients(model, model.losses(batch_of(model, fixed=False)))
    finally:
        hook.remove()
    assert len(largest) > 2
    assert max(largest) == WORDS * 8


@pytest.mark.parametrize(
    ("family", "more", "in_parts"),
    [("GPT-2", {}, True), ("Granite", {"logits_scaling": 8.0}, False)],
)
def test_scores_that_are_scaled_or_capped_besides_are_asked_for_whole(
    tmp_path: Path, family: str, more: dict[str, float], in_parts: bool
) -> None:
    base = published(family, tmp_path)
    config = json.loads((base / "config.json").read_bytes())
    (base / "config.json").write_text(json.dumps(config | more))
    model = built(base, replace(LANGUAGE, targets=("auto",)), "float32")
    assert (model.next_words is not None) == in_parts
    batch = batch_of(model, fixed=False)
    whole = TASK.losses(model.logits(batch), batch)
    torch.testing.assert_close(model.losses(batch), whole, rtol=1e-6, atol=1e-6)
