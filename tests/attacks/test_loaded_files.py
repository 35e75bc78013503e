"""What is hashed is what is loaded: no file of a base or a release is opened that no digest saw.

Before: an index of weights could name `sub/w.safetensors` or `../outside.safetensors`, and was
followed. Here every file that Python opens while a base or an adapter is loaded is held against
what the digests cover, with decoys in every place that a library of models is known to look at.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedlora.common.adapter.peft import export_adapter, load_adapter
from fedlora.common.config.schema import LoraConfig, ModelConfig
from fedlora.common.errors import BadInput
from fedlora.common.model.base import base_digest
from fedlora.common.model.loading import load_backbone
from fedlora.common.model.network import build_model
from fedlora.common.model.tokenizer import load_tokenizer
from fedlora.common.tasks.classification import SequenceClassification

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
