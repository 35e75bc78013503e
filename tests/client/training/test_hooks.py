"""Hooks know where a layer sees the records; where none can be right, records go one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from fedlora.client.training import step
from fedlora.client.training.hooks import Layout, RecordHooks
from fedlora.client.training.sampling import micro_batches
from fedlora.client.training.step import ClipGroups, PerSampleGradients
from fedlora.common.config.schema import LoraConfig, ModelConfig
from fedlora.common.data.records import Records, unit_groups
from fedlora.common.errors import BadInput
from fedlora.common.model.network import AdapterModel, build_model
from fedlora.common.tasks.causal_lm import CausalLanguageModel
from fedlora.common.tasks.classification import SequenceClassification
from fedlora.common.tasks.seq2seq import SequenceToSequence
from fedlora.simulations.benchmarks.families import FAMILIES
from fedlora.simulations.benchmarks.models import awake, records
from fedlora.simulations.benchmarks.random_base import ENCODER, WORDS, tokenizer
from tests.oracles import clipped_sum_by_ones

RECORDS, LONG, WIDTH = 3, 7, 4


class Turned(nn.Module):
    """A linear layer that sees its batch in one of the layouts, or in none."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.layer = kind, nn.Linear(WIDTH, 2)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor
        if self.kind == "words first":
            result = self.layer(states.transpose(0, 1)).transpose(0, 1)
        elif self.kind == "flat":
            result = self.layer(states.flatten(0, 1)).reshape(len(states), -1, 2)
        elif self.kind == "positions too":
            result = self.layer(states) + self.layer(states.detach().mean(dim=0, keepdim=True))
        elif self.kind == "mixed":
            result = (
                self.layer(states.mean(dim=(0, 1), keepdim=True).squeeze(0)) + 0 * states[..., :2]
            )
        else:
            result = self.layer(states)
        return result.cos().sum(dim=(1, 2))


def by_ones(network: Turned, states: torch.Tensor) -> torch.Tensor:
    rows = [
        torch.autograd.grad(network(row[None]).sum(), [network.layer.weight])[0] for row in states
    ]
    return torch.stack(rows)


@pytest.mark.parametrize("kind", ["as it is", "words first", "flat"])
def test_each_layout_gives_each_record_its_own_gradient(kind: str) -> None:
    torch.manual_seed(0)
    network, states = Turned(kind), torch.randn(RECORDS, LONG, WIDTH, requires_grad=True)
    expected = by_ones(network, states)
    hooks = RecordHooks(network.eval())
    assert hooks.learn(lambda: network(states), RECORDS)
    other = torch.randn(
        5, 5, WIDTH, requires_grad=True
    )  # as many words as records: nothing in it tells them apart
    for batch, wanted in ((states, expected), (other, None)):
        wanted = by_ones(network, batch) if wanted is None else wanted
        hooks.records = len(batch)
        with hooks.on():
            network(batch).sum().backward()
        found = network.layer.weight.grad_sample  # type: ignore[attr-defined]
        assert torch.allclose(found, wanted, atol=1e-5)
        network.layer.weight.grad_sample = network.layer.bias.grad_sample = None  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["positions too", "mixed"])
def test_a_layer_that_sees_more_than_a_batch_has_no_layout(kind: str) -> None:
    network, states = Turned(kind), torch.randn(RECORDS, LONG, WIDTH, requires_grad=True)
    hooks = RecordHooks(network.eval())
    assert not hooks.learn(lambda: network(states), RECORDS)


def test_a_pass_that_is_laid_out_otherwise_is_stopped() -> None:
    network, states = Turned("as it is"), torch.randn(RECORDS, LONG, WIDTH, requires_grad=True)
    hooks = RecordHooks(network.eval())
    assert hooks.learn(lambda: network(states), RECORDS)
    network.kind, hooks.records = "flat", RECORDS
    said = r"sees \(21, 4\) of 3 records, expected records first"
    with pytest.raises(BadInput, match=said), hooks.on():
        network(states).sum().backward()


def test_an_odd_shape_is_no_layout() -> None:
    shapes = [(3, 7, 4), (7, 3, 4), (21, 4), (7, 4), (1, 7, 4), (3,)]
    assert [Layout.of(torch.Size(shape), 3) for shape in shapes] == [
        Layout.FIRST, Layout.SECOND, Layout.FLAT, None, None, None,
    ]  # fmt: skip


def opt(folder: Path) -> AdapterModel:
    family = next(each for each in FAMILIES if each.name == "OPT")
    settings = ModelConfig(base=str(family.save(folder)), task="causal-lm", max_length=24)
    lora = LoraConfig(rank=2, targets=("fc1", "fc2", "q_proj"))
    model = build_model(settings, lora, CausalLanguageModel(), 1)
    model.load(awake(model))
    return model


def test_words_of_all_records_in_one_row_are_each_their_records(tmp_path: Path) -> None:
    """OPT's fc1 and fc2: the hooks alone give as many gradients as there are words."""
    model, reference = opt(tmp_path), opt(tmp_path)
    gradients = PerSampleGradients(model)
    assert not gradients.one_by_one
    data, units = model.task.encode(records(6), model.tokenizer, 24), unit_groups(list("abcdef"))
    groups, drawn = ClipGroups.flat(model.spec, 0.05), np.arange(6, dtype=np.int64)
    found = gradients.clipped_sum(data, units, drawn, groups, 4096).vector
    expected = clipped_sum_by_ones(reference, data, units, drawn, groups)
    assert np.linalg.norm(found - expected) < 1e-6


def test_hooks_that_are_wrong_are_not_used(
    tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the reason: they are held against batches of one."""
    settings = ModelConfig(base=str(tiny_bert), pooling="mean", max_length=24)

    def built() -> AdapterModel:
        model = build_model(
            settings, LoraConfig(rank=2), SequenceClassification(("a", "b", "c")), 1
        )
        model.load(awake(model))
        return model

    right = built()
    assert not PerSampleGradients(built()).one_by_one
    take = step.PerSampleGradients._take
    monkeypatch.setattr(
        step.PerSampleGradients, "_take", lambda self, name: take(self, name).roll(1, dims=0)
    )
    wrong = PerSampleGradients(built())
    assert wrong.one_by_one
    data = right.task.encode(records(5), right.tokenizer, 24)
    groups, drawn = ClipGroups.flat(right.spec, 0.05), np.arange(4, dtype=np.int64)
    units = unit_groups(list("abbcd"))
    found = wrong.clipped_sum(data, units, drawn, groups, 64).vector
    expected = clipped_sum_by_ones(right, data, units, drawn, groups)
    assert np.linalg.norm(found - expected) < 1e-6


def test_a_layer_that_no_text_goes_through_is_named(tiny_bert: Path) -> None:
    settings = ModelConfig(base=str(tiny_bert), pooling="layers", pooled_layers=(0, 1))
    model = build_model(settings, LoraConfig(rank=2), SequenceClassification(("a", "b", "c")), 1)
    with pytest.raises(BadInput, match=r"layer\.1\..*found no gradient, expected a layer that"):
        PerSampleGradients(model)


def switch(folder: Path) -> AdapterModel:
    """A small random Switch Transformer, of whose two experts LoRA adapts one."""
    words, kind = tokenizer([*ENCODER, *WORDS], ENCODER), transformers.SwitchTransformersConfig
    sizes: dict[str, Any] = {
        "vocab_size": len(words), "d_model": 32, "d_kv": 8, "d_ff": 32, "num_heads": 4,
        "num_layers": 2, "num_decoder_layers": 2, "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1, "num_experts": 2, "expert_capacity": 64,
        "pad_token_id": 0, "eos_token_id": 3, "decoder_start_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(0)
    base: Any = transformers.SwitchTransformersForConditionalGeneration(kind(**sizes))
    torch.manual_seed(1)
    torch.nn.init.normal_(base.encoder.block[1].layer[1].mlp.router.classifier.weight)
    base.save_pretrained(folder)
    words.save_pretrained(folder)
    settings = ModelConfig(str(folder), task="seq2seq", pooling="default", max_length=24)
    lora = LoraConfig(rank=2, targets=("layer.1.mlp.experts.expert_0.wi",))
    model = build_model(settings, lora, SequenceToSequence(), 5)
    model.load(awake(model))
    return model


def test_a_record_whose_words_go_by_other_experts_adds_zero(tmp_path: Path) -> None:
    """Before, it ended the attempt: a coordinator that names an expert's layer was told of it."""
    model = switch(tmp_path)
    gradients = PerSampleGradients(model)
    texts = [f"w{number}" for number in range(12)]
    data = model.encoded(Records(texts, ["good"] * len(texts), None, None, {}, "test"))
    units, groups = unit_groups(None, len(texts)), ClipGroups.flat(model.spec, 1.0)
    each = [
        gradients.clipped_sum(data, units, np.array([row]), groups, 64) for row in range(len(texts))
    ]
    reached = [bool(total.vector.any()) for total in each]
    assert any(reached) and not all(reached)
    whole = gradients.clipped_sum(data, units, np.arange(len(texts)), groups, 64)
    assert whole.units == len(texts) and whole.nonfinite == 0
    assert np.allclose(whole.vector, sum(total.vector for total in each), atol=1e-12)
    batches = micro_batches(units, np.array([reached.index(False)]), data.lengths, 64)
    assert not gradients.plain_sum(data, batches).vector.any()
