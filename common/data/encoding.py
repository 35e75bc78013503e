"""From text to a tokenizer's words, and what it puts round them.

A control word that a person typed, "</s>" say, stays ordinary text: it must neither end a record
nor look like another's turn. Control tokens come from the tokenizer's own frame alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_WORDS = ("0", "1")  # texts that every tokenizer has words for


def word_tokens(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """The words of each text, without a frame, and without control tokens."""
    rows = _tokens(tokenizer, texts, framed=False)
    control = control_tokens(tokenizer)
    spelt: dict[int, list[int]] = {}
    for row, ids in enumerate(rows):
        if control.isdisjoint(ids):
            continue
        for each in control.intersection(ids) - spelt.keys():
            spelt[each] = _spelt(tokenizer, each, control)
        rows[row] = [part for each in ids for part in spelt.get(each, [each])]
    return rows


def word_pieces(tokenizer: Any, texts: Sequence[Sequence[str]]) -> list[list[list[int]]]:
    """The pieces of each word of each text, one piece at least, as they are within a text."""
    first, both, apart = _tokens(tokenizer, ["0", "0 0", " 0"], framed=False)
    gap = " " if both == first + apart else ""  # byte-level tokenizers take it for a word's part
    unknown = next(
        (each for each in (tokenizer.unk_token_id, tokenizer.pad_token_id) if each is not None), 0
    )
    spelt = list(dict.fromkeys(gap * (n > 0) + w for text in texts for n, w in enumerate(text)))
    pieces = dict(zip(spelt, word_tokens(tokenizer, spelt), strict=True))
    return [[pieces[gap * (n > 0) + w] or [int(unknown)] for n, w in enumerate(t)] for t in texts]


@dataclass(frozen=True)
class Frame:
    """What a tokenizer puts before, between and after texts; each may be empty."""

    before: list[int]
    between: list[int]
    after: list[int]

    def __len__(self) -> int:
        return len(self.before) + len(self.between) + len(self.after)

    def around(self, first: list[int], second: list[int] | None = None) -> list[int]:
        """The row of one text, or of two."""
        return self.before + first + ([] if second is None else self.between + second) + self.after


def text_frame(tokenizer: Any) -> Frame:
    """As the tokenizer frames one text."""
    (framed,), (bare,) = (_tokens(tokenizer, [_WORDS[0]], framed=each) for each in (True, False))
    start = _found(bare, framed, 0)
    if start is None:
        return Frame([], [], [])
    return Frame(framed[:start], [], framed[start + len(bare) :])


def pair_frame(tokenizer: Any) -> Frame:
    """As the tokenizer frames two texts; a line break, where it puts nothing between them."""
    first, second, line = _tokens(tokenizer, [*_WORDS, "\n"], framed=False)
    framed = _called(tokenizer, [_WORDS[0]], [_WORDS[1]], framed=True)[0]
    start = _found(first, framed, 0)
    other = None if start is None else _found(second, framed, start + len(first))
    if start is None or other is None:
        return Frame([], line, [])
    between = framed[start + len(first) : other]
    return Frame(framed[:start], between or line, framed[other + len(second) :])


def opening(tokenizer: Any) -> list[int]:
    """What a decoder's texts begin with: as its tokenizer does, else by its own token for that."""
    begin = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
    return text_frame(tokenizer).before or begin


def control_tokens(tokenizer: Any) -> frozenset[int]:
    """Ids that steer a model; a word that is unknown is none of them."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {number for number, token in added.items() if token.special}
    known = special | set(getattr(tokenizer, "all_special_ids", ()))
    return frozenset(known - {getattr(tokenizer, "unk_token_id", None)})


def spelt_tokens(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text of the tokenizer's own, a template say: a control word is the control."""
    if not text:
        return []
    encoded = tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)
    return list(encoded["input_ids"])


def _tokens(tokenizer: Any, texts: Sequence[str], framed: bool) -> list[list[int]]:
    return _called(tokenizer, list(texts), None, framed) if texts else []


def _called(
    tokenizer: Any, texts: list[str], pairs: list[str] | None, framed: bool
) -> list[list[int]]:
    both = {} if pairs is None else {"text_pair": pairs}
    encoded = tokenizer(
        texts,
        **both,
        add_special_tokens=framed,
        truncation=False,
        split_special_tokens=True,
        return_attention_mask=False,
        verbose=False,
    )
    return list(encoded["input_ids"])


def _found(part: list[int], row: list[int], start: int) -> int | None:
    """Where `part` stands in `row`, from `start` on."""
    places = range(start, len(row) - len(part) + 1)
    return next((at for at in places if part and row[at : at + len(part)] == part), None)


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
