"""A number to each text, or to each pair of texts, on a public scale.

The two ends of the scale are public and fixed, as a label set is, and travel as one. Targets are
moved by them alone to -1..1: nothing of the records decides what a loss weighs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from fedlora.common.config.task_names import scale_labels
from fedlora.common.data.records import Columns, Records
from fedlora.common.errors import BadInput
from fedlora.common.tasks.batch import Batch, Targets, Totals
from fedlora.common.tasks.classification import precise
from fedlora.common.tasks.task import Named
from fedlora.common.tasks.texts import TextTask, text_columns

SCORE = "score"  # of `Records.parts`: the number of each record
SHOWN = 2000  # pairs of truth and answer that a summary keeps


@dataclass(frozen=True)
class Regression(TextTask):
    """Half the squared error of a record's number. `labels` are the ends of the scale."""

    name: ClassVar[str] = "regression"

    @property
    def outputs(self) -> int:
        """One number."""
        return 1

    @property
    def ends(self) -> tuple[float, float]:
        """The least and the greatest number."""
        return scale_of(self.labels)

    @classmethod
    def columns(cls, named: Named) -> Columns:
        """The texts, and the column of numbers."""
        first, second = text_columns(named)
        return Columns(first, second=second, score=named.label)

    @classmethod
    def label_set(cls, path: Path, named: Named) -> tuple[str, ...]:
        """The two ends of the scale; BadInput where they are not given."""
        if not named.scale:
            raise BadInput(
                "[data] scale = []: expected the least and the greatest number, since task ="
                ' "regression"'
            )
        ends = scale_labels(named.scale)
        scale_of(ends)
        return ends

    def targets_of(self, records: Records) -> Targets:
        """(n,) float32: each number, moved to -1..1; BadInput for one beyond the scale."""
        if SCORE not in records.parts:
            raise BadInput(f"{records.where}: found no numbers, expected a column of them")
        numbers, (low, high) = np.array(records.parts[SCORE], dtype=np.float64), self.ends
        beyond = np.flatnonzero((numbers < low) | (numbers > high))
        if len(beyond):
            found = f"{records.place(int(beyond[0]))}: found {numbers[beyond[0]]:g}"
            raise BadInput(f"{found}, expected a number of the public scale {low:g} to {high:g}")
        return ((numbers - (low + high) / 2) / ((high - low) / 2)).astype(np.float32)

    def no_targets(self, count: int) -> Targets:
        """(n,) the middle of the scale."""
        return np.zeros(count, dtype=np.float32)

    def losses(self, outputs: torch.Tensor, batch: Batch) -> torch.Tensor:
        """(n,) half the squared error of `outputs` (n, 1), float32, or float64 where they are."""
        found = precise(outputs)[:, 0]
        return (found - batch.targets.to(found.dtype)).square() / 2

    def measure(self, outputs: torch.Tensor, batch: Batch) -> Totals:
        """Of `outputs` (n, 1): loss, examples, each record's number and the answer to it."""
        low, high = self.ends
        true = (batch.targets.double().cpu().numpy() + 1) * (high - low) / 2 + low
        return {
            "loss": np.array(self.losses(outputs, batch).double().sum().item()),
            "examples": np.array(float(len(true))),
            "true_each": true,
            "answer_each": np.array(self.answers(outputs, batch), dtype=np.float64),
        }

    def metrics(self, totals: Totals) -> dict[str, float]:
        """Mean loss; rank and linear correlation, 0 where an answer is always the same; the root
        of the mean squared error, in units of the scale.
        """
        from scipy.stats import pearsonr, spearmanr

        true, answers = totals["true_each"], totals["answer_each"]
        known = len(true) > 1 and np.ptp(true) > 0 and np.ptp(answers) > 0
        return {
            "loss": float(totals["loss"]) / float(totals["examples"]),
            "spearman": float(spearmanr(true, answers).statistic) if known else 0.0,
            "pearson": float(pearsonr(true, answers).statistic) if known else 0.0,
            "rmse": float(np.sqrt(np.mean((true - answers) ** 2))),
        }

    def details(self, totals: Totals) -> dict[str, Any]:
        """Truth and answer of the first records, and the scale."""
        pairs = np.stack([totals["true_each"], totals["answer_each"]], axis=1)[:SHOWN]
        return {"scale": list(self.ends), "answers": np.round(pairs, 4).tolist()}

    def answers(self, outputs: torch.Tensor, batch: Batch) -> list[float]:
        """A number of the scale for each record."""
        (low, high), found = self.ends, outputs[:, 0].double().cpu().numpy()
        numbers = (np.clip(found, -1, 1) + 1) * (high - low) / 2 + low
        return [float(number) for number in numbers]


def scale_of(labels: tuple[str, ...]) -> tuple[float, float]:
    """Two numbers from a label set; BadInput unless the first is the smaller one."""
    try:
        low, high = map(float, labels)
    except ValueError as error:
        raise BadInput(f"scale: found {[*labels]}, expected two numbers") from error
    if not -1e9 < low < high < 1e9:
        raise BadInput(f"scale: found {low:g} to {high:g}, expected the smaller number first")
    return low, high
