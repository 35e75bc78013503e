"""What is hashed is what is loaded: no file of a base or a release is opened that no digest saw.

Before: an index of weights could name `sub/w.safetensors` or `../outside.safetensors`, and was
followed. Here every file that Python opens while a base or an adapter is loaded is held against
what the digests cover, with decoys in every place that a library of models is known to look at.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedlora.common.adapter.peft import export_adapter, load_adapter
from fedlora.common.config.schema import LoraConfig, ModelConfig
from fedlora.common.errors import BadInput
from fedlora.common.model import loading
from fedlora.common.model.base import base_digest
from fedlora.common.model.loading import load_backbone
from fedlora.common.model.network import build_model
from fedlora.common.model.tokenizer import load_tokenizer
from fedlora.common.tasks.classification import SequenceClassification
from fedlora.common.tasks.media_classification import ImageClassification

DECOYS = (
    *("added_tokens.json", "special_tokens_map.json", "chat_template.json", "chat_template.jinja"),
    *("preprocessor_config.json", "processor_config.json", "generation_config.json"),
    *("additional_chat_templates/rag.jinja", "sub/config.json", "sub/tokenizer.json"),
    *("pytorch_model.bin", "model.safetensors.index.json.bak", "custom.py", "tokenizer.py"),
)
_opened: list[Path] | None = None


def _note(event: str, given: tuple[object, ...]) -> None:
    if _opened is not None and event == "open" and isinstance(given[0], str | Path):
        _opened.append(Path(given[0]))


sys.addaudithook(_note)  # it can't be taken away again, and costs nothing while it is not asked


@contextmanager
def opened(folder: Path) -> Iterator[set[str]]:
    """Names of the files under `folder` that Python opens meanwhile."""
    global _opened
    names: set[str] = set()
    _opened = []
    try:
        yield names
    finally:
        inside = (each.resolve() for each in _opened if each.resolve().is_relative_to(folder))
        names.update(str(each.relative_to(folder)) for each in inside if each.is_file())
        _opened = None


def covered(folder: Path) -> set[str]:
    """The files whose change changes the digest, each tried."""
    found = set()
    before = base_digest(folder)
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        kept = path.read_bytes()
        path.write_bytes(kept + b" ")
        if base_digest(folder) != before:
            found.add(str(path.relative_to(folder)))
        path.write_bytes(kept)
    return found


@pytest.fixture
def base(tiny_bert: Path, tmp_path: Path) -> Path:
    """A base with decoys beside it, each what an empty file of its kind holds."""
    folder = Path(shutil.copytree(tiny_bert, tmp_path.resolve() / "base"))
    for name in DECOYS:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        if not path.exists():
            path.write_text("{}" if path.suffix == ".json" else "")
    return folder


def test_whatever_is_opened_of_a_base_is_in_its_digest(base: Path) -> None:
    with opened(base) as names:
        load_tokenizer(base)
        load_backbone(base)
    assert {"config.json", "tokenizer_config.json"} <= names, "nothing was watched"
    assert names <= covered(base), names - covered(base)


def test_a_processor_opens_nothing_outside_of_its_base(tiny_vit: Path, tmp_path: Path) -> None:
    """Before: OneFormer's opened the file that its configuration names, or fetched it."""
    folder, outside = tmp_path.resolve() / "vit", tmp_path.resolve() / "outside"
    shutil.copytree(tiny_vit, folder)
    outside.mkdir()
    (outside / "classes.json").write_text('{"0": {"name": "a", "isthing": 1}}')
    table = json.loads((folder / "preprocessor_config.json").read_text())
    table |= {"image_processor_type": "OneFormerImageProcessor", "repo_path": str(outside)}
    table["class_info_file"] = "classes.json"
    (folder / "preprocessor_config.json").write_text(json.dumps(table))
    settings, task = ModelConfig(base=str(folder), pooling="mean"), ImageClassification(("a", "b"))
    with opened(outside) as names, pytest.raises(BadInput, match="expected no file, folder or"):
        build_model(replace(settings, task=task.name), LoraConfig(rank=2), task, seed=1)
    assert not names


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_write_into_the_weights_after_a_model_is_built_changes_nothing(
    base: Path, dtype: str
) -> None:
    """Before: what was loaded was a mapping of the file, and the digest that of what was there."""
    file = base / "model.safetensors"
    stored = torch.float32 if dtype == "float32" else torch.bfloat16
    weights = {name: value.to(stored) for name, value in load_file(file).items()}
    save_file(weights, file, {"format": "pt"})
    settings = ModelConfig(base=str(base), pooling="mean", dtype=dtype)
    lora = LoraConfig(rank=2, targets=("query",))
    network = build_model(settings, lora, SequenceClassification(("a", "b")), seed=1).network
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with file.open("r+b") as stream:
        begin = 8 + struct.unpack("<Q", stream.read(8))[0]
        stream.seek(begin)
        stream.write(b"\0" * (file.stat().st_size - begin))
    after = network.state_dict()
    assert [name for name, value in before.items() if not torch.equal(after[name], value)] == []


def test_files_that_change_while_they_are_copied_are_refused(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In place, and with the time of change put back: no stamp but the system's own shows it."""
    file, given = base / "model.safetensors", loading.held_in_memory

    def rewriting(network: torch.nn.Module) -> None:
        given(network)
        at, data = file.stat(), file.read_bytes()
        with file.open("r+b") as stream:
            stream.write(data)
        os.utime(file, ns=(at.st_atime_ns, at.st_mtime_ns))

    monkeypatch.setattr(loading, "held_in_memory", rewriting)
    settings, lora = (
        ModelConfig(base=str(base), pooling="mean"),
        LoraConfig(rank=2, targets=("query",)),
    )
    with pytest.raises(BadInput, match="changed while they were read"):
        build_model(settings, lora, SequenceClassification(("a", "b")), seed=1)


def test_whatever_is_opened_of_a_release_is_held_against_it(base: Path, tmp_path: Path) -> None:
    """Each file that is opened is one whose change is refused."""
    settings, lora = (
        ModelConfig(base=str(base), pooling="mean"),
        LoraConfig(rank=2, targets=("query",)),
    )
    model = build_model(settings, lora, SequenceClassification(("a", "b")), seed=7)
    folder = tmp_path.resolve() / "adapter"
    export_adapter(model, model.state(), settings, lora, 7, folder)
    for name in DECOYS:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    with opened(folder) as names:
        load_adapter(folder)
    assert {"adapter_config.json", "fedlora.json", "spec.json"} <= names
    assert not names & set(DECOYS), "a decoy was read"
    for name in names:
        kept = (folder / name).read_bytes()
        (folder / name).write_bytes(kept.replace(b"query", b"value").replace(b"a", b"b", 5)[:-2])
        with pytest.raises(BadInput):
            load_adapter(folder)
        (folder / name).write_bytes(kept)
