"""Measuring a state on public data: validation during the run, the test file at its end."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from fedlora.common.model.features import FeatureCache, length_batches
from fedlora.common.model.network import AdapterModel
from fedlora.common.model.state import AdapterState
from fedlora.common.tasks.batch import Batch, Encoded, Totals, add_totals, in_rows
from fedlora.common.tasks.task import WORD

EVALUATION_TOKENS = 8192
EVALUATION_RECORDS = 1024  # whose words a head answers at once


@dataclass(eq=False)
class Evaluator:
    """Scores states on one public data set. `head_only` scores reuse cached features."""

    name: str
    model: AdapterModel
    data: Encoded
    rows: np.ndarray[tuple[int], np.dtype[np.int64]]
    features: FeatureCache
    totals: Totals = field(default_factory=dict)  # of the last evaluation: confusion and sums

    def evaluate(self, state: AdapterState, head_only: bool = False) -> dict[str, float]:
        """Metrics of `state`; `head_only` where the rounds of a phase move the head alone."""
        self.totals = self._head_totals(state) if head_only else self._totals(state)
        return self.model.task.metrics(self.totals)

    @torch.no_grad()
    def _totals(self, state: AdapterState) -> Totals:
        self.model.load(state)
        parts = []
        for chosen in length_batches(self.data.lengths[self.rows], EVALUATION_TOKENS):
            batch = self.data.batch(self.rows[chosen], self.model.pad, self.model.device)
            parts.append(self.model.measure(batch))
        return add_totals(parts)

    @torch.no_grad()
    def _head_totals(self, state: AdapterState) -> Totals:
        kept = self.features.get(self.name, self.data, self.rows, state)
        self.model.load(state)
        scored, task, outputs = self.data.scored(self.rows), self.model.task, self.model.head(kept)
        targets = torch.from_numpy(self.data.targets[scored.records]).to(kept.device)
        if task.reads != WORD:
            return task.measure(outputs, Batch(targets, targets, targets))
        parts = []
        for start in range(0, len(scored), EVALUATION_RECORDS):
            offsets = torch.from_numpy(scored.offsets[start : start + EVALUATION_RECORDS + 1])
            some, count = slice(int(offsets[0]), int(offsets[-1])), len(offsets) - 1
            records = torch.repeat_interleave(offsets.diff()).to(kept.device)
            parts.append(task.measure(*in_rows(outputs[some], targets[some], records, count)))
        return add_totals(parts)
