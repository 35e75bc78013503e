"""Whether a base behaves: one pass over public text, before anything is charged.

Every process that builds a network tries it, on sentences that anybody may read and with an adapter
of values of its own: what a coordinator chose could hide a fault, and nobody's text may decide
whether a run begins. `CHECKS` are what is tried; a new one is a function of a `Trial`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from fedlora.common.errors import BadInput
from fedlora.common.model.inputs import Inputs
from fedlora.common.tasks.batch import Batch, Encoded
from fedlora.common.tasks.task import Task

SENTENCES = (
    "The bank sent me a new card, but the old one was charged twice on Monday.",
    "No fever, no pain; she will come back in two weeks for another test.",
    "What is the capital of France?",
    "ok",
)
# Tokens. A longer text is not tried: its attention alone could take more memory than training does.
LONGEST = 2048
# Of the largest value: what float32 may lose where products have other shapes.
TOLERANCE = 1e-3


Forward = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # of ids and mask


class Probed(Protocol):
    """What is tried of a `common.model.network.AdapterModel`."""

    task: Task
    inputs: Inputs
    device: torch.device
    longest: int

    @property
    def network(self) -> nn.Module:
        """With the embeddings that records go through."""

    @property
    def pad(self) -> int:
        """What fills a batch up."""


@dataclass(frozen=True, eq=False)
class Trial:
    """A network under values of its own, the short sentences in one batch, and a text cut off."""

    model: Probed
    forward: Forward
    short: Encoded
    full: Encoded

    @classmethod
    def of(cls, model: Probed, forward: Forward) -> Trial:
        """A trial on public sentences, among them one of full length."""
        long = " ".join(SENTENCES * (1 + min(model.longest, LONGEST) // 8))
        short, full = (
            model.inputs.public(model.task, texts, min(model.longest, LONGEST))
            for texts in (SENTENCES, [long])
        )
        return cls(model, forward, short, full)

    @property
    def together(self) -> Batch:
        """The short sentences as one batch."""
        return self.short.batch(np.arange(len(self.short)), self.model.pad, self.model.device)

    def answers(self, batch: Batch) -> torch.Tensor:
        """The logits of a batch, float32, without gradients."""
        with torch.no_grad():
            return self.forward(batch.ids, batch.mask).float()


def probe(model: Probed, forward: Forward) -> float:
    """Try `CHECKS` on a model under values of our own; the seconds that it took.

    `forward` goes through all of it that is there: a head may wait for a projection. BadInput says
    what was found and what was expected.
    """
    started, trial = time.perf_counter(), Trial.of(model, forward)
    for check in CHECKS:
        check(trial)
    return time.perf_counter() - started


def finite(trial: Trial) -> None:
    """All that comes out is a number."""
    found = int((~torch.isfinite(trial.answers(trial.together))).sum())
    if found:
        raise BadInput(f"[model] base: found {found} values that are not finite on public text")


def repeatable(trial: Trial) -> None:
    """The same batch gives the same bits."""
    first, second = (trial.answers(trial.together) for _ in range(2))
    if not torch.equal(first, second):
        raise BadInput(
            "[model] base: found two passes over one batch that differ, expected no dropout and no"
            " other randomness"
        )


def alone(trial: Trial) -> None:
    """What comes of a text depends neither on padding nor on the texts beside it."""
    together = trial.answers(trial.together)
    for row, length in enumerate(trial.short.lengths):
        batch = trial.short.batch(np.array([row]), trial.model.pad, trial.model.device)
        by_itself, beside = trial.answers(batch)[0], together[row]
        if by_itself.ndim == 2:  # of a language model: its words, not the padding
            by_itself, beside = by_itself[:length], beside[:length]
        most = float((by_itself - beside).abs().max())
        if not most <= TOLERANCE * float(by_itself.abs().max()):
            raise BadInput(
                f"[model] base: found values that move by {most:.2g} with padding or with other"
                " texts in the batch, expected each text's to be its own"
            )


def full_length(trial: Trial) -> None:
    """A text of `max_length` tokens fits, and gives numbers."""
    model = trial.model
    batch = trial.full.batch(np.zeros(1, dtype=np.int64), model.pad, model.device)
    where = f"[model] max_length = {model.longest}"
    try:
        with _embeddings_hold(model.network) as asked:
            answers = trial.answers(batch)
    except (IndexError, RuntimeError, ValueError) as error:
        raise BadInput(
            f"{where}: found no way to read a text of {batch.ids.shape[1]} tokens"
            f" ({_first_line(error)}), expected a base with as many positions"
        ) from error
    if not bool(torch.isfinite(answers).all()):
        raise BadInput(f"{where}: found values that are not finite for a text of that length")
    if model.longest <= LONGEST or model.inputs.one_length:
        return
    for rows, each in asked.items():
        last = each.last_of(batch.ids.shape[1], model.longest)
        if last >= rows:
            raise BadInput(
                f"{where}: found an embedding of {rows} positions, of which a text of that length"
                f" asks for row {last}, expected a base with as many"
            )


CHECKS: tuple[Callable[[Trial], None], ...] = (finite, repeatable, alone, full_length)


@dataclass(frozen=True)
class _Asked:
    """What a pass asked of a table: its largest row, and how many."""

    largest: int
    distinct: int

    def last_of(self, tokens: int, longest: int) -> int:
        """The row that a text of `longest` tokens asks for, where one of `tokens` asked for this.

        Where rows are positions, one for each token or, of pairs read apart, for each two; words
        come again, and distances are few.
        """
        by_token = round(2 * self.distinct / tokens) / 2
        return self.largest + int((longest - tokens) * by_token)


@contextmanager
def _embeddings_hold(network: nn.Module) -> Iterator[dict[int, _Asked]]:
    """IndexError before an embedding is asked for a row that it has not.

    On a GPU the kernel itself would end the process's use of it. Yields what was asked, by rows.
    """
    found: dict[int, _Asked] = {}

    def check(module: nn.Module, inputs: Any) -> None:
        rows = getattr(module, "num_embeddings", 0)
        if not inputs or not inputs[0].numel():
            return
        asked = _Asked(int(inputs[0].max()), len(inputs[0].unique()))
        if asked.largest >= rows:
            raise IndexError(f"row {asked.largest} of an embedding of {rows}")
        found[rows] = max(found.get(rows, asked), asked, key=lambda each: each.distinct)

    tables = [module for module in network.modules() if _takes_rows(module)]
    hooks = [table.register_forward_pre_hook(check) for table in tables]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _takes_rows(module: nn.Module) -> bool:
    """Whether it is a table that is called with numbers of its rows, as `nn.Embedding` is.

    BART's positions are one that is called with words, and counts them.
    """
    return isinstance(module, nn.Embedding) and "input" in signature(module.forward).parameters


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:120]
