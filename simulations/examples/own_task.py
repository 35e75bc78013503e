"""A task of one's own: classification whose targets are smoothed (Szegedy et al. 2016).

It shows what a task decides: a name, and a loss of each record by itself. Nothing may couple the
records of a batch, for the clip bounds what one record adds. All else is classification's: columns,
label set, metrics, answers. A package offers its task to configurations, and to institutions, under
the entry point `fedlora.tasks`:

    [project.entry-points."fedlora.tasks"]
    smoothed-classification = "my_package:SmoothedClassification"

    python -m fedlora.simulations.examples.own_task
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch.nn import functional

from fedlora.simulations import Batch, Options, Result, SequenceClassification, simulate
from fedlora.simulations.examples.private_federation import federation

SMOOTHED = 0.1  # of a target's weight that goes to all labels alike


@dataclass(frozen=True)
class SmoothedClassification(SequenceClassification):
    """Some training labels are wrong: none is worth being sure of."""

    name: ClassVar[str] = "smoothed-classification"

    def losses(self, outputs: torch.Tensor, batch: Batch) -> torch.Tensor:
        """(n,) of `outputs` (n, labels), each of its own record."""
        return functional.cross_entropy(
            outputs, batch.targets, reduction="none", label_smoothing=SMOOTHED
        )


def main(folder: Path, base: str = "minilm", rounds: int = 20) -> Result:
    """Train with `SmoothedClassification` in the configured task's place."""
    config = federation(folder, base, rounds)
    result = simulate(config, folder / "run", Options(threads=2), task=SmoothedClassification)
    print(f"{result.summary['task']}: accuracy {result.summary['accuracy']:.3f}")
    return result


if __name__ == "__main__":
    main(Path(sys.argv[1] if sys.argv[1:] else "runs/own_task"))
