"""FlexLoRA (Bai et al. 2024): the mean of the institutions' products B·A, cut to the rank by SVD.

Of all products of that rank it is the nearest to the mean (Eckart and Young 1936), so never further
from it than the product of the means is; and it is that mean where n institutions' products have
no more than `rank` directions between them. Singular values go to B, so that A has rows of length
1, and learns on, also where one of them is 0.

A and B come out in a basis of their own each round: nothing that remembers the one before
(momentum, an average of states) may follow. Each update is needed, so that masks are out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedlora.common.model.state import AdapterSpec, AdapterState

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Pair:
    """Where A (rank, in) and B (out, rank) of one layer lie in the flat vector."""

    a: slice
    b: slice
    rank: int

    def factors(self, vector: Floats) -> tuple[Floats, Floats]:
        """A and B."""
        return vector[self.a].reshape(self.rank, -1), vector[self.b].reshape(-1, self.rank)


def pairs(spec: AdapterSpec) -> Iterator[Pair]:
    """LoRA's pairs, layer by layer."""
    found = {tensor.name: (tensor, place) for tensor, place in spec.slices()}
    for name, (tensor, place) in found.items():
        twin = name.replace(".lora_A.", ".lora_B.")
        if twin != name and twin in found:
            yield Pair(place, found[twin][1], tensor.shape[0])


def mean_of_products(state: AdapterState, updates: Floats) -> Floats:
    """The update, (size,) of (n, size) from `state`, that leads to the cut mean of the products.

    Of all that is no LoRA, and where no LoRA moved, it is the mean.
    """
    before, update = state.vector.astype(np.float64), np.asarray(updates.mean(axis=0))
    for pair in pairs(state.spec):
        if not (update[pair.a].any() or update[pair.b].any()):
            continue
        moved = [pair.factors(before + each) for each in updates]
        left = np.hstack([b for _, b in moved]) / len(moved)
        a, b = cut(left, np.vstack([a for a, _ in moved]), pair.rank)
        update[pair.a], update[pair.b] = a.ravel() - before[pair.a], b.ravel() - before[pair.b]
    return update


def cut(left: Floats, right: Floats, rank: int) -> tuple[Floats, Floats]:
    """A (rank, in) and B (out, rank), whose B·A is nearest to `left` (out, k) · `right` (k, in)."""
    out, up = np.linalg.qr(left)
    across, down = np.linalg.qr(right.T)
    u, values, v = np.linalg.svd(up @ down.T, full_matrices=False)
    count = min(rank, len(values))
    a, b = np.zeros((rank, right.shape[1])), np.zeros((left.shape[0], rank))
    a[:count] = v[:count] @ across.T
    b[:, :count] = (out @ u[:, :count]) * values[:count]
    return a, b
