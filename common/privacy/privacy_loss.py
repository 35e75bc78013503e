"""The privacy loss of Poisson-subsampled Gaussian steps, composed numerically: an upper bound of ε.

Gopi, Lee and Wutschitz 2021, Numerical Composition of Differential Privacy. One step's loss is

    L = log(1 - q + q exp((2x - 1) / (2σ²)))      x of (1 - q) N(0, σ²) + q N(1, σ²)

It is cut to a domain, discretised on a mesh by its distribution function, shifted to the mean that
it had, and composed with itself and the others by Fourier transform (algorithm 1). What cutting and
rounding may cost is added (theorem 5.5): ε is read at δ (1 - LOST), less what the transform's own
rounding may have moved, and `error` is added. Opacus has the same algorithm, without the latter;
tests hold the two together to 2e-6, and dp-accounting's PLD below both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedlora.common.privacy.renyi import Floats, Steps, renyi_bound

LOST = 1e-3  # of δ: for what lies outside the domain
# Of δ, for each step: a spectrum to the power of the steps carries its rounding so many times.
# Against the exact curve of 10⁶ to 10⁸ Gaussian steps a bound that ignored it was up to 7 % low.
ROUNDED = 2.0**-51
MARGIN = 3.0  # of the domain, beyond the tail bound (remark 5.6)
FLAT = 9.0  # standard deviations beyond which a Gaussian's tail is less than rounding
REACH = 14.0  # standard deviations of a loss whose mean is integrated: e^-98 is beyond
PANEL = np.polynomial.legendre.leggauss(16)  # nodes and weights on [-1, 1]


@dataclass(frozen=True)
class Mesh:
    """Losses `spacing · (i - zero)`, i = 0 to 2 zero + 1: an even number of them."""

    spacing: float
    zero: int

    @property
    def size(self) -> int:
        """How many."""
        return 2 * self.zero + 2

    @property
    def points(self) -> Floats:
        """(size,) losses."""
        return self.spacing * (np.arange(self.size, dtype=np.float64) - self.zero)


def composed_epsilon(history: Sequence[Steps], delta: float, error: float) -> float:
    """Upper bound of ε at `delta` for all steps together, `error` of it for the discretisation.

    ValueError where rounding leaves none that is known.
    """
    steps = sum(count for *_, count in history)
    sure = (1 - LOST) * delta - ROUNDED * steps
    if sure < delta / 2:
        raise ValueError("so many steps round away a δ so small")
    mesh = _mesh(history, steps, delta, error)
    spectrum, shift = np.ones(mesh.size // 2 + 1, dtype=np.complex128), 0.0
    for noise, rate, count in history:
        masses, moved = _discretised(noise, rate, mesh)
        spectrum *= np.fft.rfft(masses) ** count
        shift += moved * count
    # an index counts its distance from `zero`, a sum of indices every step's: all but one go
    masses = np.roll(np.fft.irfft(spectrum, mesh.size), -(steps - 1) * mesh.zero % mesh.size)
    return _epsilon(masses, mesh.points + shift, sure) + error


def _mesh(history: Sequence[Steps], steps: int, delta: float, error: float) -> Mesh:
    """As wide as the tails of the whole and of each step ask for, and as fine as the error."""
    lost = LOST * delta
    single = max(renyi_bound([(*each[:2], 1)], lost / (8 * steps)) for each in history)
    half = max(renyi_bound(history, lost / 4), single, error) + MARGIN
    spacing = error / math.sqrt(steps * math.log(12 / lost) / 2)
    return Mesh(spacing, math.ceil(half / spacing))


def _discretised(noise: float, rate: float, mesh: Mesh) -> tuple[Floats, float]:
    """(size,) probability of each cell of the mesh, and what is to be added to every loss."""
    low, high = -mesh.zero * mesh.spacing, (mesh.zero + 1) * mesh.spacing
    edges = mesh.spacing * (np.arange(mesh.size + 1, dtype=np.float64) - mesh.zero - 0.5)
    edges[0], edges[-1] = low, high  # the loss is cut there
    masses = -np.diff(_exceeding(edges, noise, rate))
    inside = float(masses.sum())
    masses /= inside
    moved = _mean(low, high, noise, rate) / inside - float(mesh.points @ masses)
    if not abs(moved) < mesh.spacing / 2:  # each loss moved by less than that: rounding took over
        raise ValueError("the loss's mean is not known")
    return masses, moved


def _exceeding(losses: Floats, noise: float, rate: float) -> Floats:
    """(n,) P(L > loss): of two Gaussians, at the x that has this loss.

    Not the distribution function, which is 1 to rounding where δ is decided.
    """
    x = _outcome(losses, noise, rate)
    return rate * _upper_tail((x - 1) / noise) + (1 - rate) * _upper_tail(x / noise)


def _outcome(losses: Floats, noise: float, rate: float) -> Floats:
    """(n,) x whose loss it is, -∞ where every loss is larger."""
    excess = np.expm1(losses) / rate
    log = np.log1p(np.where(excess > -1, excess, 0.0))
    return np.where(excess > -1, noise**2 * log + 0.5, -np.inf)


def _upper_tail(z: Floats) -> Floats:
    """(n,) P(N(0, 1) > z)."""
    tail = np.where(z < 0, 1.0, 0.0)
    bent = np.abs(z) < FLAT
    tail[bent] = [0.5 * math.erfc(each) for each in (z[bent] / math.sqrt(2)).tolist()]
    return tail


def _mean(low: float, high: float, noise: float, rate: float) -> float:
    """E[L; low < L < high], by Gauss and Legendre on panels of half a deviation at most.

    Of σ at most, too: the loss has a singularity πσ deviations off the real line.
    """
    ends = _outcome(np.array([low, high]), noise, rate) / noise
    first, last = np.clip(ends, -REACH, 1 / noise + REACH)
    edges = np.linspace(first, last, math.ceil((last - first) / min(0.5, noise)) + 1)
    half, middle = np.diff(edges)[:, None] / 2, (edges[1:] + edges[:-1])[:, None] / 2
    z = middle + half * PANEL[0]
    loss = np.log1p(rate * np.expm1(z / noise - 1 / (2 * noise**2)))
    density = (1 - rate) * np.exp(-(z**2) / 2) + rate * np.exp(-((z - 1 / noise) ** 2) / 2)
    return float((half * PANEL[1] * loss * density).sum() / math.sqrt(2 * math.pi))


def _epsilon(masses: Floats, losses: Floats, delta: float) -> float:
    """The ε where the hockey-stick divergence Σ max(0, 1 - exp(ε - L)) passes `delta`."""
    above = np.cumsum(masses[::-1])[::-1]
    tilted = np.cumsum((masses * np.exp(-losses))[::-1])[::-1]
    place = int(np.searchsorted(np.exp(losses) * tilted - above, -delta))
    if not 0 < place < len(losses):
        raise ValueError("no loss is as large as that")
    return float(np.log((above[place] - delta) / tilted[place]))
