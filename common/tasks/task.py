"""What the federation asks of a task; the training loop, the clip and the server never ask which.

A task joins by implementing `Task`. Losses are per record and independent of one another: anything
that couples the records of a batch would break the sensitivity that the clip gives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch

from fedlora.common.data.medium import Medium
from fedlora.common.data.records import Columns, Records, read_label_set
from fedlora.common.data.values import a_text
from fedlora.common.errors import BadInput
from fedlora.common.tasks.batch import Batch, Encoded, Ints, Targets, Totals

# What a task reads its answers from.
RECORD = "record"  # a head's numbers for each record
WORD = "word"  # a head's numbers for each token
TRANSLATION = "translation"  # the scores of a base that reads a text and writes another
LANGUAGE = "language"  # the base's own scores of each next word
Answer = Any  # what JSON holds


class Named(Protocol):
    """The columns that a configuration or a policy names; "" and () where it names none."""

    @property
    def text(self) -> tuple[str, ...]:
        """One text, or the two of a pair."""

    @property
    def image(self) -> str:
        """Images: bytes, or paths of files."""

    @property
    def audio(self) -> str:
        """Sounds, likewise."""

    @property
    def label(self) -> str:
        """What a record is."""

    @property
    def labels(self) -> tuple[str, ...]:
        """The public label set."""

    @property
    def scale(self) -> tuple[float, ...]:
        """The public ends of what a number may be."""

    @property
    def tokens(self) -> str:
        """A list of words."""

    @property
    def tags(self) -> str:
        """A list of their tags, or of spans."""

    @property
    def messages(self) -> str:
        """A list of messages."""

    @property
    def prompt(self) -> str:
        """What is answered."""

    @property
    def response(self) -> str:
        """The answer."""


class Task(Protocol):
    """One kind of fine-tuning, for a public label set."""

    name: ClassVar[str]  # as in a configuration
    reads: ClassVar[str]  # RECORD, WORD, LANGUAGE or TRANSLATION
    medium: ClassVar[Medium | None]  # of its records; None: they are text

    def __init__(self, labels: tuple[str, ...]) -> None: ...

    @classmethod
    def columns(cls, named: Named) -> Columns:
        """Which columns hold what; BadInput where one is missing, or two don't go together."""

    @classmethod
    def label_set(cls, path: Path, named: Named) -> tuple[str, ...]:
        """The public label set, as configured or of a *public* file."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Public label set; empty where the task has none."""

    @property
    def outputs(self) -> int:
        """Numbers that a head gives; 0 where the task has no head of its own."""

    def encode(self, records: Records, tokenizer: Any, max_length: int) -> Encoded:
        """Tokenise; BadInput where a record has nothing left to learn from.

        Of another medium `tokenizer` is the base's own processor, and every record as long as
        `max_length`.
        """

    def unlabelled(self, tokens: Any, offsets: Ints) -> Encoded:
        """Texts of nobody's, (tokens,) int32 and (n + 1,), with targets of nobody's.

        Of another medium (n, …) float32 values, and how long each counts as.
        """

    def asked(self, inputs: Sequence[Any]) -> Records:
        """Inputs to be answered as records without anything to learn: a text each, say."""

    def losses(self, outputs: torch.Tensor, batch: Batch) -> torch.Tensor:
        """(n,) float32, or float64 where the outputs are: the loss of each record by itself."""

    def measure(self, outputs: torch.Tensor, batch: Batch) -> Totals:
        """Sums from which `metrics` are computed; totals of batches add up."""

    def metrics(self, totals: Totals) -> dict[str, float]:
        """What a researcher reads: accuracy and so on. The key `loss` is always there."""

    def details(self, totals: Totals) -> dict[str, Any]:
        """What else a summary keeps of the test file's totals, for the report."""

    def answers(self, outputs: torch.Tensor, batch: Batch) -> list[Answer]:
        """What a person is told for each record; a language model writes its answers itself."""


@dataclass(frozen=True)
class HeadTask:
    """What tasks have in common whose head answers each record: for texts, `tasks.texts.TextTask`.

    Left to say are `name`, `medium`, `columns`, how records are encoded, and what is learnt.
    """

    labels: tuple[str, ...]
    reads: ClassVar[str] = RECORD

    @property
    def outputs(self) -> int:
        """Numbers that a head gives for each record: one for each label."""
        return len(self.labels)

    @classmethod
    def label_set(cls, path: Path, named: Named) -> tuple[str, ...]:
        """As configured, or the labels that occur in a public file."""
        return tuple(named.labels) or read_label_set(path, named.label)

    def targets_of(self, records: Records) -> Targets:
        """(n, …) what each record should be answered with; BadInput where that is missing."""
        raise NotImplementedError

    def no_targets(self, count: int) -> Targets:
        """(n, …) of records of nobody's."""
        return np.zeros(count, dtype=np.int64)

    def details(self, totals: Totals) -> dict[str, Any]:
        """Nothing more."""
        return {}


TaskKind = type[Task]  # a task before its label set is known


def refuse_empty(lengths: Sequence[int], records: Records) -> None:
    """BadInput where a record has no token to learn from."""
    empty = [row for row, length in enumerate(lengths) if length <= 0]
    if empty and not records.unanswered:
        raise BadInput(
            f"{records.place(empty[0])}: found nothing after tokenisation "
            f"({len(empty)} such rows), expected at least one token"
        )


def as_inputs(inputs: Sequence[Any], parts: Mapping[str, Any] | None = None) -> Records:
    """Texts to be answered, as records; BadInput names the first that is none."""
    texts = [a_text(each, f"input {number}") for number, each in enumerate(inputs, 1)]
    return Records(texts, None, None, None, {}, "texts", unanswered=True, parts=parts or {})
