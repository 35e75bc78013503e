"""The Rényi bound of Poisson-subsampled Gaussian steps: Opacus', at a cost nothing drives up.

Divergences are Opacus' (Mironov, Talwar and Zhang 2019), and so is the conversion to ε. At rates
near 1/2 the series of a fractional order is long: there the orders below 3 are bounded by a chord
between whole ones. An upper bound of a divergence makes an upper bound of ε.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

ORDERS = (*(1 + tenth / 10 for tenth in range(1, 100)), *range(12, 64))  # Opacus' own
QUICK_ORDERS = tuple(order for order in ORDERS if order > 3 or float(order).is_integer())


def renyi_bound(history: Sequence[tuple[float, float, int]], delta: float) -> float:
    """Upper bound of ε at `delta` for (noise > 0, rate, steps); what Opacus raises, it raises."""
    from opacus.accountants.analysis import rdp

    total = sum(_step_curve(noise, rate) * count for noise, rate, count in history)
    return float(rdp.get_privacy_spent(orders=ORDERS, rdp=total, delta=delta)[0])


@lru_cache(maxsize=1024)
def _step_curve(noise: float, rate: float) -> Any:
    """Rényi divergence of a step at each of `ORDERS`; an upper bound where the series is long."""
    from opacus.accountants.analysis import rdp

    def curve(orders: Sequence[float]) -> Any:
        return rdp.compute_rdp(q=rate, noise_multiplier=noise, steps=1, orders=orders)

    made = _filled(curve(QUICK_ORDERS)) if _series_is_long(noise, rate) else curve(ORDERS)
    made.flags.writeable = False  # it is shared
    return made


def _series_is_long(noise: float, rate: float) -> bool:
    """Whether orders below 3 have series of 10⁴ to 10⁶ terms, as they have at rates near 1/2.

    Terms fall by |log(1 / rate - 1)| each, down to e⁻³⁰, as far as the noise reaches, and by a
    power from there on.
    """
    return noise >= 5 and abs(rate - 0.5) < max(0.75 / noise, 0.01)


def _filled(quick: Any) -> Any:
    """A curve over `ORDERS` from `QUICK_ORDERS`: (order - 1) · divergence is convex, 0 at 1."""
    import numpy as np

    known = dict(zip(QUICK_ORDERS, quick, strict=True))
    two, three = known[2], 2 * known[3]

    def chord(order: float) -> float:
        return float(
            known[2] if order < 2 else ((3 - order) * two + (order - 2) * three) / (order - 1)
        )

    return np.array([known[order] if order in known else chord(order) for order in ORDERS])
