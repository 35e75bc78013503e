"""FlexLoRA (Bai et al. 2024): the mean of the institutions' products B·A, cut to the rank by SVD.

Of all products of that rank it is the nearest to the mean (Eckart and Young 1936), so never further
from it than the product of the means is; and it is that mean where n institutions' products have
no more than `rank` directions between them. Singular values go to B, so that A has rows of length
1, and learns on, also where one of them is 0.

A and B come out in a basis of their own each round: nothing that remembers the one before
(momentum, an average of states) may follow. Each update is needed, so that masks are out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedlora.common.disk.mapped import let_go
from fedlora.common.model.state import AdapterSpec, AdapterState, Vector
from fedlora.server.strategies.robust import plain_mean

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Pair:
    """Where A (rank, in) and B (out, rank) of one layer lie in the flat vector."""

    a: slice
    b: slice
    rank: int

    def moved(self, vector: Vector, update: Vector) -> tuple[Floats, Floats]:
        """A and B after the update."""
        a, b = (vector[place].astype(np.float64) + update[place] for place in (self.a, self.b))
        return a.reshape(self.rank, -1), b.reshape(-1, self.rank)


def pairs(spec: AdapterSpec) -> Iterator[Pair]:
    """LoRA's pairs, layer by layer."""
    found = {tensor.name: (tensor, place) for tensor, place in spec.slices()}
    for name, (tensor, place) in found.items():
        twin = name.replace(".lora_A.", ".lora_B.")
        if twin != name and twin in found:
            yield Pair(place, found[twin][1], tensor.shape[0])


def mean_of_products(state: AdapterState, updates: Sequence[Vector], out: Floats) -> None:
    """Write the update, (size,), of n updates from `state`, that leads to the cut mean of products.

    Of all that is no LoRA, and where no LoRA moved, it is the mean. One layer is in memory at once.
    """
    plain_mean(updates, out)
    for pair in pairs(state.spec):
        if not (out[pair.a].any() or out[pair.b].any()):
            continue
        moved = [pair.moved(state.vector, update) for update in updates]
        left = np.hstack([b for _, b in moved]) / len(moved)
        a, b = cut(left, np.vstack([a for a, _ in moved]), pair.rank)
        out[pair.a], out[pair.b] = (
            a.ravel() - state.vector[pair.a],
            b.ravel() - state.vector[pair.b],
        )
        looked_at: Sequence[npt.NDArray[np.floating]] = (out, state.vector, *updates)
        for vector in looked_at:
            let_go(vector[pair.a], vector[pair.b])


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
