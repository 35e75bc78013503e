"""Adapters from elsewhere: what was changed is named on one line, whatever was put there."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import peft
import pytest
import transformers
from safetensors.numpy import load_file, save_file

import fedlora.common.adapter
from fedlora.common.adapter.peft import export_adapter, load_adapter
from fedlora.common.adapter.released import FILES, published, read_released, write_description
from fedlora.common.config import task_names
from fedlora.common.config.schema import LoraConfig, ModelConfig
from fedlora.common.errors import BadInput
from fedlora.common.model.base import base_digest, check_base
from fedlora.common.model.network import build_model
from fedlora.common.model.projection import PROJECTION
from fedlora.common.tasks.causal_lm import CausalLanguageModel
from fedlora.common.tasks.classification import SequenceClassification
from fedlora.common.tasks.known import TASKS
from fedlora.common.tasks.media_classification import ImageClassification

LORA = LoraConfig(rank=2, targets=("query", "value"))

LABELS = ("a", "b")


@pytest.fixture(scope="module")
def exported(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An FFA adapter: its A is frozen, and drawn from the seed."""
    settings = ModelConfig(base=str(tiny_bert), pooling="mean")
    lora = replace(LORA, variant="ffa")
    model = build_model(settings, lora, SequenceClassification(LABELS), seed=7)
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    export_adapter(model, model.state(), settings, lora, 7, folder)
    return folder


def edited(name: str, **values: object) -> Callable[[Path], None]:
    def change(target: Path) -> None:
        path = target / name
        table: dict[str, Any] = json.loads(path.read_bytes())
        table.update(values)
        path.write_text(json.dumps({key: value for key, value in table.items() if value != "gone"}))

    return change


CHANGES = {
    "no r": edited("adapter_config.json", r="gone"),
    "r as text": edited("adapter_config.json", r="8"),
    "no targets": edited("adapter_config.json", target_modules=None),
    "layers as a number": edited("adapter_config.json", layers_to_transform=1),
    "another alpha": edited("adapter_config.json", lora_alpha=160),
    "a layer as a number": edited("adapter_config.json", layers_to_transform=0),
    "nested": lambda target: (target / "adapter_config.json").write_text("[" * 10**5),
    "nested in a key": lambda target: _nest(target / "adapter_config.json", "target_modules"),
    **{
        f"another {name}": edited("adapter_config.json", **{name: value})
        for name, value in {
            "use_rslora": True,
            "use_dora": True,
            "alpha_pattern": {"query": 4000},
            "rank_pattern": {"query": 4},
            "base_model_name_or_path": "another/model",
            "revision": "x",
            "modules_to_save": ["classifier"],
            "fan_in_fan_out": True,
            "exclude_modules": ["query"],
            "layers_pattern": "nothing",
            "bias": "all",
            "lora_bias": True,
            "task_type": "SEQ_CLS",
            "init_lora_weights": "pissa",
            "peft_version": "0.1\nx",
            "a_key_of_tomorrow": 1,
        }.items()
    },
    "max_length as text": edited("fedlora.json", max_length="x"),
    "base as a number": edited("fedlora.json", base=5),
    "seed below 0": edited("fedlora.json", seed=-1),
    "another seed": edited("fedlora.json", seed=8),
    "head_hidden below 0": edited("fedlora.json", head_hidden=-1),
    "labels that are lists": edited("fedlora.json", labels=[["a"], 2]),
    "a field more": edited("fedlora.json", more=1),
    "a list": lambda target: (target / "fedlora.json").write_text("[]"),
    "st-truncated": lambda target: _cut(target / "adapter_model.safetensors"),
    "another frozen A": lambda target: _overwrite(target / "adapter_model.safetensors"),
    "a tensor beside": lambda target: _add(
        target / "adapter_model.safetensors", "base_model.model.a.weight"
    ),
    "a head in PEFT's file": lambda target: _move_head(target),
    "a second head": lambda target: _add(
        target / "head.safetensors", "base_model.model.classifier.weight"
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_a_changed_adapter_is_refused_on_one_line(
    exported: Path, tmp_path: Path, change: Callable[[Path], object]
) -> None:
    target = tmp_path / "adapter"
    shutil.copytree(exported, target)
    load_adapter(target)
    change(target)
    with pytest.raises(BadInput) as caught:
        load_adapter(target)
    assert all("\n" not in fault and str(target) in fault for fault in caught.value.faults)


def test_what_is_exported_reads_without_the_network_and_names_no_folder_of_this_machine(
    exported: Path, tiny_bert: Path
) -> None:
    description, state = read_released(exported)
    assert state.digest == description.adapter_digest
    assert sorted(path.name for path in exported.iterdir()) == sorted(set(FILES) - {PROJECTION})
    assert str(tiny_bert) not in (exported / "adapter_config.json").read_text()
    network = peft.PeftModel.from_pretrained(
        transformers.AutoModel.from_pretrained(tiny_bert), exported
    )
    assert any(".lora_B." in name for name, _ in network.named_parameters())


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_a_changed_adapter_is_refused_without_the_network(
    exported: Path, tmp_path: Path, change: Callable[[Path], object]
) -> None:
    target = tmp_path / "adapter"
    shutil.copytree(exported, target)
    change(target)
    with pytest.raises(BadInput, match=re.escape(str(target))):
        read_released(target)


def test_a_spec_names_each_tensor_once(exported: Path, tmp_path: Path) -> None:
    target = shutil.copytree(exported, tmp_path / "adapter")
    rows = json.loads((target / "spec.json").read_text())
    (target / "spec.json").write_text(json.dumps([*rows, [rows[-1][0], [22, 32]]]))
    with pytest.raises(BadInput, match=r"spec\.json: found a name twice"):
        read_released(target)


def test_what_an_older_peft_does_not_know_may_be_missing(exported: Path, tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    shutil.copytree(exported, target)
    edited("adapter_config.json", use_qalora="gone", peft_version="gone", megatron_core="gone")(
        target
    )
    read_released(target)


def test_one_tensor_under_two_names_is_refused(tiny_bert: Path, tmp_path: Path) -> None:
    """A model's own head: of two keys for it, PEFT and `verify` could each read another."""
    settings, lora = ModelConfig(base=str(tiny_bert), pooling="default"), LORA
    model = build_model(settings, lora, SequenceClassification(LABELS), seed=7)
    export_adapter(model, model.state(), settings, lora, 7, tmp_path)
    read_released(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors, name = load_file(path), "base_model.model.classifier.weight"
    for other in (
        "base_model.model.encoder.classifier.weight",
        "classifier.weight",
        "head.classifier.weight",
    ):
        save_file({**tensors, other: tensors[name]}, path)
        with pytest.raises(BadInput, match=re.escape(other)):
            read_released(tmp_path)


# PEFT's, where it sets it
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
def test_what_peft_writes_for_other_bases_is_what_is_expected(
    tiny_llama: Path, tmp_path: Path
) -> None:
    """A head of two layers, whose names have one part more.

    And layers that store their weights transposed.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llama)
    roberta = transformers.RobertaConfig(
        vocab_size=90,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=80,
    )
    gpt2 = transformers.GPT2Config(vocab_size=90, n_embd=32, n_layer=1, n_head=2, n_positions=64)
    for task, base, targets in (
        (SequenceClassification(LABELS), transformers.RobertaModel(roberta), ("query",)),
        (CausalLanguageModel(), transformers.GPT2LMHeadModel(gpt2), ("c_attn",)),
    ):
        place = tmp_path / task.name
        tokenizer.save_pretrained(place / "base")
        base.save_pretrained(place / "base")
        settings, lora = (
            ModelConfig(base=str(place / "base"), task=task.name, pooling="default"),
            LoraConfig(2, targets=targets),
        )
        model = build_model(settings, lora, task, seed=7)
        export_adapter(model, model.state(), settings, lora, 7, place / "adapter")
        assert read_released(place / "adapter")[1] == load_adapter(place / "adapter").model.state()


@dataclass(frozen=True)
class Scans(ImageClassification):
    name: ClassVar[str] = "scans"


@dataclass(frozen=True)
class Letters(CausalLanguageModel):
    name: ClassVar[str] = "letters"


@dataclass(frozen=True)
class Notes(SequenceClassification):
    name: ClassVar[str] = "notes"


@pytest.mark.parametrize("kind", [Scans, Letters, Notes])
def test_a_task_of_ones_own_is_loaded_as_it_was_exported(
    kind: Any, tiny_vit: Path, tiny_llama: Path, tiny_bert: Path, tmp_path: Path
) -> None:
    """With the base's own head, whatever it reads: by whoever has not the task too."""
    base = {Scans: tiny_vit, Letters: tiny_llama, Notes: tiny_bert}[kind]
    task = kind(()) if kind is Letters else kind(LABELS)
    settings = ModelConfig(base=str(base), task=task.name, pooling="default", max_length=16)
    model = build_model(settings, LoraConfig(rank=2), task, seed=7)
    export_adapter(model, model.state(), settings, model.lora, 7, tmp_path)
    assert read_released(tmp_path)[1] == model.state()
    with pytest.raises(BadInput, match=f'task = "{task.name}": expected one of'):
        load_adapter(tmp_path)
    with pytest.MonkeyPatch.context() as installed:
        installed.setitem(TASKS, task.name, kind)
        installed.setattr(task_names, "_added", {task.name})
        assert load_adapter(tmp_path).model.state() == model.state()
    path = tmp_path / "adapter_config.json"
    other = json.loads(path.read_text()) | {"task_type": "TOKEN_CLS"}
    path.write_text(json.dumps(other))
    with pytest.raises(BadInput, match=r"config\.json (modules_to_save|task_type): found"):
        read_released(tmp_path)


def test_a_base_in_a_folder_is_published_by_its_name_alone(
    exported: Path, tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    description, state = read_released(exported)
    told = published(exported, description)
    assert description.base == str(tiny_bert) and told.base == tiny_bert.name
    target = tmp_path / "adapter"
    shutil.copytree(exported, target)
    write_description(target, told, state.spec)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match=r"no folder here, expected base= with one") as caught:
        load_adapter(target)
    assert str(caught.value).startswith(f"{target / 'fedlora.json'} base: found '{tiny_bert.name}'")
    assert load_adapter(target, base=str(tiny_bert)).model.state() == state
    # a name, as a hub's is
    edited("adapter_config.json", base_model_name_or_path=told.base)(target)
    assert published(target, told) == told


@pytest.mark.parametrize("text", ["", "[]", "[[1, [2]]]", '[["a", [-1]]]', '[["a"]]', "[" * 10**5])
def test_a_changed_spec_is_refused(exported: Path, tmp_path: Path, text: str) -> None:
    target = tmp_path / "adapter"
    shutil.copytree(exported, target)
    (target / "spec.json").write_text(text)
    with pytest.raises(BadInput, match=re.escape(str(target))):
        read_released(target)


@pytest.mark.parametrize(
    "name", ["vocab.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"]
)
def test_whatever_a_tokenizer_reads_is_in_the_digest(
    tiny_bert: Path, tmp_path: Path, name: str
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_bert, folder)
    (folder / name).write_text("{}")
    before = base_digest(folder)
    (folder / name).write_text('{"a": 1}')
    assert base_digest(folder) != before


def test_a_base_with_an_adapter_in_it_is_refused(tiny_bert: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_bert, folder)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(BadInput, match="expected a base without an adapter"):
        check_base(folder)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def _nest(path: Path, name: str) -> None:
    table = json.loads(path.read_bytes()) | {name: 0}
    path.write_text(json.dumps(table).replace(f'"{name}": 0', f'"{name}": {"[" * 800}{"]" * 800}'))


def _add(path: Path, name: str) -> None:
    save_file({**load_file(path), name: np.ones((2, 2), np.float32)}, path)


def _move_head(target: Path) -> None:
    weights, head = target / "adapter_model.safetensors", target / "head.safetensors"
    save_file(load_file(weights) | load_file(head), weights)
    head.unlink()


def _overwrite(path: Path) -> None:
    tensors = load_file(path)
    for name in tensors:
        if ".lora_A." in name:
            tensors[name] = np.full_like(tensors[name], 5.0)
    save_file(tensors, path)


def test_the_room_shows_load_adapter_and_imports_torch_only_then() -> None:
    assert fedlora.common.adapter.load_adapter is load_adapter
    with pytest.raises(AttributeError, match="no attribute 'load_adaptor'"):
        fedlora.common.adapter.load_adaptor  # noqa: B018
    asked = "import sys, fedlora.common.adapter as a; print('torch' in sys.modules, end=' ');"
    words = [sys.executable, "-c", asked + "a.load_adapter; print('torch' in sys.modules)"]
    found = subprocess.run(words, capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False", "True"]
