"""Layers computed again on the way back: the gradients of each record, in less memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from fedlora.client.training.step import ClipGroups, PerSampleGradients
from fedlora.common.config.schema import LoraConfig, ModelConfig
from fedlora.common.data.records import UnitIndex, unit_groups
from fedlora.common.errors import BadInput
from fedlora.common.model.network import AdapterModel, build_model
from fedlora.common.tasks.causal_lm import CausalLanguageModel
from fedlora.common.tasks.classification import SequenceClassification
from fedlora.simulations.benchmarks.models import LANGUAGE, Use, awake
from tests.common.model.test_stored import built, encoded, published
from tests.oracles import clipped_sum_by_ones

CLIP = 0.05
UNITS = ("a", "b", "b", "b", "c", "d", "d", "e")
MEAN = Use("sequence-classification", "mean", ("query", "value"))
USES = {
    "BERT": MEAN,
    "DeBERTa-v2": replace(MEAN, targets=("auto",)),
    "Llama": replace(LANGUAGE, targets=("all-linear",)),
    "GPT-2": replace(LANGUAGE, targets=("all-linear",)),
    "ModernBERT": replace(MEAN, targets=("all-linear",)),
    "BLOOM": replace(LANGUAGE, targets=("auto",)),
}


def clipped(model: AdapterModel, tokens: int, packed: bool) -> npt.NDArray[np.float64]:
    gradients = PerSampleGradients(model)
    assert not gradients.one_by_one
    data, units = encoded(model), unit_groups(UNITS)
    drawn = np.arange(5, dtype=np.int64)
    groups = ClipGroups.flat(model.spec, CLIP)
    return gradients.clipped_sum(data, units, drawn, groups, tokens, packed).vector


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", USES)
def test_the_sum_is_a_batch_of_one_loops_without(tmp_path: Path, name: str, packed: bool) -> None:
    base = published(name, tmp_path)
    plain, again = (built(base, USES[name], "float32") for _ in range(2))
    units: UnitIndex = unit_groups(UNITS)
    groups, drawn = ClipGroups.flat(plain.spec, CLIP), np.arange(5, dtype=np.int64)
    expected = clipped_sum_by_ones(plain, encoded(plain), units, drawn, groups)
    again.recompute()
    found = clipped(again, 128, packed)
    assert np.linalg.norm(found - expected) <= 1e-6 * 5 * CLIP
    assert np.linalg.norm(found - clipped(plain, 128, packed)) <= 1e-6 * 5 * CLIP


@pytest.mark.parametrize("variant", ["lora", "ffa"])
def test_a_last_layer_whose_input_needs_no_gradient_has_one(tiny_llama: Path, variant: str) -> None:
    """A frozen A in the lowest adapted layer: its B sees its gradient before anything else does."""
    settings = ModelConfig(base=str(tiny_llama), task="causal-lm", max_length=24)
    lora = LoraConfig(rank=2, targets=("down_proj",), layers=(1,), variant=variant)
    plain, again = (build_model(settings, lora, CausalLanguageModel(), 5) for _ in range(2))
    again.recompute()
    for model in (plain, again):
        model.load(awake(model))
    np.testing.assert_allclose(
        clipped(again, 128, False), clipped(plain, 128, False), rtol=1e-6, atol=1e-8
    )


def test_nothing_in_a_layer_is_kept_between_the_passes(tmp_path: Path) -> None:
    base = published("Llama", tmp_path)
    plain, again = (built(base, USES["Llama"], "float32") for _ in range(2))
    again.recompute()

    def kept(model: AdapterModel) -> int:
        seen: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if not any(tensor is each for each in model.network.parameters()):
                seen[tensor.data_ptr()] = tensor.nbytes
            return tensor

        data = encoded(model)
        batch = data.batch(np.arange(8), model.pad, model.device)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.losses(batch)
        return sum(seen.values())

    assert 4 * kept(again) < kept(plain)


def test_a_base_without_such_layers_is_refused(tmp_path: Path) -> None:
    model = built(published("XLNet", tmp_path), replace(MEAN, targets=("auto",)), "float32")
    with pytest.raises(BadInput, match="checkpointing = true: found no layers in the base that"):
        model.recompute()


def test_an_evaluation_is_the_same(tiny_bert: Path) -> None:
    task = SequenceClassification(("a", "b", "c"))
    settings = ModelConfig(base=str(tiny_bert), pooling="mean", max_length=24)
    plain, again = (build_model(settings, LoraConfig(rank=2), task, 5) for _ in range(2))
    again.recompute()
    batch = encoded(plain).batch(np.arange(8), plain.pad, plain.device)
    with torch.no_grad():
        assert torch.equal(plain.logits(batch), again.logits(batch))
