"""Adapters from elsewhere: what was changed is named on one line, whatever was put there."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import transformers
from safetensors.numpy import load_file, save_file

from fedlora.common.base import base_digest, check_base
from fedlora.common.config import LoraConfig, ModelConfig
from fedlora.common.errors import BadInput
from fedlora.common.export import export_adapter, load_adapter
from fedlora.common.model import build_model
from fedlora.common.projection import PROJECTION
from fedlora.common.released import FILES, read_released
from fedlora.common.tasks import SequenceClassification

LABELS = ("a", "b")


@pytest.fixture(scope="module")
def exported(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An FFA adapter: its A is frozen, and drawn from the seed."""
    settings = ModelConfig(base=str(tiny_bert), pooling="mean")
    lora = LoraConfig(rank=2, variant="ffa")
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
    network = peft.PeftModel.from_pretrained(transformers.AutoModel.from_pretrained(tiny_bert), exported)
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
def test_whatever_a_tokenizer_reads_is_in_the_digest(tiny_bert: Path, tmp_path: Path, name: str) -> None:
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


def _overwrite(path: Path) -> None:
    tensors = load_file(path)
    for name in tensors:
        if ".lora_A." in name:
            tensors[name] = np.full_like(tensors[name], 5.0)
    save_file(tensors, path)
