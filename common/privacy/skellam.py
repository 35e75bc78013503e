"""Distributed Skellam noise: what it costs, and how it is clipped for, drawn and checked.

A release is the sum of whole numbers that secure aggregation gives, plus independent Skellam noise
of variance μ on each coordinate: the difference of two Poisson variables. Sums of Skellam variables
are Skellam, so each institution adds a share of the noise, and those who stay carry all of it.

    Δ2 = levels + √d / 2     a clipped update in levels of the encoding, and its rounding
    Δ1 = min(√d Δ2, Δ2²)     of whole numbers
    ε(α) = α Δ2² / 2μ + min(((2α - 1) Δ2² + 6 Δ1) / 4μ², 3 Δ1 / 2μ)    whole α >= 2, μ = (σ Δ2)²

Neighbours differ in whether one institution's update is itself or zero, in a cohort that is fixed.
Where any update may become any other (`moved = 2`: what one record at an institution can do at
most), both sensitivities double.

Sources: Agarwal, Kairouz and Liu 2021, The Skellam Mechanism for Differentially Private Federated
Learning (the Rényi bound in d dimensions); Mironov 2017 (composition); Canonne, Kamath and Steinke
2020, proposition 12 (from Rényi to ε and δ); Loader 2000 (probabilities of Poisson without
cancellation).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedlora.common.errors import BadInput
from fedlora.common.manifest.manifest import Phase
from fedlora.common.model.state import Vector
from fedlora.common.privacy.randomness import Random

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

ORDERS = (*range(2, 256), *(math.ceil(256 * 1.05**step) for step in range(170)))  # to about 10^6
ROOM = 2.0**-20  # of the clip, left for rounding to float32 and for sums in float64
# of a Poisson variable: whole numbers and their differences stay exact in float64
LARGEST_RATE = 2.0**50
MOST_NOISE = 1e6  # a noise multiplier: far above any use, and its powers stay finite
_BLOCKS = 64  # on each side of the mean; the last is beyond 34 standard deviations
_CHUNK = 1 << 16  # trials at a time
_TABLE = 16  # probabilities of fewer events come from a table of factorials
_LOG_FACTORIALS = np.array([math.lgamma(k + 1) for k in range(_TABLE)])
_SMALL = 0.1  # of (k - rate) / (k + rate): where the series is used


@dataclass(frozen=True)
class Release:
    """`times` releases of one kind; the noise multiplier is √μ / Δ2, 0 is no noise."""

    noise_multiplier: float
    levels: int  # of the clip
    coordinates: int  # d: that are released, and noised
    times: int

    def __post_init__(self) -> None:
        # Each is a way to buy privacy for nothing.
        faults = []
        if not 0 <= self.noise_multiplier <= MOST_NOISE:  # also refuses nan
            faults.append(
                f"noise_multiplier: found {self.noise_multiplier}, expected 0 to {MOST_NOISE:g}"
            )
        for name, least in (("levels", 1), ("coordinates", 1), ("times", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                faults.append(f"{name}: found {value!r}, expected a whole number >= {least}")
        if faults:
            raise BadInput([f"release {fault}" for fault in faults])

    @property
    def sensitivity(self) -> float:
        """Δ2, in levels: an update's norm is `levels`, and rounding moves it by √d / 2 at most."""
        return self.levels + math.sqrt(self.coordinates) / 2

    @property
    def longest(self) -> float:
        """The L2 norm, in levels, that an encoded update may have: here it is clipped whole."""
        return self.sensitivity

    @property
    def variance(self) -> float:
        """μ, in levels: of the noise in a sum."""
        return (self.noise_multiplier * self.sensitivity) ** 2

    def share(self, carriers: int) -> float:
        """The variance each institution adds, so that any `carriers` of them add at least μ."""
        if carriers < 1:
            raise BadInput(f"noise carriers: found {carriers}, expected at least 1")
        # above: a quotient is rounded to either side
        return self.variance / carriers * (1 + 2.0**-40)

    def beyond(self, carriers: int) -> str:
        """Why a share of this noise can't be drawn, or "".

        A run that asks for it would charge and never release.
        """
        rate = self.share(carriers) / 2
        if rate <= LARGEST_RATE:
            return ""
        return (
            f"noise of {self.noise_multiplier:g} with {self.levels} levels: found a Poisson rate of"
            f" {rate:.3g}, expected at most 2^50"
        )

    def renyi(self, order: int, moved: int = 1) -> float:
        """ε(α) of one release; infinite without noise."""
        second, mu = moved * self.sensitivity, self.variance
        if mu < 1e-100:  # its square is not 0 above
            return math.inf
        first = min(math.sqrt(self.coordinates) * second, second**2)
        rest = min(((2 * order - 1) * second**2 + 6 * first) / (4 * mu**2), 3 * first / (2 * mu))
        return order * second**2 / (2 * mu) + rest


def releases(phases: Sequence[Phase], coordinates: Sequence[int], levels: int) -> list[Release]:
    """Of all attempts of each phase: a sum of so many coordinates, clipped to `levels`."""
    return [
        Release(phase.noise_multiplier, levels, count, phase.attempts)
        for phase, count in zip(phases, coordinates, strict=True)
    ]


def epsilon_of_releases(releases: Sequence[Release], delta: float, moved: int = 1) -> float:
    """Upper bound of ε at `delta` for all releases together; infinite where one has no noise."""
    if not 0 < delta < 1:
        raise BadInput(f"delta: found {delta}, expected above 0 and below 1")
    done = [each for each in releases if each.times > 0]
    if not done:
        return 0.0
    best = math.inf
    for order in ORDERS:
        total = sum(each.times * each.renyi(order, moved) for each in done)
        best = min(best, total + math.log1p(-1 / order) - math.log(delta * order) / (order - 1))
    return max(best, 0.0)


def clipped(update: Vector, bound: float) -> Vector:
    """`update` (float32) scaled to an L2 norm of `bound` less ROOM; zero where it is not finite.

    An update that is no number must not become a visible failure: whether it is one depends on the
    data.
    """
    if not (math.isfinite(bound) and bound > 0):
        raise BadInput(f"clip: found {bound}, expected a finite number > 0")
    norm = float(np.linalg.norm(update.astype(np.float64)))
    if not math.isfinite(norm):
        return np.zeros_like(update)
    scale = min(1.0, bound * (1 - ROOM) / norm) if norm else 1.0
    return (update.astype(np.float64) * scale).astype(np.float32)


def noised(
    source: Random, levels: Ints, moved: npt.NDArray[np.bool_], release: Release, carriers: int
) -> Ints:
    """An encoded update with this institution's share of the noise, where a phase moves it.

    BadInput where the update is longer than what is accounted for, or moves another coordinate:
    whoever clipped it, what leaves is checked as the whole numbers that it is.
    """
    norm = float(np.linalg.norm(levels.astype(np.float64)))
    if not norm <= release.longest:
        raise BadInput(f"update: found {norm:.10g} levels, expected at most {release.longest:.10g}")
    if levels[~moved].any():
        raise BadInput("update: found a change where the phase moves nothing")
    count = int(np.count_nonzero(moved))
    if count > release.coordinates:  # fewer cost less: the other half of LoRA may be the larger
        raise BadInput(
            f"update: found {count} coordinates that move, expected at most {release.coordinates}"
        )
    result = levels.copy()
    result[moved] += skellam(source, count, release.share(carriers))
    return result


def skellam(source: Random, n: int, variance: float) -> Ints:
    """(n,) independent Skellam variables of mean 0.

    The difference of two of Poisson at half the variance.
    """
    return poisson(source, n, variance / 2) - poisson(source, n, variance / 2)


def poisson(source: Random, n: int, rate: float) -> Ints:
    """(n,) independent Poisson variables, by rejection; BadInput unless 0 < rate <= 2⁵⁰.

    Blocks of width w, a power of two near √rate, lie to both sides of ⌊rate⌋. A proposal takes a
    side by one bit, the block b with probability 2^-(b+1) and a place in it uniformly: all three
    exactly, from whole words. It stays with probability p(k) / (M q(k)), by a uniform of 64 bits. p
    falls away from its mode, so M is the largest ratio at the blocks' inner ends: no ratio is above
    1.

    Error: log p is right to 1e-12, so each probability is to a factor 1 ± 1e-12; and the last
    uniform has 64 bits, so up to 2^-64 M q(k) of it is missing, which is less than 1e-18 of the
    mass in all.
    """
    if not 0 < rate <= LARGEST_RATE:  # also refuses nan
        raise BadInput(f"Poisson rate: found {rate}, expected above 0 and at most 2^50")
    hat = _Hat.of(rate)
    result = np.empty(n, dtype=np.int64)
    filled = 0
    while filled < n:
        kept = hat.trials(source, min(_CHUNK, 2 * (n - filled) + 16))[: n - filled]
        result[filled : filled + len(kept)] = kept
        filled += len(kept)
    return result


@dataclass(frozen=True)
class _Hat:
    """The proposal of `poisson` for one rate."""

    rate: float
    middle: int
    bits: int  # w = 2^bits
    log_bound: float  # log M

    @classmethod
    def of(cls, rate: float) -> _Hat:
        middle, bits = math.floor(rate), max(0, math.floor(math.log2(1.1 * math.sqrt(rate))))
        blocks = np.arange(_BLOCKS, dtype=np.int64)
        ends = np.stack([middle + (blocks << bits), middle - 1 - (blocks << bits)])
        ratios = log_poisson(ends, rate) - _log_proposal(blocks, bits)
        return cls(rate, middle, bits, float(ratios.max()))

    def trials(self, source: Random, n: int) -> Ints:
        """Those of `n` proposals that stay."""
        first, second, third = source.words(3 * n).reshape(3, n)
        run = first >> np.uint64(1) | np.uint64(1 << 63)  # ends every run of zeros
        # zeros at its end
        block = np.bitwise_count(run ^ (run - np.uint64(1))).astype(np.int64) - 1
        place = (block << self.bits) + (second & np.uint64((1 << self.bits) - 1)).astype(np.int64)
        value = np.where(first & np.uint64(1), self.middle - 1 - place, self.middle + place)
        ratio = log_poisson(value, self.rate) - _log_proposal(block, self.bits) - self.log_bound
        uniform = (third.astype(np.float64) + 1.0) * 2.0**-64
        return np.asarray(value[uniform <= np.exp(ratio)], dtype=np.int64)


def _log_proposal(block: Ints, bits: int) -> Floats:
    """log q(k) of each k in a block."""
    return -math.log(2.0) * (block.astype(np.float64) + 2.0 + bits)


def log_poisson(values: npt.NDArray[Any], rate: float) -> Floats:
    """log p(k) for whole numbers k of any sign.

    -∞ below 0, else right to 1e-12 where it is above -700. Loader's form: what is large cancels
    before it is computed, and Stirling's series has the rest.
    """
    k = np.maximum(values, _TABLE).astype(np.float64)
    gap = k - rate
    v = gap / (k + rate)
    square = np.minimum(v * v, _SMALL**2)
    series = np.zeros_like(v)
    for odd in range(19, 1, -2):
        series = (series + 1.0 / odd) * square
    deviance = np.where(
        np.abs(v) <= _SMALL, gap * v + 2.0 * k * v * series, k * np.log(k / rate) - gap
    )
    inverse = 1.0 / (k * k)
    stirling = (
        1 / 12 - (1 / 360 - (1 / 1260 - (1 / 1680 - inverse / 1188) * inverse) * inverse) * inverse
    ) / k
    result = -deviance - stirling - 0.5 * np.log(2.0 * math.pi * k)
    few = values < _TABLE
    if few.any():
        count = np.clip(values, 0, _TABLE - 1)
        table = count * math.log(rate) - rate - _LOG_FACTORIALS[count]
        result = np.where(few, np.where(values < 0, -np.inf, table), result)
    return np.asarray(result, dtype=np.float64)
