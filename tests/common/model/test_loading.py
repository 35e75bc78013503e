"""Bases as people have them: other kinds of floats, parts, old names; and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from fedlora.common.config.schema import LoraConfig, ModelConfig
from fedlora.common.errors import BadInput
from fedlora.common.model.dropout import switch_dropout_off, without_dropout
from fedlora.common.model.network import AdapterModel, build_model
from fedlora.common.model.pooling import OwnHead
from fedlora.common.tasks.causal_lm import CausalLanguageModel
from fedlora.common.tasks.classification import SequenceClassification
from fedlora.simulations.benchmarks.families import FAMILIES
from fedlora.simulations.benchmarks.models import awake

TASK = SequenceClassification(("a", "b"))


def classifier(base: Path, pooling: str = "mean") -> AdapterModel:
    settings = ModelConfig(base=str(base), pooling=pooling, max_length=24)
    model = build_model(settings, LoraConfig(rank=2, targets=("auto",)), TASK, 5)
    model.load(awake(model))
    return model


def answers(model: AdapterModel) -> torch.Tensor:
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    with torch.no_grad():
        logits: torch.Tensor = model.network(ids, mask)
    return logits


def copied(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


def test_weights_in_parts_are_the_same_network(tiny_bert: Path, tmp_path: Path) -> None:
    base = copied(tiny_bert, tmp_path / "base")
    whole = transformers.AutoModel.from_pretrained(tiny_bert)
    (base / "model.safetensors").unlink()
    whole.save_pretrained(base, max_shard_size="20KB")
    assert len(list(base.glob("*.safetensors"))) > 2
    assert torch.equal(answers(classifier(base)), answers(classifier(tiny_bert)))


def test_bfloat16_weights_are_read_as_float32(tiny_bert: Path, tmp_path: Path) -> None:
    base = copied(tiny_bert, tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    save_file(
        {name: value.bfloat16() for name, value in weights.items()},
        base / "model.safetensors",
        {"format": "pt"},
    )
    table = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**table, "dtype": "bfloat16"}))
    model = classifier(base)
    assert {p.dtype for p in model.network.parameters()} == {torch.float32}
    assert torch.allclose(answers(model), answers(classifier(tiny_bert)), atol=0.3)


def test_old_names_of_weights_are_read(tiny_bert: Path, tmp_path: Path) -> None:
    """As checkpoints of 2018 have them: γ and β, and a prefix for the transformer."""
    base = copied(tiny_bert, tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    old = {
        "bert."
        + n.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): v
        for n, v in weights.items()
    }
    save_file(old, base / "model.safetensors", {"format": "pt"})
    assert torch.equal(answers(classifier(base)), answers(classifier(tiny_bert)))


def edited(folder: Path, target: Path, **changes: Any) -> Path:
    base = copied(folder, target)
    table = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**table, **changes}))
    return base


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "nothing"}, "transformers can't read it"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantised"),
        ({"is_encoder_decoder": True}, "found an encoder-decoder"),
        (
            {"num_hidden_layers": 3},
            r"found no weights in the files for encoder.layer.2.* \(16 such",
        ),
        ({"intermediate_size": 32}, "found no weights of the right shape for encoder.layer.0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_base_that_can_not_serve_is_refused_in_one_line(
    tiny_bert: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(BadInput, match=said) as caught:
        classifier(edited(tiny_bert, tmp_path / "base", **changes))
    assert len(str(caught.value).splitlines()) == 1


def test_a_base_with_another_number_of_labels_gets_a_new_head(
    tiny_bert: Path, tmp_path: Path
) -> None:
    base = copied(tiny_bert, tmp_path / "base")
    tuned = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=6)
    tuned.save_pretrained(base)
    model = classifier(base, "default")
    assert answers(model).shape == (2, 2)
    assert torch.equal(answers(model), answers(classifier(base, "default")))


def test_a_classifier_has_no_language_model(tiny_bert: Path) -> None:
    base = FAMILIES[3]
    assert base.name == "DistilBERT"
    with pytest.raises(BadInput, match="has no causal language model"):
        folder = base.save(tiny_bert.parent / "distilbert")
        settings = ModelConfig(base=str(folder), pooling="default", task="causal-lm")
        build_model(settings, LoraConfig(targets=("query", "value")), CausalLanguageModel(), 1)


def test_the_fused_attention_comes_first_and_an_unknown_one_is_refused(tiny_bert: Path) -> None:
    model = classifier(tiny_bert)
    assert model.attentions == ("sdpa", "eager")
    fused = answers(model)
    model.set_attention("eager")
    assert torch.allclose(answers(model), fused, atol=1e-5)
    with pytest.raises(BadInput, match="attention = 'flash': expected auto or one of sdpa, eager"):
        model.set_attention("flash")


def test_a_class_without_the_fused_attention_has_the_other(tmp_path: Path) -> None:
    family = next(each for each in FAMILIES if each.name == "MPNet")
    model = classifier(family.save(tmp_path))
    assert model.attentions == ("eager",)
    model.set_attention("eager")
    with pytest.raises(BadInput, match="attention = 'sdpa': expected auto or one of eager"):
        model.set_attention("sdpa")


def test_a_decoder_classifies_its_last_word_whatever_the_words_ids(tiny_llama: Path) -> None:
    """Where there is no word for padding, word 0 is one like any other: it may be the last."""
    model = classifier(tiny_llama, "default")
    assert isinstance(model.network, OwnHead)
    ends_in_0 = torch.tensor([[5, 6, 0]])
    alone = model.network(ends_in_0, torch.ones_like(ends_in_0))
    padded = torch.tensor([[5, 6, 0, 0, 0], [1, 2, 3, 4, 5]])
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    assert torch.allclose(model.network(padded, mask)[:1], alone, atol=1e-6)
    longer = torch.tensor([[5, 6, 0, 7]])
    assert not torch.allclose(model.network(longer, torch.ones_like(longer)), alone, atol=1e-2)
    with pytest.raises(BadInput, match="expected pooling = mean or layers"):
        _ = model.head


def test_dropout_is_off_by_whatever_name(tiny_bert: Path) -> None:
    config = transformers.BartConfig(
        dropout=0.1, attention_dropout=0.2, activation_dropout=0.3, encoder_layerdrop=0.4
    )
    config.part = transformers.MixtralConfig(router_jitter_noise=0.5)
    without_dropout(config)
    chances = {**vars(config), **vars(config.part)}
    left = {n: v for n, v in chances.items() if ("drop" in n or "jitter" in n) and v}
    assert not left
    layer: Any = torch.nn.TransformerEncoderLayer(8, 2, dropout=0.1)
    layer.drop_path, layer.tuned = 0.2, 0.3
    switch_dropout_off(layer)
    assert (layer.drop_path, layer.tuned) == (0, 0.3)
    assert layer.dropout.p == layer.self_attn.dropout == 0
