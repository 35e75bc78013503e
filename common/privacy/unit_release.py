"""A sum of drawn and clipped units with Skellam noise: how far one unit moves it, what it costs.

Each institution draws its units by Poisson sampling at a public rate q, clips each unit's gradient,
adds them up and rounds the sum once. One unit more or less at one institution then moves the whole
numbers, for any draw of all other units, by

    Δ2 = L (1 + ROOM) + √d     L levels of a clip; each of d coordinates is rounded in either sum
    Δ1 = min(√d Δ2, Δ2²)       of whole numbers

Saturation moves no coordinate further apart. ROOM is for float64: the clip, the order of a sum of n
units (2 n² 2⁻⁵³ clips at most, whatever the order), and the scaling to levels; n <= MOST_UNITS.

    P0 = x + noise, P1 = x + Δ + noise        without the unit, with it; the mixture over all other
                                              draws costs at most what its worst term costs
    e^((α-1) D(α)) = Σ C(α,k) (1-q)^(α-k) q^k E_P0[(P1/P0)^k]                  ("removed")
                  <= Σ C(α,k) (1-q)^(α-k) q^k e^((k-1) ε(k))                   whole α >= 2

with ε(k) the bound of `common.privacy.skellam`, which holds for every Δ within Δ2 and Δ1. "Added"
costs no more, for Skellam noise is symmetric: x -> Δ - x swaps P0 and P1. docs/privacy.md has the
proof in full. No property of a Gaussian is used, and no further condition on the noise.

Sources: Mironov, Talwar and Zhang 2019, Rényi Differential Privacy of the Sampled Gaussian
Mechanism (the expansion, and theorem 5: the two directions under a symmetry); Zhu and Wang 2019,
Poisson Subsampled Rényi Differential Privacy (the expansion for any mechanism); Agarwal, Kairouz
and Liu 2021 (ε(k)).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from fedlora.common.errors import BadInput
from fedlora.common.manifest.manifest import Phase
from fedlora.common.privacy.accountant import SMALLEST_RATE
from fedlora.common.privacy.skellam import ORDERS, Release

ROOM = 2.0**-10  # of a clip, for what float64 rounds
MOST_UNITS = 1 << 20  # of one institution: ROOM is computed for as many in one draw
# of what a unit moves, beyond the clip: rounding and ROOM; a coarser grid is refused
COARSEST = 0.01
MOST_ORDER = 1024  # of a bound with amplification: its sum has as many terms
# of expected units whose gradients all lie in one coordinate: where a sum saturates
CAPACITY = 2.0


@dataclass(frozen=True)
class UnitRelease(Release):
    """`times` sums of units that join with probability `sampling_rate`; `levels` are of a clip."""

    sampling_rate: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.sampling_rate <= 1:
            raise BadInput(f"release sampling_rate: found {self.sampling_rate}, expected 0 to 1")

    @property
    def sensitivity(self) -> float:
        """Δ2, in levels."""
        return self.levels * (1 + ROOM) + math.sqrt(self.coordinates)

    @property
    def longest(self) -> float:
        """Nothing bounds a sum of units: a unit's own gradient is what is clipped."""
        return math.inf

    @property
    def coarse(self) -> str:
        """Why the grid is too coarse for what is stated of it, or ""."""
        if self.sensitivity <= (1 + COARSEST) * self.levels:
            return ""
        return (
            f"found {self.levels} levels of a clip for {self.coordinates} coordinates, whose"
            f" rounding is more than {COARSEST:.0%} of it"
        )

    def renyi(self, order: int, moved: int = 1) -> float:
        """ε(α) of one release with its draw; infinite without noise, or beyond MOST_ORDER.

        BadInput but for neighbours that differ by one unit: `moved` is 1.
        """
        if moved != 1:
            raise BadInput(f"release moved: found {moved}, expected 1: neighbours differ by a unit")
        if self.sampling_rate == 1:
            return super().renyi(order)
        if order > MOST_ORDER:
            return math.inf
        key = (self.noise_multiplier, self.levels, self.coordinates)
        return _sampled(*key, max(self.sampling_rate, SMALLEST_RATE))[order]


def unit_releases(
    phases: Sequence[Phase], coordinates: Sequence[int], levels: int
) -> list[UnitRelease]:
    """Of all attempts of each phase; `levels` from 0 to where a sum saturates (`CAPACITY`)."""
    return [
        UnitRelease(
            phase.noise_multiplier,
            math.ceil(levels / (CAPACITY * phase.expected_units)),
            count,
            phase.attempts,
            phase.sampling_rate,
        )
        for phase, count in zip(phases, coordinates, strict=True)
    ]


@lru_cache(maxsize=1024)
def _sampled(noise: float, levels: int, coordinates: int, rate: float) -> dict[int, float]:
    """ε(α) of one release by its order, to MOST_ORDER.

    Of Σ the terms k = 0 and 1 are what they are without a unit, and all binomial weights add up to
    1: what is beyond 1 is Σ_{k>=2} C(α,k) (1-q)^(α-k) q^k (e^((k-1) ε(k)) - 1), which does not
    cancel.
    """
    whole = UnitRelease(noise, levels, coordinates, 1)
    k = np.arange(2, MOST_ORDER + 1, dtype=np.float64)
    exponents = np.array([(order - 1) * whole.renyi(order) for order in range(2, MOST_ORDER + 1)])
    if not np.isfinite(exponents).all():
        return {order: math.inf for order in ORDERS if order <= MOST_ORDER}
    grown = exponents + np.log(-np.expm1(-exponents))  # log(e^x - 1)
    factorials = np.array([math.lgamma(n + 1) for n in range(MOST_ORDER + 1)])
    found = {}
    for order in (each for each in ORDERS if each <= MOST_ORDER):
        some = k[: order - 1]
        binomial = factorials[order] - factorials[2 : order + 1] - factorials[order - 2 :: -1]
        terms = binomial + (order - some) * math.log1p(-rate) + some * math.log(rate)
        found[order] = _log1p_sum(terms + grown[: order - 1]) / (order - 1)
    return found


def _log1p_sum(logarithms: np.ndarray[tuple[int], np.dtype[np.float64]]) -> float:
    """log(1 + Σ exp), upwards by more than what its terms round."""
    largest = float(logarithms.max())
    total = largest + math.log(float(np.exp(logarithms - largest).sum())) + 1e-9
    return float(np.logaddexp(0.0, total))
