"""One label of a public set to each record: to a text, or to a pair of texts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from fedlora.common.data.records import Records
from fedlora.common.errors import BadInput
from fedlora.common.tasks.batch import Batch, Targets, Totals
from fedlora.common.tasks.task import HeadTask
from fedlora.common.tasks.texts import TextTask


@dataclass(frozen=True)
class Classification(HeadTask):
    """Cross entropy of a record's label, whatever the record is."""

    def targets_of(self, records: Records) -> Targets:
        """(n,) the place of each label in the label set."""
        if records.labels is None:
            raise BadInput(f"{records.where}: found no labels, expected a label column")
        return records.labels

    def losses(self, outputs: torch.Tensor, batch: Batch) -> torch.Tensor:
        """(n,) cross entropy of `outputs` (n, labels), float32, or float64 where they are."""
        return functional.cross_entropy(precise(outputs), batch.targets, reduction="none")

    def measure(self, outputs: torch.Tensor, batch: Batch) -> Totals:
        """Of `outputs` (n, labels): confusion by true row (labels, labels), loss, examples."""
        size = len(self.labels)
        guesses = outputs.float().argmax(dim=1)
        pairs = torch.bincount(batch.targets * size + guesses, minlength=size * size)
        loss = self.losses(outputs, batch).double().sum()
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

    def details(self, totals: Totals) -> dict[str, Any]:
        """The confusion matrix, and the recall of each class."""
        confusion = totals["confusion"]
        recalls = zip(self.labels, recall_by_class(confusion), strict=True)
        return {
            "confusion": confusion.astype(int).tolist(),
            "recall_by_class": {label: float(value) for label, value in recalls},
        }

    def answers(self, outputs: torch.Tensor, batch: Batch) -> list[str]:
        """The likeliest label of each record."""
        return [self.labels[int(best)] for best in outputs.argmax(dim=1)]


@dataclass(frozen=True)
class SequenceClassification(Classification, TextTask):
    """The label of a text, or of a pair of texts."""

    name: ClassVar[str] = "sequence-classification"


def recall_by_class(confusion: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """(labels,) of a confusion matrix by true row; 0 for a class that does not occur."""
    total: npt.NDArray[np.float64] = confusion.sum(axis=1)
    return np.diag(confusion) / np.maximum(total, 1.0)


def precise(outputs: torch.Tensor) -> torch.Tensor:
    """float32, or float64 where the outputs are."""
    return outputs if outputs.dtype == torch.float64 else outputs.float()
