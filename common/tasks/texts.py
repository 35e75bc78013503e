"""Tasks that answer a record's text, or its two texts, with the numbers of one head.

A pair is framed as the tokenizer frames one, and cut where it is longest; or each of its texts is
framed and read by itself, and has half of a record's length. A task of one's own extends `TextTask`
with `targets_of`, `losses`, `measure`, `metrics` and `answers`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from fedlora.common.data.encoding import pair_frame, text_frame, word_tokens
from fedlora.common.data.medium import Medium
from fedlora.common.data.records import Columns, Records
from fedlora.common.data.values import no_text
from fedlora.common.errors import BadInput
from fedlora.common.tasks.batch import Ints, Targets, Tokenised, rows_of
from fedlora.common.tasks.task import HeadTask, Named, Task, as_inputs, refuse_empty

PAIR = "second"  # of `Records.parts`: the other text of each record


@dataclass(frozen=True)
class TextTask(HeadTask):
    """What all of them have in common. `apart`: the texts of a pair are read each by itself."""

    apart: bool = False
    medium: ClassVar[Medium | None] = None

    @classmethod
    def columns(cls, named: Named) -> Columns:
        """The texts, and the column of labels."""
        first, second = text_columns(named)
        return Columns(first, second=second, label=named.label)

    def encode(self, records: Records, tokenizer: Any, max_length: int) -> Tokenised:
        """Each record framed as the tokenizer frames it, cut to `max_length`, the longer text
        first.

        BadInput where there are no targets, or a text has no token.
        """
        asked = records.unanswered
        targets = self.no_targets(len(records)) if asked else self.targets_of(records)
        if self.apart:
            return _apart(records, targets, tokenizer, max_length)
        if PAIR in records.parts:
            return _pairs(records, targets, tokenizer, max_length)
        frame = text_frame(tokenizer)
        room, texts = max(0, max_length - len(frame)), word_tokens(tokenizer, records.texts)
        refuse_empty([len(ids[:room]) for ids in texts], records)
        shortened = sum(len(ids) > room for ids in texts)
        rows = [_never_empty(frame.around(ids[:room]), tokenizer) for ids in texts]
        return rows_of(rows, targets, {"text": shortened})

    def unlabelled(self, tokens: Any, offsets: Ints) -> Tokenised:
        """Texts of nobody's, with targets of nobody's."""
        targets = self.no_targets(len(offsets) - 1)
        if not self.apart:
            return Tokenised(tokens, offsets, targets, {})
        drawn = np.split(tokens, offsets[1:-1])
        sizes = [max(1, half_of(len(each))) for each in drawn]
        rows = [
            [*each[:size].tolist(), *each[-size:].tolist()]
            for each, size in zip(drawn, sizes, strict=True)
        ]
        return rows_of(rows, targets, {}, second=sizes, apart=True)

    def asked(self, inputs: Sequence[Any]) -> Records:
        """Texts, or pairs of texts; BadInput for a mixture, or anything else."""
        if not self.apart and all(isinstance(each, str) for each in inputs):
            return as_inputs(inputs)
        for number, each in enumerate(inputs, 1):
            if not isinstance(each, list | tuple) or len(each) != 2 or any(map(no_text, each)):
                found = "a text" if isinstance(each, str) else "no pair"
                more = "" if self.apart else ": all are pairs, or none is"
                raise BadInput(f"input {number}: found {found}, expected two texts{more}")
        return as_inputs([first for first, _ in inputs], {PAIR: [second for _, second in inputs]})


def text_columns(named: Named) -> tuple[str, str]:
    """The columns of the first and of the second text, which is "" where there is but one."""
    first, *more = named.text
    if len(more) > 1:
        raise BadInput(f"[data] text: found {1 + len(more)} columns, expected one or two")
    return first, more[0] if more else ""


def as_pooled(task: Task, pooling: str) -> Task:
    """`task` as a network of that pooling has it read; BadInput where it does not read texts."""
    if pooling != "pairs":
        return task
    if not isinstance(task, TextTask):
        raise BadInput(
            f'[model] pooling = "pairs": found task = "{task.name}", expected one that reads texts'
        )
    return replace(task, apart=True)


def half_of(length: int) -> int:
    """Tokens that each text of a pair has in a row of that length, where they are read apart."""
    return length // 2 - 1  # a place of padding: see `Tokenised`


def _apart(records: Records, targets: Targets, tokenizer: Any, max_length: int) -> Tokenised:
    if PAIR not in records.parts:
        raise BadInput(
            f"{records.where}: found one text a record, expected the two of a pair, which"
            ' [model] pooling = "pairs" compares'
        )
    frame = text_frame(tokenizer)
    room = max(0, half_of(max_length) - len(frame))
    texts = [word_tokens(tokenizer, each) for each in (records.texts, records.parts[PAIR])]
    refuse_empty([min(len(a), len(b), room) for a, b in zip(*texts, strict=True)], records)
    cut = [sum(len(ids) > room for ids in each) for each in texts]
    firsts, seconds = (
        [_never_empty(frame.around(ids[:room]), tokenizer) for ids in each] for each in texts
    )
    rows = [first + second for first, second in zip(firsts, seconds, strict=True)]
    parts = dict(zip(("first text", "second text"), cut, strict=True))
    return rows_of(rows, targets, parts, second=[len(each) for each in firsts], apart=True)


def _pairs(records: Records, targets: Targets, tokenizer: Any, max_length: int) -> Tokenised:
    frame = pair_frame(tokenizer)
    room = max(0, max_length - len(frame))
    firsts, seconds = (
        word_tokens(tokenizer, texts) for texts in (records.texts, records.parts[PAIR])
    )
    rows, begins, cut = [], [], {"first text": 0, "second text": 0}
    kept = [_longest_first(len(a), len(b), room) for a, b in zip(firsts, seconds, strict=True)]
    refuse_empty([min(pair) for pair in kept], records)
    for a, b, (left, right) in zip(firsts, seconds, kept, strict=True):
        cut["first text"] += left < len(a)
        cut["second text"] += right < len(b)
        row = frame.around(a[:left], b[:right])
        begins.append(len(row) - len(frame.after) - right)
        rows.append(_never_empty(row, tokenizer))
    return rows_of(rows, targets, cut, second=begins)


def _longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """Tokens that two texts keep where the longer one loses until both fit."""
    if first + second <= room:
        return first, second
    half = room // 2
    if first <= half:
        return first, room - first
    if second <= half:
        return room - second, second
    return room - half, half


def _never_empty(row: list[int], tokenizer: Any) -> list[int]:
    """A network reads one token at least: nothing, framed by nothing, is a padding token."""
    return row or [int(tokenizer.pad_token_id or 0)]
