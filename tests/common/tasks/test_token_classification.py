"""Words and their pieces: a tag is on the first piece of its word, wherever a tokenizer cuts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from fedlora.common.data.encoding import word_pieces
from fedlora.common.data.records import Columns, read_records
from fedlora.common.data.tagged import read_tag_set, words_of
from fedlora.common.errors import BadInput
from fedlora.common.tasks.batch import IGNORED
from fedlora.common.tasks.token_classification import TokenClassification

TAGS = ("O", "B-place", "I-place")
TASK = TokenClassification(TAGS)


@pytest.fixture(scope="module")
def byte_level() -> transformers.PreTrainedTokenizerFast:
    """As GPT-2's: a space belongs to the word behind it."""
    words = ["Ġb", "Ġba", "an", "ank", "k", "b", "a", "n", "Ġ", "ba", "it", "i", "t"]
    model = models.BPE(
        {word: place for place, word in enumerate(["<unk>", *words])},
        [("Ġ", "b"), ("Ġb", "a"), ("b", "a"), ("a", "n"), ("an", "k"), ("i", "t")],
        unk_token="<unk>",
    )
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, unk_token="<unk>"
    )


def test_the_first_piece_carries_the_tag(
    byte_level: transformers.PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    row = {"tokens": ["it", "bank"], "tags": ["O", "B-place"]}
    path = tmp_path / "test.jsonl"
    path.write_text(json.dumps(row), encoding="utf-8")
    records = read_records(path, Columns("", tokens="tokens", tags="tags"), TAGS)
    assert records.texts == ["it bank"]
    data = TASK.encode(records, byte_level, 24)
    pieces = byte_level.convert_ids_to_tokens(data.tokens.tolist())
    assert pieces == ["it", "Ġba", "n", "k"]
    assert data.targets.tolist() == [0, 1, IGNORED, IGNORED]
    short = TASK.encode(records, byte_level, 3)
    assert short.targets.tolist() == [0, 1, IGNORED] and short.truncated == {"text": 1}


def test_a_word_without_a_piece_still_has_one(
    byte_level: transformers.PreTrainedTokenizerFast,
) -> None:
    assert word_pieces(byte_level, [["", "it"]])[0][0] == [0]


def test_spans_of_characters_become_tags(tmp_path: Path) -> None:
    text = "I was in New York, twice."
    span = {"start": 9, "end": 17, "label": "place"}
    path = tmp_path / "test.jsonl"
    path.write_text(json.dumps({"text": text, "spans": [span]}), encoding="utf-8")
    assert read_tag_set(path, "spans") == TAGS
    records = read_records(path, Columns("text", tags="spans"), TAGS)
    words, (tags,) = words_of(text)[0], records.parts["tags"]
    assert dict(zip(words, tags, strict=True)) == dict.fromkeys(words, 0) | {"New": 1, "York": 2}


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"tokens": ["a"], "tags": ["O", "O"]}, "found 1 words and 2 tags"),
        ({"tokens": ["a"], "tags": ["B-drug"]}, 'found "B-drug", expected one of the 3 public'),
        ({"tokens": ["a"], "tags": ["place"]}, 'expected "O", "B-" or "I-" and a type'),
        ({"tokens": "a", "tags": ["O"]}, "expected start, end and label"),
        ({"tokens": [], "tags": []}, "found nothing after tokenisation"),
        ({"tokens": None, "tags": []}, "found nothing, expected a list"),
    ],
)
def test_rows_that_are_refused(
    row: dict[str, object],
    fault: str,
    tmp_path: Path,
    byte_level: transformers.PreTrainedTokenizerFast,
) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(row), encoding="utf-8")
    with pytest.raises(BadInput, match=fault):
        records = read_records(path, Columns("", tokens="tokens", tags="tags"), TAGS)
        TASK.encode(records, byte_level, 24)
