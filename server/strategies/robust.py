"""Means that a few hostile updates can't carry away: each takes (n, size) float64 to (size,).

They need every single update, so they are for runs in clear; under masks there is but a sum. What
they see is noised at the nodes already, so that none costs privacy. `hostile` is how many of the n
updates may be anything at all.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def coordinate_median(updates: Floats, hostile: int) -> Floats:
    """The median of each coordinate (Yin et al. 2018)."""
    median: Floats = np.median(updates, axis=0)
    return median


def trimmed_mean(updates: Floats, hostile: int) -> Floats:
    """Each coordinate's mean without its `hostile` largest and smallest (Yin et al. 2018)."""
    ordered = np.sort(updates, axis=0)
    kept: Floats = ordered[hostile : len(ordered) - hostile].mean(axis=0)
    return kept


def multi_krum(updates: Floats, hostile: int) -> Floats:
    """The mean of the n - `hostile` updates nearest to their neighbours (Blanchard et al. 2017).

    An update's score is the sum of its squared distances to the n - `hostile` - 2 others that are
    nearest to it.
    """
    neighbours = len(updates) - hostile - 2
    distances = np.sort(_squared_distances(updates), axis=1)[:, 1 : neighbours + 1]
    chosen = np.argsort(distances.sum(axis=1), kind="stable")[: len(updates) - hostile]
    mean: Floats = updates[np.sort(chosen)].mean(axis=0)
    return mean


def norm_filtered_mean(updates: Floats, hostile: int) -> Floats:
    """The mean, where no update is longer than their median length: longer ones are shortened.

    Sun et al. 2019, "Can you really backdoor federated learning?", with the median as the bound.
    """
    norms = np.linalg.norm(updates, axis=1)
    bound = np.median(norms)
    factors = np.where(norms > bound, bound / np.maximum(norms, np.finfo(float).tiny), 1.0)
    mean: Floats = (updates * factors[:, None]).mean(axis=0)
    return mean


def _squared_distances(updates: Floats) -> Floats:
    """(n, n), 0 on the diagonal; row by row, so that memory stays at a copy of the updates."""
    return np.stack([((updates - each) ** 2).sum(axis=1) for each in updates])


RobustMean = Callable[[Floats, int], Floats]
ROBUST_MEANS: dict[str, RobustMean] = {
    "median": coordinate_median,
    "trimmed-mean": trimmed_mean,
    "multi-krum": multi_krum,
    "norm-filter": norm_filtered_mean,
}
