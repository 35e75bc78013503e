"""What a model is trained for: how records become tokens, an example's loss, the metrics.

A task joins the federation by implementing `Task`; the training loop, the clip and the server never
ask which one it is. Losses are per example and independent of one another: anything that couples
the examples of a batch would break the sensitivity that the clip gives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from fedlora.common.data.encoding import frame, opening, word_tokens
from fedlora.common.data.records import Records
from fedlora.common.errors import BadInput

Ints = npt.NDArray[np.int64]
Totals = dict[str, npt.NDArray[np.float64]]  # sums over examples: totals of two batches add up


@dataclass(frozen=True, eq=False)
class Encoded:
    """Tokenised records, ragged: record i is tokens[offsets[i]:offsets[i + 1]].

    `targets` is (n,): the class of a record, or the position of the first response token.
    """

    tokens: npt.NDArray[np.int32]
    offsets: Ints
    targets: Ints
    truncated: Mapping[str, int]  # how many records lost tokens, by part

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def lengths(self) -> Ints:
        """(n,) tokens of each record."""
        return np.diff(self.offsets)

    def tokens_of(self, row: int) -> npt.NDArray[np.int32]:
        """(length,) int32: the tokens of record `row`, a view."""
        return self.tokens[self.offsets[row] : self.offsets[row + 1]]

    def batch(
        self, rows: Ints, pad: int, device: torch.device, shape: tuple[int, int] | None = None
    ) -> Batch:
        """Pad the records `rows` to the longest of them, or fill up to `shape`: (records, tokens).

        What fills up is a text of padding that is read like any other; its target is 0.
        """
        lengths = self.offsets[rows + 1] - self.offsets[rows]
        count, width = (len(rows), int(lengths.max())) if shape is None else shape
        columns = np.arange(width)
        ids, real = (
            np.full((count, width), pad, dtype=np.int64),
            np.ones((count, width), dtype=np.int64),
        )
        inside = columns[None, :] < lengths[:, None]
        source = np.minimum(self.offsets[rows][:, None] + columns[None, :], len(self.tokens) - 1)
        ids[: len(rows)], real[: len(rows)] = np.where(inside, self.tokens[source], pad), inside
        targets = np.zeros(count, dtype=np.int64)
        targets[: len(rows)] = self.targets[rows]
        tokens, mask, aims = (torch.from_numpy(each).to(device) for each in (ids, real, targets))
        return Batch(tokens, mask, aims, shape is not None)


@dataclass(frozen=True, eq=False)
class Batch:
    """Model inputs: `ids` and `mask` are (n, length), `targets` is (n,).

    `fixed`: the shape was given, and no product may have one that follows from the targets.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    targets: torch.Tensor
    fixed: bool = False


class Task(Protocol):
    """One kind of fine-tuning."""

    @property
    def name(self) -> str:
        """As in a configuration."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Public label set; empty where the task has none."""

    def encode(self, records: Records, tokenizer: Any, max_length: int) -> Encoded:
        """Tokenise; BadInput where a record has nothing left to learn from."""

    def losses(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """(n,) float32, or float64 where the logits are: the loss of each example by itself."""

    def measure(self, logits: torch.Tensor, batch: Batch) -> Totals:
        """Sums from which `metrics` are computed; totals of batches add up."""

    def metrics(self, totals: Totals) -> dict[str, float]:
        """What a researcher reads: accuracy and so on. The key `loss` is always there."""


@dataclass(frozen=True)
class SequenceClassification:
    """One label of a public set to each text; cross entropy."""

    labels: tuple[str, ...]
    name: str = "sequence-classification"

    def encode(self, records: Records, tokenizer: Any, max_length: int) -> Encoded:
        """Each text framed as the tokenizer frames one, cut to `max_length`; `targets` are labels.

        BadInput where there are no labels, or a text has no token.
        """
        if records.labels is None:
            raise BadInput(f"{records.where}: found no labels, expected a label column")
        before, after = frame(tokenizer)
        room = max(0, max_length - len(before) - len(after))
        texts = word_tokens(tokenizer, records.texts)
        _refuse_empty([len(ids[:room]) for ids in texts], records)
        rows = [before + ids[:room] + after for ids in texts]
        shortened = sum(len(ids) > room for ids in texts)
        return _ragged(rows, records.labels, {"text": shortened})

    def losses(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """(n,) cross entropy of `logits` (n, labels), float32, or float64 where they are."""
        precise = logits if logits.dtype == torch.float64 else logits.float()
        return functional.cross_entropy(precise, batch.targets, reduction="none")

    def measure(self, logits: torch.Tensor, batch: Batch) -> Totals:
        """Of `logits` (n, labels): confusion by true row (labels, labels), loss, examples."""
        size = len(self.labels)
        guesses = logits.float().argmax(dim=1)
        pairs = torch.bincount(batch.targets * size + guesses, minlength=size * size)
        loss = self.losses(logits, batch).double().sum()
        return {
            "confusion": pairs.reshape(size, size).double().cpu().numpy(),
            "loss": np.array(loss.item()),
            "examples": np.array(float(len(guesses))),
        }

    def metrics(self, totals: Totals) -> dict[str, float]:
        """Mean loss, accuracy, and macro F1 over the classes that occur or were guessed, 0..1."""
        confusion = totals["confusion"]
        right, true, guessed = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
        present = (true + guessed) > 0  # a class that neither occurs nor is guessed has no F1
        f1 = 2 * right[present] / (true + guessed)[present]
        examples = float(totals["examples"])
        return {
            "loss": float(totals["loss"]) / examples,
            "accuracy": float(right.sum()) / examples,
            "macro_f1": float(f1.mean()),
        }


@dataclass(frozen=True)
class CausalLanguageModel:
    """Prompt and response; next-token cross entropy on the response alone, a mean for each example.

    What is too long loses the left of its prompt and the right of its response; the response keeps
    at least half of `max_length`.
    """

    labels: tuple[str, ...] = ()
    name: str = "causal-lm"

    def encode(self, records: Records, tokenizer: Any, max_length: int) -> Encoded:
        """Prompt and response as one text of at most `max_length`; the end of a prompt stays.

        A response keeps what the prompt leaves, and at least half of the room. `targets` are where
        it begins. BadInput where there is no column of responses, or a response has no token.
        """
        if records.responses is None:
            raise BadInput(
                f"{records.where}: found no responses, expected prompt and response columns"
            )
        begin = opening(tokenizer)
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        rows, starts, cut = [], [], {"prompt": 0, "response": 0}
        room = max_length - len(begin)
        responses = word_tokens(tokenizer, records.responses)
        _refuse_empty([len(ids) for ids in responses], records)
        for prompt, response in zip(word_tokens(tokenizer, records.texts), responses, strict=True):
            answer = response + end
            kept = answer[: max(room - len(prompt), room // 2)]
            left = room - len(kept)
            question = prompt[-left:] if left else []
            cut["prompt"] += len(question) < len(prompt)
            cut["response"] += len(kept) < len(answer)
            rows.append(begin + question + kept)
            starts.append(len(begin) + len(question))
        return _ragged(rows, np.array(starts, dtype=np.int64), cut)

    def losses(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """(n,) mean cross entropy of the tokens of each response; `logits` (n, length, words)."""
        return self.losses_of(self._by_word(logits, batch), batch)

    def measure(self, logits: torch.Tensor, batch: Batch) -> Totals:
        """Of `logits` (n, length, words): the loss of responses, their tokens, examples."""
        return self.measure_of(self._by_word(logits, batch), batch)

    def counted(self, batch: Batch) -> torch.Tensor:
        """(n, length - 1) whether the next word is of the response."""
        places = torch.arange(1, batch.ids.shape[1], device=batch.ids.device)
        return (places[None, :] >= batch.targets[:, None]) & (batch.mask[:, 1:] == 1)

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

    def _by_word(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """(n, length - 1) cross entropy of each next word."""
        return functional.cross_entropy(
            logits[:, :-1].float().transpose(1, 2), batch.ids[:, 1:], reduction="none"
        )


TASKS = {"sequence-classification": SequenceClassification, "causal-lm": CausalLanguageModel}


def task_named(name: str, labels: tuple[str, ...]) -> Task:
    """The task of a configuration, policy or manifest; BadInput where it names none."""
    if name == "sequence-classification":
        return SequenceClassification(labels)
    if name == "causal-lm":
        return CausalLanguageModel()
    raise BadInput(f"task: found {name!r}, expected sequence-classification or causal-lm")


def add_totals(totals: Sequence[Totals]) -> Totals:
    """Sum totals of batches by name; at least one is needed."""
    return {name: np.sum([each[name] for each in totals], axis=0) for name in totals[0]}


def _refuse_empty(lengths: Sequence[int], records: Records) -> None:
    empty = [row for row, length in enumerate(lengths) if length <= 0]
    if empty:
        raise BadInput(
            f"{records.place(empty[0])}: found nothing after tokenisation "
            f"({len(empty)} such rows), expected at least one token"
        )


def _ragged(rows: Sequence[Sequence[int]], targets: Ints, truncated: Mapping[str, int]) -> Encoded:
    offsets = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    tokens = np.fromiter(
        (token for row in rows for token in row), dtype=np.int32, count=int(offsets[-1])
    )
    return Encoded(tokens, offsets, np.ascontiguousarray(targets, dtype=np.int64), truncated)
