"""A base's files: what is hashed is what is loaded, and nothing in them runs or is unpickled."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from fedlora.common.config.schema import LoraConfig, ModelConfig
from fedlora.common.errors import BadInput
from fedlora.common.model import network
from fedlora.common.model.base import base_digest, check_base
from fedlora.common.tasks.classification import SequenceClassification


@pytest.fixture
def base(tiny_bert: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bert, tmp_path / "base"))


@pytest.fixture
def sharded(base: Path) -> Path:
    """The same base in several files with an index."""
    model = transformers.BertModel.from_pretrained(base)
    (base / "model.safetensors").unlink()
    model.save_pretrained(base, max_shard_size="10KB")
    assert len(list(base.glob("*.safetensors"))) > 2
    return base


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def point_to(name: str) -> Callable[[Path], None]:
    """The first tensor of the index lies in `name`."""

    def change(folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        table = json.loads(index.read_text())
        first = next(iter(table["weight_map"]))
        table["weight_map"][first] = name
        index.write_text(json.dumps(table))

    return change


def build(folder: Path) -> network.AdapterModel:
    settings = ModelConfig(base=str(folder), pooling="mean", max_length=16)
    return network.build_model(settings, LoraConfig(rank=2), SequenceClassification(("a", "b")), 1)


@pytest.mark.parametrize(
    "name", ["../base/model-00001-of-00004.safetensors", "sub/x.safetensors", "/etc/x", "gone", ""]
)
def test_an_index_names_files_beside_it_only(sharded: Path, name: str) -> None:
    (sharded / "sub").mkdir()
    save_file({"x": torch.zeros(1)}, sharded / "sub" / "x.safetensors")
    point_to(name)(sharded)
    with pytest.raises(BadInput, match=r"index.json weight_map: found .*, expected names of"):
        check_base(sharded)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', "[" * 100_000])
def test_an_index_that_is_none_is_refused(sharded: Path, text: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(BadInput, match="found no weight_map"):
        check_base(sharded)


@pytest.mark.parametrize("name", ["adapter_model.bin", "../x.safetensors", "no.safetensors", 3])
def test_a_configuration_can_not_name_other_weights(base: Path, name: object) -> None:
    edit(base / "config.json", transformers_weights=name)
    with pytest.raises(BadInput, match="transformers_weights: found"):
        check_base(base)
    edit(base / "config.json", transformers_weights="model.safetensors")
    check_base(base)


@pytest.mark.parametrize("where", ["", "text_config"])
def test_a_quantised_base_is_refused_by_its_method(base: Path, where: str) -> None:
    quantised = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    edit(base / "config.json", **({where: quantised} if where else quantised))
    with pytest.raises(BadInput, match="quantised by gptq, expected float ones"):
        check_base(base)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_quantised_weights_without_a_word_of_it_are_refused(base: Path, dtype: torch.dtype) -> None:
    tensors = load_file(base / "model.safetensors")
    name = "encoder.layer.0.attention.self.query.weight"
    save_file({**tensors, name: tensors[name].to(dtype)}, base / "model.safetensors")
    with pytest.raises(BadInput, match=f"{name}: found .8"):
        check_base(base)


def test_a_distributed_checkpoint_is_never_opened(base: Path) -> None:
    """Beside such a file transformers 5 loads an index that is pickled."""
    shutil.copy(base / "model.safetensors", base / "shard-00000-model-00001-of-00001.safetensors")
    with pytest.raises(BadInput, match="whose index is pickled"):
        check_base(base)


@pytest.mark.parametrize(
    "name", ["bpe.codes", "source.spm", "x.tokenizer", "additional_chat_templates/rag.jinja"]
)
def test_whatever_else_a_tokenizer_reads_is_in_the_digest(base: Path, name: str) -> None:
    before = base_digest(base)
    (base / name).parent.mkdir(exist_ok=True)
    (base / name).write_text("a")
    assert base_digest(base) != before


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("fast_tokenizer_files", ["tokenizer.json", "../outside/tokenizer.4.0.0.json"]),
        ("fast_tokenizer_files", ["sub/tokenizer.4.0.0.json"]),
        ("fast_tokenizer_files", ["gone/tokenizer.4.0.0.json"]),
        ("fast_tokenizer_files", [3]),
        ("fast_tokenizer_files", "../outside/tokenizer.4.0.0.json"),
        ("init_inputs", ["../outside/vocab.txt"]),
    ],
)
def test_a_tokenizer_can_not_come_from_elsewhere(base: Path, key: str, value: object) -> None:
    """transformers opens such a file wherever it lies: the digest never saw it."""
    for folder in (base / "sub", base.parent / "outside"):
        folder.mkdir()
        shutil.copy(base / "tokenizer.json", folder / "tokenizer.4.0.0.json")
    edit(base / "tokenizer_config.json", **{key: value})
    with pytest.raises(BadInput, match=f"tokenizer_config.json {key}: found "):
        check_base(base)


@pytest.mark.parametrize(
    ("file", "table", "said"),
    [
        ("preprocessor_config.json", {"class_info_file": "ade20k.json"}, "class_info_file: found"),
        ("preprocessor_config.json", {"repo_path": "shi-labs/demo"}, "repo_path: found"),
        ("preprocessor_config.json", {"new": [{"x": "../x.json"}]}, "x: found '../x.json'"),
        ("preprocessor_config.json", {"a": "https://there/x"}, "a: found"),
        ("processor_config.json", {"image_processor": {"x": "~/x"}}, "x: found '~/x'"),
        ("tokenizer_config.json", {"sp_model_kwargs": {"model_file": "x"}}, "model_file: found"),
        ("tokenizer_config.json", {"mecab_kwargs": {"mecab_option": "-d x"}}, "option: found"),
        ("config.json", {"configuration_files": ["config.4.0.0.json"]}, "_files: found"),
        ("config.json", {"vision": {"backbone": "microsoft/resnet-50"}}, "backbone: found"),
    ],
)
def test_nothing_in_a_configuration_leads_out_of_the_folder(
    base: Path, file: str, table: dict[str, object], said: str
) -> None:
    """Whatever class would read it: a processor's names are those of any version."""
    plain = {"_name_or_path": "google/vit", "image_processor_type": "ViTImageProcessor", "size": 3}
    before = (base / file).read_text() if (base / file).is_file() else json.dumps(plain)
    (base / file).write_text(before)
    if file == "tokenizer_config.json":  # transformers opens nothing by these
        edit(base / file, chat_template="{{ a }} </s>", vocab_file="/elsewhere/vocab.txt")
    check_base(base)
    edit(base / file, **table)
    with pytest.raises(BadInput, match=f"{file} .*{said}") as caught:
        check_base(base)
    assert len(caught.value.faults) == 1 and "\n" not in caught.value.faults[0]


def test_a_tokenizer_for_newer_versions_lies_beside_the_others(base: Path) -> None:
    shutil.copy(base / "tokenizer.json", base / "tokenizer.4.0.0.json")
    edit(base / "tokenizer_config.json", fast_tokenizer_files=["tokenizer.4.0.0.json"])
    check_base(base)


def test_a_base_that_changes_while_it_is_read_is_refused(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The digest is taken before: of what is loaded, it says nothing then."""
    load = network.__dict__["load_reader"]

    def meanwhile(folder: Path, medium: None, most: int) -> object:
        tensors = load_file(folder / "model.safetensors")
        save_file({name: value + 1 for name, value in tensors.items()}, folder / "new")
        (folder / "new").replace(folder / "model.safetensors")
        return load(folder, medium, most)

    monkeypatch.setattr(network, "load_reader", meanwhile)
    with pytest.raises(BadInput, match="changed while they were read"):
        build(base)
