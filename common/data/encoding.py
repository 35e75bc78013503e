"""From text to a tokenizer's words, and what it puts round them.

A control word that a person typed, "</s>" say, stays ordinary text: it must neither end a record
nor look like another's turn. Control tokens come from the tokenizer's own frame alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_WORD = "0"  # a text that every tokenizer has a word for


def word_tokens(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """The words of each text, without a frame, and without control tokens."""
    rows = _tokens(tokenizer, texts, framed=False)
    control = _control(tokenizer)
    spelt: dict[int, list[int]] = {}
    for row, ids in enumerate(rows):
        if control.isdisjoint(ids):
            continue
        for each in control.intersection(ids) - spelt.keys():
            spelt[each] = _spelt(tokenizer, each, control)
        rows[row] = [part for each in ids for part in spelt.get(each, [each])]
    return rows


def frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after a text: both may be empty."""
    (framed,), (bare,) = (_tokens(tokenizer, [_WORD], framed=each) for each in (True, False))
    for start in range(len(framed) - len(bare) + 1):
        if bare and framed[start : start + len(bare)] == bare:
            return framed[:start], framed[start + len(bare) :]
    return [], []


def opening(tokenizer: Any) -> list[int]:
    """What a decoder's texts begin with: as its tokenizer does, else by its own token for that."""
    begin = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
    return frame(tokenizer)[0] or begin


def _tokens(tokenizer: Any, texts: Sequence[str], framed: bool) -> list[list[int]]:
    if not texts:
        return []
    encoded = tokenizer(
        list(texts),
        add_special_tokens=framed,
        truncation=False,
        split_special_tokens=True,
        return_attention_mask=False,
        verbose=False,
    )
    return list(encoded["input_ids"])


def _control(tokenizer: Any) -> frozenset[int]:
    """Ids that steer a model; a word that is unknown is none of them."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {number for number, token in added.items() if token.special}
    known = special | set(getattr(tokenizer, "all_special_ids", ()))
    return frozenset(known - {getattr(tokenizer, "unk_token_id", None)})


def _spelt(tokenizer: Any, token: int, control: frozenset[int]) -> list[int]:
    """A control word as ordinary ones: a SentencePiece model takes a whole one for its own.

    Cut somewhere inside it, it is none; one that can't be cut so is unknown.
    """
    word = tokenizer.convert_ids_to_tokens(token)
    for cut in range(1, len(word)):
        head, tail = _tokens(tokenizer, [word[:cut], word[cut:]], framed=False)
        if control.isdisjoint(head + tail):
            return head + tail
    return [] if tokenizer.unk_token_id is None else [tokenizer.unk_token_id]
