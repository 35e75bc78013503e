"""A tokenizer that is missing, empty, another model's, or left-sided never trains silently."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fedlora.common.config.schema import LoraConfig, ModelConfig
from fedlora.common.errors import BadInput
from fedlora.common.model.network import AdapterModel, build_model
from fedlora.common.model.tokenizer import check_fit, load_tokenizer
from fedlora.common.tasks.classification import SequenceClassification


@pytest.fixture
def base(tiny_bert: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bert, tmp_path / "base"))


def build(folder: Path) -> AdapterModel:
    settings = ModelConfig(base=str(folder), pooling="mean", max_length=16)
    return build_model(settings, LoraConfig(rank=2), SequenceClassification(("a", "b")), 1)


def edit(path: Path, vocabulary: dict[str, int]) -> None:
    table = json.loads(path.read_text())
    table["model"]["vocab"] = vocabulary
    path.write_text(json.dumps(table))


@pytest.mark.parametrize("kept", [[], ["tokenizer_config.json"]])
def test_a_base_without_a_tokenizer_is_refused(base: Path, kept: list[str]) -> None:
    """Case 01: transformers makes an empty one, in which every word is unknown."""
    for path in base.glob("*token*"):
        if path.name not in kept:
            path.unlink()
    with pytest.raises(BadInput, match="found no tokenizer"):
        build(base)


def test_a_tokenizer_without_words_is_refused(base: Path) -> None:
    words = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3}
    edit(base / "tokenizer.json", words)
    with pytest.raises(BadInput, match="found a tokenizer without words"):
        load_tokenizer(base)


def test_another_model_s_tokenizer_is_refused(base: Path) -> None:
    words = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "w1": 4}
    edit(base / "tokenizer.json", words)
    with pytest.raises(BadInput, match="found a tokenizer of 5 tokens, expected about 76"):
        build(base)


def test_a_word_beyond_the_embedding_is_refused(base: Path) -> None:
    table = json.loads((base / "tokenizer.json").read_text())["model"]["vocab"]
    edit(base / "tokenizer.json", table | {"more": 76})
    with pytest.raises(BadInput, match="found token 'more' with id 76, expected ids below 76"):
        build(base)


def test_a_control_token_beyond_the_embedding_is_borne_where_no_text_has_it(base: Path) -> None:
    """A padding token that was added and never embedded: the mask hides what fills a batch up."""
    tokenizer = load_tokenizer(base)
    tokenizer.add_special_tokens({"pad_token": "[MORE]"})
    assert tokenizer.pad_token_id == 76
    check_fit(tokenizer, 76, "here")
    tokenizer.save_pretrained(base)
    assert build(base).pad == 0


def test_a_tokenizer_that_cuts_and_pads_on_the_left_does_so_no_more(base: Path) -> None:
    tokenizer = load_tokenizer(base)
    tokenizer.truncation_side = tokenizer.padding_side = "left"
    tokenizer.save_pretrained(base)
    found = load_tokenizer(base)
    assert found.truncation_side == found.padding_side == "right"


@pytest.mark.parametrize("text", ["", "{}", "[" * 50_000])
def test_a_tokenizer_that_can_not_be_read_is_one_line(base: Path, text: str) -> None:
    (base / "tokenizer.json").write_text(text)
    with pytest.raises(BadInput, match="found no tokenizer that transformers reads") as caught:
        load_tokenizer(base)
    assert len(str(caught.value).splitlines()) == 1
