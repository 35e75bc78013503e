"""Means that a few hostile updates can't carry away: of n updates, (size,), written to `out`.

They need every single update, so they are for runs in clear; under masks there is but a sum. What
they see is noised at the nodes already, so that none costs privacy. `hostile` is how many of the n
updates may be anything at all. All go by stretches, for updates may be larger than memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from fedlora.common.disk.mapped import by_stretches

Floats = npt.NDArray[np.float64]
Updates = Sequence[npt.NDArray[np.floating]]


def coordinate_median(updates: Updates, hostile: int, out: Floats) -> None:
    """The median of each coordinate (Yin et al. 2018)."""
    for mean, stretch in _rows(updates, out):
        mean[:] = np.median(stretch, axis=0)


def trimmed_mean(updates: Updates, hostile: int, out: Floats) -> None:
    """Each coordinate's mean without its `hostile` largest and smallest (Yin et al. 2018)."""
    for mean, stretch in _rows(updates, out):
        mean[:] = np.sort(stretch, axis=0)[hostile : len(updates) - hostile].mean(axis=0)


def multi_krum(updates: Updates, hostile: int, out: Floats) -> None:
    """The mean of the n - `hostile` updates nearest to their neighbours (Blanchard et al. 2017).

    An update's score is the sum of its squared distances to the n - `hostile` - 2 others that are
    nearest to it.
    """
    neighbours = len(updates) - hostile - 2
    distances = np.sort(_squared_distances(updates, out), axis=1)[:, 1 : neighbours + 1]
    chosen = np.argsort(distances.sum(axis=1), kind="stable")[: len(updates) - hostile]
    plain_mean([updates[place] for place in np.sort(chosen)], out)


def norm_filtered_mean(updates: Updates, hostile: int, out: Floats) -> None:
    """The mean, where no update is longer than their median length: longer ones are shortened.

    Sun et al. 2019, "Can you really backdoor federated learning?", with the median as the bound.
    """
    norms = np.sqrt(sum(np.square(stretch).sum(axis=1) for _, stretch in _rows(updates, out)))
    bound = np.median(norms)
    factors = np.where(norms > bound, bound / np.maximum(norms, np.finfo(float).tiny), 1.0)
    for mean, stretch in _rows(updates, out):
        mean[:] = (stretch * factors[:, None]).mean(axis=0)


def plain_mean(updates: Updates, out: Floats) -> None:
    """The mean of each coordinate, which one update alone carries anywhere."""
    for mean, stretch in _rows(updates, out):
        mean[:] = stretch.mean(axis=0)


def _squared_distances(updates: Updates, out: Floats) -> Floats:
    """(n, n), 0 on the diagonal."""
    found = np.zeros((len(updates), len(updates)))
    for _, stretch in _rows(updates, out):
        found += np.stack([((stretch - each) ** 2).sum(axis=1) for each in stretch])
    return found


def _rows(updates: Updates, out: Floats) -> Iterator[tuple[Floats, Floats]]:
    """Stretch by stretch: where `out` is written, (k,), and the updates there, (n, k)."""
    for mean, *parts in by_stretches(out, *updates, rows=len(updates)):
        yield mean, np.stack(parts, dtype=np.float64)


RobustMean = Callable[[Updates, int, Floats], None]
ROBUST_MEANS: dict[str, RobustMean] = {
    "median": coordinate_median,
    "trimmed-mean": trimmed_mean,
    "multi-krum": multi_krum,
    "norm-filter": norm_filtered_mean,
}
