"""The composed loss: Opacus' PRV accountant on the same schedules, and exact figures.

That both stay above the truth, test_accountant.py shows with dp-accounting's PLD.
"""

from __future__ import annotations

import itertools
import math
import warnings

import numpy as np
import pytest
from opacus.accountants import PRVAccountant
from scipy import integrate
from scipy.stats import norm

from fedlora.common.privacy import privacy_loss
from fedlora.common.privacy.accountant import Mechanism, epsilon_of
from fedlora.common.privacy.privacy_loss import (
    Mesh,
    _discretised,
    _exceeding,
    _mean,
    composed_epsilon,
)

Schedule = list[tuple[float, float, int]]  # (noise multiplier, rate, steps)
ONE_PHASE: list[Schedule] = [
    [(noise, rate, steps)]
    for (noise, rate), steps in itertools.product(
        [(0.6, 0.01), (1.1, 0.0128), (2.0, 0.1), (4.0, 0.3), (12.0, 0.2), (9.0, 1.0)], [1, 40, 1500]
    )
]
TWO_PHASES: list[Schedule] = [
    [(12.0, 0.2, 60), (0.87, 0.1, 4)],
    [(0.6, 0.05, 40), (12.0, 0.2, 60)],
    [(3.0, 1.0, 5), (1.0, 0.01, 300)],
    [(30.0, 0.5, 60), (2.0, 0.02, 40)],
    [(1.1, 1e-3, 2000), (20.0, 1.0, 30)],
    [(0.9, 0.004, 500), (1.4, 0.03, 100), (25.0, 0.9, 20)],
]


def opacus(history: Schedule, delta: float, error: float) -> float:
    accountant = PRVAccountant()
    accountant.history = history
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(accountant.get_epsilon(delta, eps_error=error, delta_error=delta / 1000))


@pytest.mark.parametrize(
    ("history", "delta"), [*zip([*ONE_PHASE, *TWO_PHASES], 12 * [1e-4, 1e-6], strict=True)]
)
def test_it_is_opacus_prv_accountant(history: Schedule, delta: float) -> None:
    """24 schedules. The rest is rounding: Opacus takes small masses as differences of 1."""
    with np.errstate(all="ignore"):
        found = composed_epsilon(history, delta, 0.02)
    assert found == pytest.approx(opacus(history, delta, 0.02), rel=2e-6)


@pytest.mark.parametrize(
    ("noise", "rate", "loss"),
    [(1.0, 0.1, 0.2), (0.5, 0.9, -1.0), (2.0, 1.0, 0.3), (4.0, 0.01, 0.02)],
)
def test_a_loss_is_exceeded_as_often_as_samples_say(noise: float, rate: float, loss: float) -> None:
    rng = np.random.default_rng(0)
    x = noise * rng.standard_normal(400_000) + (rng.random(400_000) < rate)
    sampled = np.log1p(rate * np.expm1((2 * x - 1) / (2 * noise**2)))
    expected = float(_exceeding(np.array([loss]), noise, rate)[0])
    assert np.mean(sampled > loss) == pytest.approx(expected, abs=5 * 0.5 / math.sqrt(400_000))


def test_no_loss_lies_below_that_of_not_being_drawn() -> None:
    assert _exceeding(np.array([math.log(0.7) - 1e-9, -5.0]), 1.0, 0.3).tolist() == [1.0, 1.0]


@pytest.mark.parametrize(("noise", "rate"), [(0.05, 0.5), (0.3, 1e-4), (1.0, 0.1), (50.0, 0.9)])
def test_the_mean_is_its_integral(noise: float, rate: float) -> None:
    def weighted(x: float) -> float:
        density = rate * norm.pdf(x, 1, noise) + (1 - rate) * norm.pdf(x, 0, noise)
        return float(np.log1p(rate * np.expm1((2 * x - 1) / (2 * noise**2))) * density)

    peaks = [-10 * noise, -noise, 0, noise, 0.5, 1 - noise, 1.0, 1 + noise, 1 + 10 * noise]
    expected = sum(
        integrate.quad(weighted, low, high, epsabs=1e-14, limit=200)[0]
        for low, high in itertools.pairwise(sorted(peaks))
    )
    assert _mean(-900.0, 600.0, noise, rate) == pytest.approx(expected, rel=1e-9, abs=1e-13)


@pytest.mark.parametrize(("noise", "rate"), [(0.5, 0.3), (2.0, 0.01), (3.0, 1.0)])
def test_a_discretised_loss_keeps_mass_and_mean(noise: float, rate: float) -> None:
    mesh = Mesh(1e-3, 20_000)
    masses, moved = _discretised(noise, rate, mesh)
    assert masses.shape == (mesh.size,) and masses.min() >= 0
    assert masses.sum() == pytest.approx(1.0, abs=1e-12)
    assert float((mesh.points + moved) @ masses) == pytest.approx(
        _mean(-20.0, 20.0, noise, rate), rel=1e-9
    )


def test_a_mean_outside_its_cells_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(privacy_loss, "_mean", lambda *_: 0.2)
    with pytest.raises(ValueError, match="mean"):
        _discretised(2.0, 0.01, Mesh(1e-3, 20_000))


@pytest.mark.parametrize(
    ("noise", "steps", "delta", "truth"),
    # the exact curve of a Gaussian mechanism, in 60 digits
    [
        (1e3, 10**6, 1e-10, 6.5479),
        (3e3, 10**7, 1e-10, 6.9382),
        (6e3, 4 * 10**7, 1e-9, 6.544),
        (1e4, 10**8, 1e-10, 6.548),
    ],
)
def test_so_many_steps_do_not_round_a_bound_below_the_truth(
    noise: float, steps: int, delta: float, truth: float
) -> None:
    assert epsilon_of([Mechanism(1.0, noise, steps)], delta) >= truth


def test_what_thousands_of_steps_round_is_not_seen_in_what_is_printed() -> None:
    """20,000 steps at a δ of 1e-5: of δ it is less than a millionth."""
    steps = [(1.0, 0.01, 20_000)]
    assert composed_epsilon(steps, 1e-5, 0.01) == pytest.approx(opacus(steps, 1e-5, 0.01), rel=1e-6)
