"""A small random base of one family of transformers, written to disk as people publish them.

Weights of a fixed seed; a vocabulary of words with a word-level tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

WORDS = [f"w{number}" for number in range(60)] + ["good", "bad", "fine", "poor", "the", "a", "is"]
ENCODER = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
ROBERTA = ("<s>", "<pad>", "</s>", "<unk>")
DECODER = ("<unk>", "<s>", "</s>")  # as many are: without a word for padding


@dataclass(frozen=True)
class Family:
    """One kind of base: `sizes` are its configuration's own, beside the vocabulary."""

    name: str
    config: str  # a class of transformers
    kind: str  # "encoder", "decoder", "encoder-decoder", or "half": its encoder alone
    sizes: Mapping[str, Any] = field(default_factory=dict)
    special: tuple[str, ...] = ()
    # of a family whose tokenizer transformers makes by itself, whatever lies in the folder
    by_bytes: bool = False

    def save(self, folder: Path) -> Path:
        """Write a base of this family: weights from a fixed seed, configuration, tokenizer."""
        special = self.special or (DECODER if self.kind == "decoder" else ENCODER)
        vocabulary = [*special, *WORDS]
        words = _bytes() if self.by_bytes else tokenizer(vocabulary, special)
        torch.manual_seed(0)
        config = getattr(transformers, self.config)(
            vocab_size=len(words), **_ids(special), **self.sizes
        )
        build = {
            "decoder": transformers.AutoModelForCausalLM,
            "encoder": transformers.AutoModel,
            "encoder-decoder": transformers.AutoModel,
            "half": transformers.AutoModelForTextEncoding,
        }[self.kind]
        model = build.from_config(config)  # type: ignore[no-untyped-call]
        model.save_pretrained(folder)
        words.save_pretrained(folder)
        return folder


def tokenizer(
    vocabulary: list[str], special: tuple[str, ...]
) -> transformers.PreTrainedTokenizerFast:
    """Words by white space; what `special` says of padding, beginning and end."""
    unknown = next(word for word in special if "unk" in word.lower())
    words = Tokenizer(models.WordLevel({w: n for n, w in enumerate(vocabulary)}, unk_token=unknown))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    if special == DECODER:
        return transformers.PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
            tokenizer_object=words, unk_token=unknown, bos_token=special[1], eos_token=special[2]
        )
    pad, first, last = (
        ("<pad>", "<s>", "</s>") if special == ROBERTA else ("[PAD]", "[CLS]", "[SEP]")
    )
    words.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}",
        special_tokens=[(each, vocabulary.index(each)) for each in (first, last)],
    )
    return transformers.PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=words, unk_token=unknown, pad_token=pad, cls_token=first, sep_token=last
    )


def _bytes() -> Any:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    return transformers.Qwen2Tokenizer(vocab={each: n for n, each in enumerate(letters)}, merges=[])


def _ids(special: tuple[str, ...]) -> dict[str, int | None]:
    if special == DECODER:
        return {"pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}
    if special == ROBERTA:
        return {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    return {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
