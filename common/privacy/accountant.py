"""Accounting: what Poisson-subsampled Gaussian steps cost, and the noise that keeps a budget.

Neighbouring data sets differ by adding or removing one unit. ε is the upper end of the privacy loss
that `common.privacy.privacy_loss` composes, for the pair "removed"; tests hold it against
dp-accounting's PLD, which composes both pairs and takes the worse. How wide it must look, the Rényi
bound of `common.privacy.renyi` says, which is also a second, looser, bound. Outside the range where
its arithmetic is known to hold, ε is infinite: never something smaller than the truth. Everything
here is a function of public numbers and needs numpy alone, so that anybody can run it and check it.
Which steps a run takes, its guarantee says; sums with shared noise are composed by
`common.privacy.skellam`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from fedlora.common.errors import BadInput
from fedlora.common.privacy.privacy_loss import composed_epsilon
from fedlora.common.privacy.renyi import Steps, renyi_bound

# as a privacy statement names it
ACCOUNTANT = "PRV (Gopi, Lee and Wutschitz 2021)"
RENYI = "Rényi (Mironov, Talwar and Zhang 2019)"

ACCURACY = 1.5e-3  # of a tail bound of ε: what the accountant may add for its discretisation
COARSEST = 0.5  # the domain is known to be safe for errors below 1
MOST_POINTS = 1 << 22  # of the accountant's mesh: seconds, and some 100 MB
MOST_MECHANISMS = 16  # distinct ones; a manifest from outside must not keep a node busy for hours
LARGEST_EPSILON = 200.0  # exp(-ε) and exp(ε) stay far inside double precision
# below it rounding errors of the Fourier transform are no longer small against δ
SMALLEST_DELTA = 1e-10
SMALLEST_RATE = 1e-9  # below it rounding takes over; a larger rate only costs more
# far above the norm of all coordinates whose squares are 0 in float32: 1e-15 of 10⁸ of them
SMALLEST_CLIP = 1e-6
LARGEST_NOISE = 1e4  # above it the loss is narrower than the mesh; less noise only costs more


@dataclass(frozen=True)
class Mechanism:
    """`steps` Poisson-subsampled Gaussian steps; noise relative to L2 sensitivity, 0 is none."""

    sampling_rate: float
    noise_multiplier: float
    steps: int

    def __post_init__(self) -> None:
        # Each is a way to buy privacy for nothing: fewer than no steps would be taken off the
        # others' cost.
        faults = []
        if not 0 <= self.sampling_rate <= 1:
            faults.append(f"sampling_rate: found {self.sampling_rate}, expected 0 to 1")
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier >= 0):
            faults.append(
                f"noise_multiplier: found {self.noise_multiplier}, expected a finite number >= 0"
            )
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 0:
            faults.append(f"steps: found {self.steps}, expected a whole number >= 0")
        if faults:
            raise BadInput([f"mechanism {fault}" for fault in faults])


@dataclass(frozen=True)
class Spend:
    """(ε, δ); spends of different runs add up."""

    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        for name, value in (("epsilon", self.epsilon), ("delta", self.delta)):
            if not (math.isfinite(value) and value >= 0):
                raise BadInput(f"spend {name}: found {value}, expected a finite number >= 0")

    def __add__(self, other: Spend) -> Spend:
        return Spend(self.epsilon + other.epsilon, self.delta + other.delta)


def epsilon_of(history: Sequence[Mechanism], delta: float) -> float:
    """Upper bound of ε at `delta` for all of `history` together; infinite where none is known.

    The order of the history does not matter, and equal mechanisms count as one of more steps.
    """
    if not 0 < delta < 1:
        raise BadInput(f"delta: found {delta}, expected above 0 and below 1")
    merged = tuple(_merged(history))
    if not merged:
        return 0.0
    if (
        any(noise == 0 for noise, *_ in merged)
        or delta < SMALLEST_DELTA
        or len(merged) > MOST_MECHANISMS
    ):
        return math.inf
    return _composed(merged, delta)


def renyi_epsilon(history: Sequence[Mechanism], delta: float) -> float:
    """A looser upper bound of ε, by Rényi divergences; infinite where none is known."""
    merged = _merged(history)
    if not merged:
        return 0.0
    if any(noise == 0 for noise, *_ in merged) or len(merged) > MOST_MECHANISMS:
        return math.inf
    try:
        return max(renyi_bound(merged, delta), 0.0)
    except (ValueError, ArithmeticError):
        return math.inf


def group_scales(noise_multiplier: float, clips: Sequence[float]) -> list[float]:
    """Noise deviation of each clip group, equal shares: Σ (C_g / s_g)² = 1 / noise_multiplier².

    One unit moves group g by at most C_g, so the mean of the scaled sum moves by at most 1 /
    noise_multiplier: the groups together are one Gaussian mechanism of that noise multiplier.
    """
    for name, values in (("noise_multiplier", [noise_multiplier]), ("clip", clips)):
        if not values or not all(math.isfinite(value) and value > 0 for value in values):
            raise BadInput(f"{name}: found {list(values)}, expected finite numbers > 0")
    return [clip * noise_multiplier * math.sqrt(len(clips)) for clip in clips]


def _merged(history: Sequence[Mechanism]) -> list[Steps]:
    """(noise multiplier, rate, steps) of what costs anything, within where arithmetic holds."""
    steps: Counter[tuple[float, float]] = Counter()
    for each in history:
        if each.steps > 0 and each.sampling_rate > 0:
            noise, rate = (
                min(each.noise_multiplier, LARGEST_NOISE),
                max(each.sampling_rate, SMALLEST_RATE),
            )
            steps[noise, rate] += each.steps
    return [(*mechanism, count) for mechanism, count in sorted(steps.items())]


@lru_cache(maxsize=1024)
def _composed(history: tuple[Steps, ...], delta: float) -> float:
    """The upper bound for (noise multiplier, rate, steps); infinite if not trustworthy.

    Once for all who ask in a process: the search for the noise, what is stated, each round's ε.
    """
    with np.errstate(all="ignore"):  # exp overflows far outside the mass: right
        try:
            steps = sum(count for *_, count in history)
            error = _discretisation(renyi_bound(history, delta / 4000), steps, delta)
            epsilon = composed_epsilon(history, delta, error)
        except (ValueError, ArithmeticError, MemoryError):
            return math.inf
    return max(epsilon, 0.0) if math.isfinite(epsilon) else math.inf


def _discretisation(tail: float, steps: int, delta: float) -> float:
    """The accountant's error of ε for a loss within ±`tail`: a small share, or the mesh's."""
    if not tail <= LARGEST_EPSILON:
        raise ValueError("beyond the accountant's range")
    # the mesh of Gopi et al.: error / √(steps · ln(12 / (δ / 1000)) / 2), over twice the tail and a
    # margin
    points_by_error = 2 * (tail + 4) * math.sqrt(steps * math.log(12_000 / delta) / 2)
    error = max(ACCURACY * tail, points_by_error / MOST_POINTS)
    if error > COARSEST:
        raise ValueError("beyond the accountant's range")
    return error
