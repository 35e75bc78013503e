"""How much noise so many steps need, about, by the limit of many steps: for rules of thumb alone.

A promise is made by `common.privacy.accountant`, whose bound is exact; this takes no time.
"""

from __future__ import annotations

import math
from statistics import NormalDist

MOST_EPSILON = 100.0  # beyond it, e^ε and the normal tails are rounding


def gaussian_mu(epsilon: float, delta: float) -> float:
    """The μ of a Gaussian mechanism that is (ε, δ)-private exactly (Dong, Roth and Su 2022)."""
    epsilon = min(epsilon, MOST_EPSILON)
    low, high = 1e-6, 1e3
    for _ in range(100):
        middle = math.sqrt(low * high)
        shift = epsilon / middle
        normal = NormalDist().cdf
        spent = normal(middle / 2 - shift) - math.exp(epsilon) * normal(-middle / 2 - shift)
        low, high = (middle, high) if spent < delta else (low, middle)
    return low


def about_sigma(mu: float, sampling_rate: float, steps: int) -> float:
    """About what keeps so many steps μ-private: a rate is no promise, and calibration is exact.

    By the limit of many steps (Bu et al. 2020): μ = q √steps √(exp(1 / σ²) - 1).
    """
    if sampling_rate == 1:
        return math.sqrt(steps) / mu
    return 1 / math.sqrt(math.log1p((mu / sampling_rate) ** 2 / steps))
