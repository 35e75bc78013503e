"""Any number of labels of a public set to each text: each is a question of its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch.nn import functional

from fedlora.common.data.records import Columns, Records, read_label_lists
from fedlora.common.errors import BadInput
from fedlora.common.tasks.batch import Batch, Targets, Totals
from fedlora.common.tasks.classification import precise
from fedlora.common.tasks.scores import f1_of, table_of
from fedlora.common.tasks.task import Named
from fedlora.common.tasks.texts import TextTask, text_columns

LABELS = "labels"  # of `Records.parts`: places in the label set, a tuple for each record


@dataclass(frozen=True)
class MultiLabel(TextTask):
    """Binary cross entropy, a mean over the labels of each record."""

    name: ClassVar[str] = "multi-label"

    @classmethod
    def columns(cls, named: Named) -> Columns:
        """The texts, and the column of lists of labels."""
        first, second = text_columns(named)
        return Columns(first, second=second, labels=named.label)

    @classmethod
    def label_set(cls, path: Path, named: Named) -> tuple[str, ...]:
        """As configured, or the labels that occur in a public file."""
        return tuple(named.labels) or read_label_lists(path, named.label)

    def targets_of(self, records: Records) -> Targets:
        """(n, labels) float32: 1 for a label that a record has."""
        if LABELS not in records.parts:
            raise BadInput(f"{records.where}: found no labels, expected a column of lists of them")
        found = self.no_targets(len(records))
        for row, labels in enumerate(records.parts[LABELS]):
            found[row, list(labels)] = 1
        return found

    def no_targets(self, count: int) -> Targets:
        """(n, labels) zeros."""
        return np.zeros((count, len(self.labels)), dtype=np.float32)

    def losses(self, outputs: torch.Tensor, batch: Batch) -> torch.Tensor:
        """(n,) of `outputs` (n, labels), float32, or float64 where they are.

        Yes and no are two classes, since a softmax goes by rows: to the last bit, a record's loss
        and gradient are its own, which an elementwise logarithm's are not (`model.elementwise`).
        """
        yes = precise(outputs)
        log = functional.log_softmax(torch.stack([yes, torch.zeros_like(yes)], dim=2), dim=2)
        true = batch.targets.to(yes.dtype)
        return -(true * log[:, :, 0] + (1 - true) * log[:, :, 1]).mean(dim=1)

    def measure(self, outputs: torch.Tensor, batch: Batch) -> Totals:
        """Of `outputs` (n, labels): true, given and rightly given labels, records all right."""
        given, true = (each.double().cpu().numpy() for each in (outputs > 0, batch.targets))
        return {
            "true": true.sum(axis=0),
            "given": given.sum(axis=0),
            "right": (true * given).sum(axis=0),
            "exact": np.array(float((true == given).all(axis=1).sum())),
            "loss": np.array(self.losses(outputs, batch).double().sum().item()),
            "examples": np.array(float(len(true))),
        }

    def metrics(self, totals: Totals) -> dict[str, float]:
        """Mean loss; F1 of all labels together, and a mean over those that occur or were given;
        the share of records with exactly the right labels.
        """
        true, given, right = (totals[name] for name in ("true", "given", "right"))
        examples, present = float(totals["examples"]), true + given > 0
        each = [f1_of(*counts) for counts in zip(true, given, right, strict=True)]
        return {
            "loss": float(totals["loss"]) / examples,
            "micro_f1": f1_of(true.sum(), given.sum(), right.sum()),
            "macro_f1": float(np.mean(np.array(each)[present])) if present.any() else 0.0,
            "exact_match": float(totals["exact"]) / examples,
        }

    def details(self, totals: Totals) -> dict[str, Any]:
        """Precision, recall and F1 of each label."""
        return {"by_label": table_of(self.labels, totals)}

    def answers(self, outputs: torch.Tensor, batch: Batch) -> list[list[str]]:
        """The labels that are likelier than not."""
        return [
            [label for label, on in zip(self.labels, row, strict=True) if on]
            for row in (outputs > 0).tolist()
        ]
