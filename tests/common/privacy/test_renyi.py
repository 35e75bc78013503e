"""Rényi divergences: Opacus' series, and the closed form without subsampling."""

from __future__ import annotations

import math

import numpy as np
import pytest
from opacus.accountants import RDPAccountant
from opacus.accountants.analysis import rdp

from fedlora.common.privacy.renyi import ORDERS, _step, renyi_bound


@pytest.mark.parametrize(
    ("noise", "rate"),
    [(0.3, 1e-4), (0.5, 0.01), (1.0, 0.3), (1.1, 0.0128), (3.0, 0.9), (30.0, 0.2), (200.0, 0.01)],
)
def test_the_integral_is_the_series(noise: float, rate: float) -> None:
    """Whole orders are finite sums; the series of fractional ones ends at e^-30."""
    expected = rdp.compute_rdp(q=rate, noise_multiplier=noise, steps=1, orders=ORDERS)
    assert _step(noise, rate) == pytest.approx(np.asarray(expected), rel=1e-6, abs=1e-13)


def test_without_subsampling_it_is_the_closed_form() -> None:
    assert _step(2.0, 1.0) == pytest.approx(np.array(ORDERS) / 8, rel=1e-12)
    near = _step(2.0, 1 - 1e-12)
    assert near == pytest.approx(np.array(ORDERS) / 8, rel=1e-9)


@pytest.mark.parametrize("delta", [1e-3, 1e-5, 1e-9])
@pytest.mark.parametrize(
    "history", [[(1.1, 0.0128, 234)], [(0.6, 0.05, 40), (12.0, 0.2, 60)], [(2.0, 1.0, 7)]]
)
@pytest.mark.filterwarnings("ignore:Optimal order")
def test_the_bound_is_opacus(history: list[tuple[float, float, int]], delta: float) -> None:
    accountant = RDPAccountant()
    accountant.history = history
    expected = accountant.get_epsilon(delta, alphas=list(ORDERS))
    assert renyi_bound(history, delta) == pytest.approx(expected, rel=1e-8)


def test_noise_below_its_range_has_no_bound() -> None:
    for noise in (0.02, 1e-3, 1e-300):
        with pytest.raises((ValueError, ZeroDivisionError)):
            renyi_bound([(noise, 0.5, 1)], 1e-5)
    assert math.isfinite(renyi_bound([(0.032, 0.5, 1)], 1e-5))
