"""Words and their pieces: a tag is on the first piece of its word, wherever a tokenizer cuts."""

from __future__ import annotations

import hashlib
import json
from itertools import product
from pathlib import Path

import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from fedlora.common.data.encoding import word_pieces
from fedlora.common.data.records import Columns, read_records
from fedlora.common.data.tagged import read_tag_set, words_of
from fedlora.common.errors import BadInput
from fedlora.common.tasks.batch import IGNORED
from fedlora.common.tasks.token_classification import TokenClassification, entities

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


def test_what_unicode_combines_with_a_letter_is_of_its_word() -> None:
    """An accent by itself, a vowel sign, a joiner: a tokenizer would read halves of a word."""
    for text, words in {
        "cafe\u0301s, ok": ["cafe\u0301s", ",", "ok"],
        "नमस्ते दुनिया": ["नमस्ते", "दुनिया"],
        "می\u200cخواهم": ["می\u200cخواهم"],
        "\u263a\ufe0fb .\u0301b": ["\u263a\ufe0f", "b", ".\u0301", "b"],
    }.items():
        found, places = words_of(text)
        assert found == words and [text[start:end] for start, end in places] == words


@pytest.mark.parametrize(
    ("spans", "fault"),
    [
        ([(0, 18), (4, 7)], "a word of another span in it from 4 to 7"),  # one inside another
        ([(0, 2), (2, 3)], "a word of another span in it from 2 to 3"),  # two in one word
        ([(3, 4)], "no word in it from 3 to 4"),
    ],
)
def test_an_entity_is_not_lost_to_another_one(
    spans: list[tuple[int, int]], fault: str, tmp_path: Path
) -> None:
    """The later of two took the words of the earlier, of which a half was left, or nothing."""
    given = [{"start": start, "end": end, "label": "place"} for start, end in spans]
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps({"text": "one two three four", "spans": given}), encoding="utf-8")
    with pytest.raises(BadInput, match=f"row 1 spans: found {fault}, expected words of its own"):
        read_records(path, Columns("text", tags="spans"), TAGS)


@pytest.mark.parametrize("kinds", [("Drug", "drug"), ("Drug", "Drug ")])
def test_types_that_are_spelt_alike_are_refused(kinds: tuple[str, str], tmp_path: Path) -> None:
    path = tmp_path / "test.jsonl"
    spans = [{"start": 2 * n, "end": 2 * n + 1, "label": kind} for n, kind in enumerate(kinds)]
    row = {"text": "a b", "tags": [f"B-{kind}" for kind in kinds], "spans": spans}
    path.write_text(json.dumps(row), encoding="utf-8")
    for column in ("tags", "spans"):
        with pytest.raises(BadInput, match="differ in white space, case or Unicode form only"):
            read_tag_set(path, column)
    with pytest.raises(BadInput, match='public tags O, B-drug; did you mean "B-drug"'):
        read_records(path, Columns("text", tags="spans"), ("O", "B-drug"))


def test_what_is_asked_is_a_text_or_words() -> None:
    assert TASK.asked(["a b", ["a", "b c"]]).parts["tokens"] == [["a", "b"], ["a", "b c"]]
    for wrong in ([["a", {}]], [7], ["a", ["\ud800"]]):
        with pytest.raises(BadInput, match=rf"input {len(wrong)}: found .*, expected text"):
            TASK.asked(wrong)


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"tokens": ["a"], "tags": ["O", "O"]}, "found 1 words and 2 tags"),
        ({"tokens": ["a"], "tags": ["B-drug"]}, 'found "B-drug", expected one of the 3 public'),
        ({"tokens": ["a"], "tags": ["place"]}, 'expected "O", "B-" or "I-" and a type'),
        ({"tokens": "a", "tags": ["O"]}, "expected start, end and label"),
        ({"tokens": [], "tags": []}, "found nothing after tokenisation"),
        ({"tokens": None, "tags": []}, "found nothing, expected a list"),
        ({"tokens": ["\ud800"], "tags": ["O"]}, "expected a tag for each word, which is text"),
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


# sha256 of what seqeval 1.2.2 gives (`get_entities`), ends behind the last word
OF_SEQEVAL = "9e45ef8396e6be68858db7e9542babd01431712dde01fd9a673ff59ecf01adaa"


def test_entities_are_seqevals() -> None:
    """All sequences of up to five tags of two types, also those that BIO does not allow."""
    tags = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
    every = (given for words in range(1, 6) for given in product(tags, repeat=words))
    found = [[list(entity) for entity in entities(given)] for given in every]
    assert hashlib.sha256(json.dumps(found).encode()).hexdigest() == OF_SEQEVAL
