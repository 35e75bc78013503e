"""The merged model gives the adapter's answers without PEFT."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from fedlora.common.adapter.merged import write_merged
from fedlora.common.adapter.peft import LoadedAdapter, export_adapter, load_adapter
from fedlora.common.config.schema import LoraConfig, ModelConfig
from fedlora.common.errors import BadInput
from fedlora.common.model.network import build_model
from fedlora.common.model.state import AdapterState
from fedlora.common.tasks.causal_lm import CausalLanguageModel
from fedlora.common.tasks.classification import SequenceClassification
from fedlora.common.tasks.task import Task

IDS = torch.tensor([[2, 5, 9, 11], [2, 6, 7, 30]])
CASES: dict[str, tuple[str, str, Task]] = {
    "a language model": ("llama", "default", CausalLanguageModel()),
    "a classifier of the base's own": ("bert", "default", SequenceClassification(("a", "b"))),
    "a head of ours": ("bert", "mean", SequenceClassification(("a", "b"))),
}


def exported(base: Path, pooling: str, task: Task, folder: Path) -> LoadedAdapter:
    """An adapter whose every coordinate is far from 0."""
    settings = ModelConfig(base=str(base), pooling=pooling, task=task.name)
    model = build_model(settings, LoraConfig(rank=2), task, seed=3)
    values = np.random.default_rng(0).normal(0, 0.3, model.spec.size)
    state = AdapterState(model.spec, values.astype(np.float32))
    export_adapter(model, state, settings, model.lora, 3, folder)
    return load_adapter(folder)


@pytest.mark.parametrize("case", CASES)
def test_the_merged_model_answers_as_the_adapter_does(
    case: str, tiny_bert: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    kind, pooling, task = CASES[case]
    base = tiny_bert if kind == "bert" else tiny_llama
    adapter = exported(base, pooling, task, tmp_path / "adapter")
    write_merged(adapter, tmp_path / "adapter", tmp_path / "merged", "float32")
    loader = {
        "a language model": transformers.AutoModelForCausalLM,
        "a classifier of the base's own": transformers.AutoModelForSequenceClassification,
        "a head of ours": transformers.AutoModel,
    }[case]
    merged = loader.from_pretrained(tmp_path / "merged").eval()
    plain = loader.from_pretrained(base).eval()
    mask = torch.ones_like(IDS)
    with torch.no_grad():
        found, before, expected = (
            network(input_ids=IDS, attention_mask=mask)[0]
            for network in (merged, plain, adapter.model.network.backbone)
        )
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, before, atol=1e-2)
    # what lies beside is there where it is needed
    assert (tmp_path / "merged" / "head.safetensors").is_file() is (case == "a head of ours")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "merged").vocab_size > 10


def test_what_can_not_be_merged_is_said_before_anything_is_written(
    tiny_bert: Path, tmp_path: Path
) -> None:
    adapter = exported(tiny_bert, "mean", CASES["a head of ours"][2], tmp_path / "adapter")
    with pytest.raises(BadInput, match="--dtype int4: expected one of float32"):
        write_merged(adapter, tmp_path / "adapter", tmp_path / "new", "int4")
    with pytest.raises(BadInput, match="found files, expected a new folder"):
        write_merged(adapter, tmp_path / "adapter", tmp_path / "adapter", "float32")
    assert not (tmp_path / "new").exists()


def test_a_type_is_what_lies_on_the_disk(tiny_llama: Path, tmp_path: Path) -> None:
    task = CausalLanguageModel()
    adapter = exported(tiny_llama, "default", task, tmp_path / "adapter")
    write_merged(adapter, tmp_path / "adapter", tmp_path / "merged", "bfloat16")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert {each.dtype for each in merged.parameters()} == {torch.bfloat16}
