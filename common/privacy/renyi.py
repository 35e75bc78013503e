"""Rényi divergences of Poisson-subsampled Gaussian steps, and the ε that follows from them.

    D(α) = log E[(1 - q + q exp(z/σ - 1/(2σ²)))^α] / (α - 1)      z standard normal

is the larger of the two directions of add/remove (Mironov, Talwar and Zhang 2019, theorem 5); it is
integrated in logarithms by the trapezoid rule, which for an analytic integrand that falls like a
Gaussian is exact to rounding. Conversion to (ε, δ): Balle et al. 2020, theorem 21, which is
Canonne, Kamath and Steinke 2020, proposition 12.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Steps = tuple[float, float, int]  # noise multiplier > 0, sampling rate, how many

ORDERS = (*(1 + tenth / 10 for tenth in range(1, 100)), *(float(whole) for whole in range(12, 64)))
MOST_POINTS = 1 << 17  # of the integral: fewer than needed below a noise multiplier of 0.03
REACH = 12.0  # standard deviations beyond the outermost peak: e^-72 of it


def epsilon_at(order: float, divergence: float, delta: float) -> float:
    """Upper bound of ε at `delta`, by the divergence of one order > 1; may be negative."""
    return divergence + math.log1p(-1 / order) - math.log(delta * order) / (order - 1)


def renyi_bound(history: Sequence[Steps], delta: float) -> float:
    """Upper bound of ε at `delta` for all steps together, by the best order; may be negative.

    ValueError where the noise is too small for the integral.
    """
    total = sum((_step(noise, rate) * count for noise, rate, count in history), np.zeros(1))
    return min(
        epsilon_at(order, float(divergence), delta)
        for order, divergence in zip(ORDERS, np.broadcast_to(total, len(ORDERS)), strict=True)
    )


@lru_cache(maxsize=1024)
def _step(noise: float, rate: float) -> Floats:
    """(orders,) Rényi divergence of one step at each of `ORDERS`."""
    if rate == 1:
        return np.array([order / (2 * noise**2) for order in ORDERS])
    # the integrand's nearest singularity lies πσ off the real line: half of σ is e^-39 of it
    spacing = min(1 / 8, noise / 2)
    points = (max(ORDERS) / noise + 2 * REACH) / spacing
    if not points <= MOST_POINTS:
        raise ValueError("beyond the range of the Rényi bound")
    z = -REACH + spacing * np.arange(math.ceil(points))
    ratio = np.logaddexp(math.log1p(-rate), math.log(rate) + z / noise - 1 / (2 * noise**2))
    weight = math.log(spacing / math.sqrt(2 * math.pi)) - z**2 / 2
    made = np.array([max(_log_sum(order * ratio + weight), 0.0) / (order - 1) for order in ORDERS])
    made.flags.writeable = False  # it is shared
    return made


def _log_sum(exponents: Floats) -> float:
    """log Σ exp, without overflow."""
    largest = float(exponents.max())
    return largest + math.log(float(np.exp(exponents - largest).sum()))
