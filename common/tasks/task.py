"""What the federation asks of a task; the training loop, the clip and the server never ask which.

A task joins by implementing `Task`. Losses are per record and independent of one another: anything
that couples the records of a batch would break the sensitivity that the clip gives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch

from fedlora.common.data.records import Columns, Records
from fedlora.common.errors import BadInput
from fedlora.common.tasks.batch import Batch, Encoded, Ints, Totals

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
        """Tokenise; BadInput where a record has nothing left to learn from."""

    def unlabelled(self, tokens: Any, offsets: Ints) -> Encoded:
        """Texts of nobody's, (tokens,) int32 and (n + 1,), with targets of nobody's."""

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
    """Texts to be answered, as records."""
    texts = [str(each) for each in inputs]
    return Records(texts, None, None, None, {}, "texts", unanswered=True, parts=parts or {})
