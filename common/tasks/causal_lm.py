"""A base's next words: of the answer to a prompt, of a text, or of the assistant's turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch.nn import functional

from fedlora.common.data.conversations import messages_of
from fedlora.common.data.encoding import opening, word_tokens
from fedlora.common.data.medium import Medium
from fedlora.common.data.records import Columns, Records
from fedlora.common.errors import BadInput
from fedlora.common.tasks.batch import IGNORED, Batch, Ints, Tokenised, Totals, rows_of
from fedlora.common.tasks.chat import Layout, fitted, to_answer
from fedlora.common.tasks.task import LANGUAGE, Answer, Named, as_inputs, refuse_empty
from fedlora.common.tasks.texts import text_columns

LEARNT = 1  # the target of a token that is to be predicted
MESSAGES = "messages"  # of `Records.parts`
Row = tuple[list[int], list[int]]  # tokens and targets


@dataclass(frozen=True)
class CausalLanguageModel:
    """Next-token cross entropy of what is learnt, a mean for each record.

    A prompt that is too long loses its left, a response its right; the response keeps at least half
    of `max_length`. A conversation loses its earliest exchanges.
    """

    labels: tuple[str, ...] = ()
    name: ClassVar[str] = "causal-lm"
    reads: ClassVar[str] = LANGUAGE
    medium: ClassVar[Medium | None] = None
    outputs: ClassVar[int] = 0

    @classmethod
    def columns(cls, named: Named) -> Columns:
        """Conversations, prompts and responses, or texts: the first of these that is named."""
        if named.messages:
            return Columns("", messages=named.messages)
        first = text_columns(named)[0]
        return Columns(
            (named.prompt or first) if named.response else first, response=named.response
        )

    @classmethod
    def label_set(cls, path: Path, named: Named) -> tuple[str, ...]:
        """None."""
        return ()

    def encode(self, records: Records, tokenizer: Any, max_length: int) -> Tokenised:
        """Each record as one row of at most `max_length`; `targets` say what of it is learnt.

        BadInput where a record has nothing to learn from.
        """
        if MESSAGES in records.parts:
            rows, cut = _conversations(records, tokenizer, max_length)
        elif records.responses is None:
            rows, cut = _texts(records, tokenizer, max_length)
        else:
            rows, cut = _answers(records, records.responses, tokenizer, max_length)
        targets = np.array([each for _, own in rows for each in own], dtype=np.int64)
        return rows_of([ids for ids, _ in rows], targets, cut, by_token=True)

    def unlabelled(self, tokens: Any, offsets: Ints) -> Tokenised:
        """Texts of nobody's, all of them to be predicted."""
        targets = np.full(len(tokens), LEARNT, dtype=np.int64)
        return Tokenised(tokens, offsets, targets, {}, by_token=True)

    def asked(self, inputs: Sequence[Any]) -> Records:
        """Texts, or conversations' messages; BadInput names the first that is neither."""
        return as_inputs([_said(each, f"input {n}") for n, each in enumerate(inputs, 1)])

    def losses(self, outputs: torch.Tensor, batch: Batch) -> torch.Tensor:
        """(n,) mean cross entropy of each record's learnt tokens; `outputs` (n, length, words)."""
        return self.losses_of(self._by_word(outputs, batch), batch)

    def measure(self, outputs: torch.Tensor, batch: Batch) -> Totals:
        """Of `outputs` (n, length, words): the loss of what is learnt, its tokens, records."""
        return self.measure_of(self._by_word(outputs, batch), batch)

    def counted(self, batch: Batch) -> torch.Tensor:
        """(n, length - 1) whether the next word is to be predicted."""
        return batch.targets[:, 1:] == LEARNT

    def losses_of(self, by_word: torch.Tensor, batch: Batch) -> torch.Tensor:
        """(n,) of the cross entropy `by_word` (n, length - 1) of each next word."""
        counted = self.counted(batch)
        return (by_word * counted).sum(dim=1) / counted.sum(dim=1).clamp(min=1)

    def measure_of(self, by_word: torch.Tensor, batch: Batch) -> Totals:
        """The same as `measure`, of the cross entropy `by_word` (n, length - 1)."""
        counted = self.counted(batch)
        return {
            "loss": np.array((by_word * counted).sum(dim=1).double().sum().item()),
            "tokens": np.array(counted.sum(dim=1).clamp(min=1).double().sum().item()),
            "examples": np.array(float(len(counted))),
        }

    def metrics(self, totals: Totals) -> dict[str, float]:
        """Mean loss of a token in nats, and perplexity."""
        loss = float(totals["loss"]) / float(totals["tokens"])
        return {"loss": loss, "perplexity": float(np.exp(min(loss, 700.0)))}

    def details(self, totals: Totals) -> dict[str, Any]:
        """Nothing more."""
        return {}

    def answers(self, outputs: torch.Tensor, batch: Batch) -> list[Answer]:
        """It writes its answers itself, word by word."""
        raise BadInput("task: found a language model, expected a prompt to complete")

    def _by_word(self, outputs: torch.Tensor, batch: Batch) -> torch.Tensor:
        """(n, length - 1) cross entropy of each next word."""
        return functional.cross_entropy(
            outputs[:, :-1].float().transpose(1, 2), batch.ids[:, 1:], reduction="none"
        )


def _said(given: Any, place: str) -> Any:
    if not isinstance(given, list):
        return given
    if not given:
        raise BadInput(f"{place}: found no message, expected at least one")
    return "\n".join(each["content"] for each in messages_of(given, place))


def prompt_tokens(tokenizer: Any, prompt: Any, room: int) -> list[int]:
    """What a model is given to go on from: a text, or a conversation's messages; its end stays."""
    if isinstance(prompt, str):
        begin = opening(tokenizer)
        left = max(1, room - len(begin))
        return begin + word_tokens(tokenizer, [prompt])[0][-left:]
    return to_answer(Layout(tokenizer), messages_of(prompt, "prompt"), room)


def _texts(records: Records, tokenizer: Any, max_length: int) -> tuple[list[Row], dict[str, int]]:
    """Each text from its beginning, and its end where there is room for it."""
    begin, end = opening(tokenizer), _end(tokenizer)
    room, texts = max_length - len(begin), word_tokens(tokenizer, records.texts)
    refuse_empty([len(ids) for ids in texts], records)
    rows = [
        (begin + kept, [IGNORED] * len(begin) + [LEARNT] * len(kept))
        for kept in ((ids + end)[:room] for ids in texts)
    ]
    return rows, {"text": sum(len(ids) > room for ids in texts)}


def _answers(
    records: Records, responses: Sequence[str], tokenizer: Any, max_length: int
) -> tuple[list[Row], dict[str, int]]:
    """Prompt and response as one text; a response keeps what the prompt leaves, and at least half
    of the room.
    """
    begin, end = opening(tokenizer), _end(tokenizer)
    rows, cut = [], {"prompt": 0, "response": 0}
    answers = word_tokens(tokenizer, responses)
    refuse_empty([len(ids) for ids in answers], records)
    for prompt, answer in zip(word_tokens(tokenizer, records.texts), answers, strict=True):
        question, kept = _halved(prompt, answer + end, max_length - len(begin))
        cut["prompt"] += len(question) < len(prompt)
        cut["response"] += len(kept) < len(answer + end)
        rows.append(_row(begin + question, kept))
    return rows, cut


def _conversations(
    records: Records, tokenizer: Any, max_length: int
) -> tuple[list[Row], dict[str, int]]:
    """Whole turns, as many of the last ones as fit; of a single exchange, as of an answer."""
    layout, rows = Layout(tokenizer), []
    cut = {"conversation": 0, "prompt": 0, "response": 0}
    for number, messages in enumerate(records.parts[MESSAGES]):
        try:
            ids, learnt, dropped = fitted(layout, messages, max_length)
        except BadInput as error:
            raise BadInput([f"{records.place(number)}: {each}" for each in error.faults]) from error
        cut["conversation"] += dropped
        marks = [LEARNT if each else IGNORED for each in learnt]
        if len(ids) <= max_length:
            rows.append((ids, marks))
            continue
        begin = learnt.index(True) if True in learnt else len(ids)
        question, kept = _halved(ids[:begin], ids[begin:], max_length)
        cut["prompt"] += len(question) < begin
        cut["response"] += len(kept) < len(ids) - begin
        targets = [IGNORED] * len(question) + marks[begin : begin + len(kept)]
        rows.append((question + kept, targets))
    return rows, cut


def _halved(prompt: list[int], answer: list[int], room: int) -> tuple[list[int], list[int]]:
    """The end of a prompt and the beginning of its answer, which keeps half of the room."""
    kept = answer[: max(room - len(prompt), room // 2)]
    left = room - len(kept)
    return (prompt[-left:] if left else []), kept


def _row(given: list[int], learnt: list[int]) -> Row:
    return given + learnt, [IGNORED] * len(given) + [LEARNT] * len(learnt)


def _end(tokenizer: Any) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
