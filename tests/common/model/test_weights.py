"""What the files hold is what the network is; whatever would be drawn at random is refused."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from fedlora.common.adapter.peft import export_adapter, load_adapter
from fedlora.common.adapter.released import read_released
from fedlora.common.config.schema import LoraConfig, ModelConfig
from fedlora.common.data.records import Records
from fedlora.common.errors import BadInput
from fedlora.common.model.network import AdapterModel, build_model
from fedlora.common.model.state import AdapterState
from fedlora.common.tasks.causal_lm import CausalLanguageModel
from fedlora.common.tasks.classification import SequenceClassification

LABELS = ("a", "b")
QUERY = "encoder.layer.0.attention.self.query.weight"


@pytest.fixture
def base(tiny_bert: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bert, tmp_path / "base"))


def rename(folder: Path, names: Mapping[str, str]) -> None:
    """Give tensors other names; "" takes one away."""
    path = folder / "model.safetensors"
    tensors = {names.get(name, name): value for name, value in load_file(path).items()}
    tensors.pop("", None)
    save_file(tensors, path, {"format": "pt"})


def names_of(folder: Path) -> list[str]:
    return list(load_file(folder / "model.safetensors"))


def build(
    folder: Path, pooling: str = "mean", targets: tuple[str, ...] = ("query", "value")
) -> AdapterModel:
    settings = ModelConfig(base=str(folder), pooling=pooling, max_length=16)
    return build_model(settings, LoraConfig(2, targets=targets), SequenceClassification(LABELS), 1)


def test_one_missing_tensor_is_named(base: Path) -> None:
    rename(base, {QUERY: ""})
    with pytest.raises(BadInput, match=rf"in the files for {QUERY} \(1 such\), expected"):
        build(base)


def test_names_with_a_prefix_are_no_weights(base: Path) -> None:
    """Case 03: transformers finds none of them, and the whole base is random."""
    rename(base, {name: f"module.{name}" for name in names_of(base)})
    with pytest.raises(BadInput, match=r"\(37 such\), .*the files' names begin with 'module\.'"):
        build(base)


@pytest.mark.parametrize("pooling", ["mean", "layers", "default"])
def test_a_pooler_must_be_there_only_where_it_is_read(base: Path, pooling: str) -> None:
    """Case 02: BERT as a masked language model is saved, without one."""
    rename(base, {name: "" for name in names_of(base) if name.startswith("pooler.")})
    if pooling != "default":
        build(base, pooling)
        return
    with pytest.raises(BadInput, match=r'bert\.pooler.*pooling = "mean" or "layers"'):
        build(base, pooling)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_no_number_is_refused(base: Path, value: float) -> None:
    """Case 21: in a row of the embedding that no public text reads."""
    tensors = load_file(base / "model.safetensors")
    tensors["embeddings.word_embeddings.weight"][70, 3] = value
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadInput, match=r"not finite in embeddings\.word_embeddings\.weight"):
        build(base)


def test_a_weight_of_another_shape_is_named(base: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    save_file({**tensors, QUERY: torch.zeros(4, 4)}, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadInput, match=f"no weights of the right shape for {QUERY}"):
        build(base)


def test_a_language_model_s_head_is_frozen_and_must_be_there(
    tiny_llama: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "base"))
    rename(folder, {"lm_head.weight": ""})
    settings = ModelConfig(base=str(folder), pooling="default", task="causal-lm", max_length=16)
    with pytest.raises(BadInput, match=r"no weights in the files for lm_head\.weight"):
        build_model(settings, LoraConfig(2, targets=("q_proj",)), CausalLanguageModel(), 1)


@pytest.fixture
def deberta(tiny_bert: Path, tmp_path: Path) -> Path:
    """Whose classifier has a pooler of its own, above the transformer."""
    folder = tmp_path / "deberta"
    shutil.copytree(tiny_bert, folder)
    config = transformers.DebertaV2Config(
        vocab_size=76,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    transformers.DebertaV2Model(config).save_pretrained(folder)
    return folder


def test_a_head_that_no_file_has_is_trained_whole(deberta: Path, tmp_path: Path) -> None:
    """Case 13: else its frozen part would be another one in each process."""
    targets = ("query_proj", "value_proj")
    one, two = (build(deberta, "default", targets) for _ in range(2))
    named = one.state().named()
    assert {name for name in named if name.startswith("head.")} == {
        f"head.{part}.{kind}"
        for part in ("pooler.dense", "classifier")
        for kind in ("weight", "bias")
    }
    assert named["head.pooler.dense.weight"].any() and not named["head.classifier.weight"].any()
    assert one.state() == two.state()
    with pytest.raises(BadInput, match=r"\[training\] head_rounds"):
        _ = one.head  # a head phase trains one linear layer
    values = np.random.default_rng(1).normal(0, 0.3, one.spec.size).astype(np.float32)
    state = AdapterState(one.spec, values)
    settings = ModelConfig(base=str(deberta), pooling="default", max_length=16)
    out = tmp_path / "adapter"
    export_adapter(one, state, settings, LoraConfig(2, targets=targets), 1, out)
    assert read_released(out)[1] == state
    assert load_adapter(out).model.state() == state
    alone = peft.PeftModel.from_pretrained(
        transformers.AutoModelForSequenceClassification.from_pretrained(deberta, num_labels=2), out
    ).eval()
    texts = ["w1 good w3", "w2"]
    records = Records(texts, None, np.zeros(2, dtype=np.int64), None, {}, "test")
    batch = one.task.encode(records, one.tokenizer, 16).batch(np.arange(2), one.pad, one.device)
    with torch.no_grad():
        found = alone(input_ids=batch.ids, attention_mask=batch.mask).logits
        assert torch.allclose(found, one.logits(batch), atol=1e-5)


def test_a_head_that_the_files_have_stays_frozen(deberta: Path) -> None:
    """A pooler that somebody trained is part of the base."""
    config = transformers.DebertaV2Config.from_pretrained(deberta)
    torch.manual_seed(2)
    transformers.DebertaV2ForSequenceClassification(config).save_pretrained(deberta)
    model = build(deberta, "default", ("query_proj",))
    assert not any("pooler" in tensor.name for tensor in model.spec.tensors)
