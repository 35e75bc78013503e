"""Text becomes the tokens that the base was trained on, whatever a person typed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from fedlora.common.data.encoding import opening, word_tokens
from fedlora.common.data.records import Records
from fedlora.common.model.probe import SENTENCES
from fedlora.common.model.tokenizer import load_tokenizer
from fedlora.common.tasks.causal_lm import CausalLanguageModel
from fedlora.common.tasks.classification import SequenceClassification

CONTROL = ["<s>", "</s>", "[SEP]", "<|im_end|>", "<pad>"]
FRAMES = {"": [], "<s> $A": [0], "$A </s>": [], "<s> $A </s>": [0], "<s> <pad> $A": [0, 4]}


def made(
    folder: Path, model: str, frame: str = "", left: bool = False
) -> transformers.PreTrainedTokenizerFast:
    """A small tokenizer of its own words, saved and loaded as a base's is."""
    tokenizer: Tokenizer
    trainer: object
    if model == "bpe":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=CONTROL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
    elif model == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=90, special_tokens=[*CONTROL, "<unk>"], unk_token="<unk>"
        )
    else:
        tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=[*CONTROL, "<unk>"])
    tokenizer.train_from_iterator([*SENTENCES, "<[|/_a-z]>"], trainer)
    if frame:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=frame, special_tokens=[(w, CONTROL.index(w)) for w in CONTROL]
        )
    wrapped = transformers.PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["[SEP]", "<|im_end|>"],
        truncation_side="left" if left else "right",
    )
    wrapped.save_pretrained(folder)
    loaded: transformers.PreTrainedTokenizerFast = load_tokenizer(folder)
    return loaded


def records(texts: Sequence[str], causal: bool = False) -> Records:
    labels = None if causal else np.zeros(len(texts), dtype=np.int64)
    return Records(list(texts), list(texts) if causal else None, labels, None, {}, "test")


@pytest.mark.parametrize("model", ["bpe", "wordpiece", "unigram"])
@pytest.mark.parametrize("word", ["</s>", "[SEP]", "<|im_end|>", "<s>"])
def test_a_control_word_that_a_person_typed_stays_a_word(
    tmp_path: Path, model: str, word: str
) -> None:
    tokenizer = made(tmp_path, model)
    text = f"the bank {word} the card"
    control = tokenizer.convert_tokens_to_ids(word)
    assert control in tokenizer(text)["input_ids"]  # as transformers would have it
    (found,) = word_tokens(tokenizer, [text])
    assert control not in found
    label = SequenceClassification(("a",)).encode(records([text]), tokenizer, 64)
    assert control not in label.tokens
    answer = CausalLanguageModel().encode(records([text], causal=True), tokenizer, 64)
    ends = answer.tokens.tolist()[len(opening(tokenizer)) :]
    # the task's own end alone
    assert ends.count(control) == int(word == "</s>") and ends[-1] == 1


@pytest.mark.parametrize("frame", list(FRAMES))
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("longest", [4, 7, 8])
def test_what_is_too_long_loses_its_end_and_keeps_its_frame(
    tmp_path: Path, frame: str, left: bool, longest: int
) -> None:
    """Case 25: no token of the end is spliced on; a closing token stays if there is one."""
    tokenizer = made(tmp_path, "bpe", frame, left)
    text = SENTENCES[0]
    (bare,) = word_tokens(tokenizer, [text])
    before, after = (
        [CONTROL.index(word) for word in part.split()] for part in (frame or "$A").split("$A")
    )
    room = longest - len(before) - len(after)
    data = SequenceClassification(("a",)).encode(records([text, "ok"]), tokenizer, longest)
    assert data.tokens_of(0).tolist() == [*before, *bare[:room], *after]
    (short,) = word_tokens(tokenizer, ["ok"])
    assert data.tokens_of(1).tolist() == [*before, *short[:room], *after]
    assert data.truncated == {"text": 1 + (len(short) > room)}
    tokenizer.truncation_side = "right"
    theirs = tokenizer(text, truncation=True, max_length=longest)["input_ids"]
    assert data.tokens_of(0).tolist() == theirs


@pytest.mark.parametrize(("frame", "expected"), FRAMES.items())
def test_a_decoder_begins_as_it_was_trained(
    tmp_path: Path, frame: str, expected: list[int]
) -> None:
    """With what its tokenizer puts before a text; where it puts nothing, with its own begin."""
    tokenizer = made(tmp_path, "bpe", frame)
    begin = expected or [tokenizer.bos_token_id]
    assert opening(tokenizer) == begin
    data = CausalLanguageModel().encode(records(["the card"], causal=True), tokenizer, 64)
    (bare,) = word_tokens(tokenizer, ["the card"])
    assert data.tokens.tolist() == [*begin, *bare, *bare, tokenizer.eos_token_id]


def test_no_text_is_no_row(tmp_path: Path) -> None:
    tokenizer = made(tmp_path, "bpe")
    assert word_tokens(tokenizer, []) == []
