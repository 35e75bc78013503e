"""One text or two, framed as the tokenizer frames them and cut where they are longest."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tokenizers import processors

from fedlora.common.config.schema import DataConfig, LoraConfig, ModelConfig
from fedlora.common.data.records import Records
from fedlora.common.errors import BadInput
from fedlora.common.model.network import build_model
from fedlora.common.model.tokenizer import load_tokenizer
from fedlora.common.tasks.batch import Tokenised
from fedlora.common.tasks.classification import SequenceClassification
from fedlora.common.tasks.media_classification import ImageClassification
from fedlora.common.tasks.texts import as_pooled

TASK = SequenceClassification(("no", "yes"))


def pair(first: str, second: str) -> Records:
    labels = np.zeros(1, dtype=np.int64)
    return Records([first], None, labels, None, {}, "test", parts={"second": [second]})


@pytest.fixture
def paired(tiny_bert: Path, tmp_path: Path) -> Path:
    """The tiny encoder, whose tokenizer frames two texts as BERT's does."""
    tokenizer = load_tokenizer(tiny_bert)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    transformers.AutoModel.from_pretrained(tiny_bert).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    settings = tmp_path / "tokenizer_config.json"
    named = {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}
    settings.write_text(json.dumps(json.loads(settings.read_text()) | named))
    return tmp_path


def test_a_pair_is_framed_as_the_tokenizer_frames_it(paired: Path) -> None:
    tokenizer = load_tokenizer(paired)
    data = TASK.encode(pair("it was good", "the bank"), tokenizer, 24)
    framed = tokenizer("it was good", "the bank")
    assert data.tokens.tolist() == framed["input_ids"]
    batch = data.batch(np.array([0]), 0, torch.device("cpu"), (2, 12))
    assert batch.mask[0].tolist() == [1 + kind for kind in framed["token_type_ids"]] + [0] * 4
    assert batch.mask[1].tolist() == [1] * 12  # nobody's


def test_a_base_that_tells_texts_apart_is_told(paired: Path) -> None:
    model = build_model(ModelConfig(str(paired), pooling="mean"), LoraConfig(), TASK, 1)
    data = TASK.encode(pair("it was good", "it was good"), model.tokenizer, 24)
    batch = data.batch(np.array([0]), model.pad, model.device)
    plain = transformers.AutoModel.from_pretrained(paired).eval()
    inputs = model.tokenizer("it was good", "it was good", return_tensors="pt")
    expected = plain(**inputs).last_hidden_state.mean(dim=1)
    found = model.pooled(batch)
    assert torch.allclose(found, torch.nn.functional.normalize(expected), atol=1e-5)
    alike = model.pooled(dataclasses.replace(batch, mask=(batch.mask > 0).long()))
    assert not torch.allclose(found, alike, atol=1e-3)


@pytest.mark.parametrize(
    ("first", "second", "kept"),
    [(3, 4, (3, 4)), (20, 3, (6, 3)), (3, 20, (3, 6)), (20, 20, (5, 4)), (1, 20, (1, 8))],
)
def test_the_longer_text_is_cut_first(
    paired: Path, first: int, second: int, kept: tuple[int, int]
) -> None:
    tokenizer = load_tokenizer(paired)
    data = TASK.encode(pair("good " * first, "bad " * second), tokenizer, 12)
    good, bad = tokenizer.convert_tokens_to_ids(["good", "bad"])
    counts = tuple(int((data.tokens == token).sum()) for token in (good, bad))
    assert counts == kept and len(data.tokens) <= 12
    cut = {"first text": int(kept[0] < first), "second text": int(kept[1] < second)}
    assert dict(data.truncated) == cut


def test_a_control_word_in_a_pair_stays_a_word(paired: Path) -> None:
    data = TASK.encode(pair("it [SEP] was", "[CLS]"), load_tokenizer(paired), 24)
    assert data.tokens.tolist().count(3) == 2 and data.tokens.tolist().count(2) == 1


def test_a_decoder_reads_one_text_after_the_other(tiny_llama: Path) -> None:
    tokenizer = load_tokenizer(tiny_llama)
    data = TASK.encode(pair("it was", "the bank"), tokenizer, 24)
    assert data.tokens.tolist() == tokenizer.convert_tokens_to_ids(["it", "was", "the", "bank"])
    assert data.second is not None and data.second.tolist() == [2]


def test_what_is_asked_is_one_text_or_two() -> None:
    assert TASK.asked(["a", "b"]).texts == ["a", "b"]
    assert TASK.asked([["a", "b"]]).parts == {"second": ["b"]}
    for wrong, said in (
        (["a", ["b", "c"]], "input 1: found a text"),
        ([["a", "b"], ["a"]], "input 2: found no pair"),
        ([["a", 1]], "input 1: found no pair"),
        ([["a", "\ud800"]], "input 1: found no pair"),
    ):
        with pytest.raises(BadInput, match=f"{said}, expected two texts"):
            TASK.asked(wrong)
    with pytest.raises(BadInput, match="input 2: found half a surrogate pair, expected text"):
        TASK.asked(["a", "\ud800"])


def test_three_columns_are_no_pair() -> None:
    with pytest.raises(BadInput, match="found 3 columns, expected one or two"):
        TASK.columns(DataConfig(text=("a", "b", "c")))


def test_texts_of_a_pair_are_read_each_by_itself(paired: Path) -> None:
    """As a plain encoder reads them one by one; a head is told how the two differ."""
    model = build_model(ModelConfig(str(paired), pooling="pairs"), LoraConfig(), TASK, 1)
    several = Records(
        ["it was good", "the bank", "good"],
        None,
        np.zeros(3, dtype=np.int64),
        None,
        {},
        "test",
        parts={"second": ["the bank was not open", "it", "good"]},
    )
    data = model.encoded(several)
    plain = transformers.AutoModel.from_pretrained(paired).eval()

    def mean(text: str) -> torch.Tensor:
        hidden = plain(**model.tokenizer(text, return_tensors="pt")).last_hidden_state
        return torch.nn.functional.normalize(hidden.mean(dim=1), dim=1)[0]

    expected = []
    for first, second in zip(several.texts, several.parts["second"], strict=True):
        u, v = mean(first), mean(second)
        agree = len(u) ** 0.5 * (u * v + (10**0.5 - 1) * (u * v).mean())
        both = torch.cat([4 * (u - v).abs(), agree])
        expected.append(both / both.norm())
    rows = np.arange(3, dtype=np.int64)
    for shape in (None, (5, 16), (4, 19)):
        found = model.pooled(data.batch(rows, model.pad, model.device, shape))
        assert torch.allclose(found[:3], torch.stack(expected), atol=1e-5)
        assert bool(torch.isfinite(found).all())
    assert model.pooled(data.take([2, 0]).batch(rows[:2], 0, model.device))[0].allclose(
        expected[2], atol=1e-5
    )


def test_a_half_of_a_row_always_ends_in_padding(paired: Path) -> None:
    """Else a network sees a mask or none, by who is beside a record."""
    task = dataclasses.replace(TASK, apart=True)
    data = task.encode(pair("good " * 30, "bad " * 30), load_tokenizer(paired), 24)
    assert data.lengths.tolist() == [24] and dict(data.truncated) == {
        "first text": 1,
        "second text": 1,
    }
    mask = data.batch(np.array([0]), 0, torch.device("cpu")).mask[0].tolist()
    assert mask == [1] * 11 + [0] + [2] * 11 + [0]
    joined = Tokenised(data.tokens, data.offsets, data.targets, {}, second=data.second)
    assert joined.content(0) != data.content(0)  # whose features may be kept for another run
    nobodys = task.unlabelled(np.arange(9, dtype=np.int32), np.array([0, 8, 9]))
    assert nobodys.lengths.tolist() == [8, 4]
    assert nobodys.tokens.tolist() == [0, 1, 2, 5, 6, 7, 8, 8]  # two texts, as far as there are


def test_what_compares_two_texts_is_not_given_one(paired: Path) -> None:
    task = as_pooled(TASK, "pairs")
    one = Records(["good"], None, np.zeros(1, dtype=np.int64), None, {}, "notes.csv")
    with pytest.raises(BadInput, match=r"notes\.csv: found one text a record, expected the two"):
        task.encode(one, load_tokenizer(paired), 24)
    with pytest.raises(BadInput, match=r"input 1: found a text, expected two texts$"):
        task.asked(["good"])
    with pytest.raises(BadInput, match="reads texts"):
        as_pooled(ImageClassification(("a", "b")), "pairs")
