"""What an evaluation counts: cells, their places in an institution's answer, and what they weigh.

Each kind of count sorts a record into one of its cells. A unit adds, for each kind, the mean over
its records of one-hot vectors, over the root of the number of kinds: whatever a model makes of its
records, an L2 norm of at most 1. So a unit more or less moves all counts by no more than that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedlora.common.config.task_names import CLASSIFIED
from fedlora.common.errors import BadInput
from fedlora.common.manifest.manifest import RunManifest
from fedlora.common.model.state import AdapterSpec, TensorSpec

RIGHT, CLASSES, CONFUSION, GROUPS, LOSS = "right", "classes", "confusion", "groups", "loss"
# of a record's loss: a cell below each, and one for what is above all, or no number
EDGES = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
MOST_CELLS = 1 << 16
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Cells:
    """The cells of `counts`, one kind after the other, for so many classes and named groups."""

    counts: tuple[str, ...]
    classes: int
    groups: int = 0

    @classmethod
    def of(cls, manifest: RunManifest) -> Cells:
        """The manifest's; BadInput where it evaluates nothing, or counts what can't be."""
        terms = manifest.evaluation
        if terms is None:
            raise BadInput("manifest evaluation: found none, expected its terms")
        named = manifest.groups.values if manifest.groups is not None else ()
        cells = cls(terms.counts, len(manifest.labels), len(named))
        if bool(named) != (GROUPS in terms.counts):
            raise BadInput("manifest groups: expected some where they are counted, and there alone")
        if terms.counts != (LOSS,) and (manifest.task not in CLASSIFIED or not cells.classes):
            raise BadInput(
                f'manifest evaluation counts: expected ["loss"] with task = {manifest.task[:80]!r},'
                " whose records have no one class"
            )
        if cells.size > MOST_CELLS:
            raise BadInput(
                f"manifest evaluation counts: found {cells.size} cells, expected at most"
                f" {MOST_CELLS}"
            )
        return cells

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of each kind of count."""
        known = {
            RIGHT: (2,),  # wrong, right
            CLASSES: (self.classes, 2),
            CONFUSION: (self.classes, self.classes),  # rows by the true class
            GROUPS: (self.groups + 1, 2),  # the last one is of all other values
            LOSS: (len(EDGES) + 1,),
        }
        return {kind: known[kind] for kind in self.counts}

    @property
    def size(self) -> int:
        """Of all kinds."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def weight(self) -> float:
        """What a unit adds to a kind's cells in all."""
        return 1 / math.sqrt(len(self.counts))

    @property
    def spec(self) -> AdapterSpec:
        """The answer's coordinates, as masks and wire take a vector."""
        return AdapterSpec(tuple(TensorSpec(*each) for each in self.shapes.items()))

    def named(self, vector: npt.NDArray[np.floating]) -> Mapping[str, Floats]:
        """(size,) sums as units: by kind, in its shape."""
        return {
            tensor.name: vector[place].astype(np.float64).reshape(tensor.shape) / self.weight
            for tensor, place in self.spec.slices()
        }

    def places(self, true: Ints, guesses: Ints, losses: Floats, groups: Ints) -> Ints:
        """(records, kinds) places of each record's cells: its class, answer, loss and group."""
        right = true == guesses
        known = {
            RIGHT: right,
            CLASSES: 2 * true + right,
            CONFUSION: self.classes * true + guesses,
            GROUPS: 2 * groups + right,
            LOSS: np.searchsorted(EDGES, losses),  # what is no number is sorted last
        }
        starts = [place.start for _, place in self.spec.slices()]
        columns = [start + known[kind] for start, kind in zip(starts, self.counts, strict=True)]
        return np.stack(columns, axis=1).astype(np.int64)


def answer_spec(manifest: RunManifest, phase: int, spec: AdapterSpec) -> AdapterSpec:
    """What an answer to a plan of this phase has: the adapter's coordinates, or counts."""
    if manifest.evaluation is None or phase < len(manifest.phases):
        return spec
    return Cells.of(manifest).spec
