"""Distributed Skellam noise: ε never below the truth, computed slowly; noise as accounted.

The slow computations use mpmath's Bessel functions: p(k) = exp(-μ) I_k(μ), summed term by term.
"""

from __future__ import annotations

import math
import random
from dataclasses import replace
from functools import cache

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedlora.common.errors import BadInput
from fedlora.common.privacy.randomness import OsRandom, SeededRandom
from fedlora.common.privacy.skellam import (
    ROOM,
    Release,
    clipped,
    epsilon_of_releases,
    log_poisson,
    noised,
    poisson,
    skellam,
)
from fedlora.common.privacy.unit_release import UnitRelease

SOURCE = OsRandom()
# --- the truth, slowly ----------------------------------------------------------------------------


@cache
def log_pmf(k: int, mu: float) -> mpmath.mpf:
    """log p(k) of Skellam noise of variance μ."""
    return mpmath.log(mpmath.besseli(abs(k), mu)) - mu


def true_renyi(order: int, shifts: tuple[int, ...], mu: float) -> float:
    """D_α of noise on `shifts` from noise on 0.

    Coordinates add up, each a sum over whole numbers.
    """
    total = mpmath.mpf(0)
    for shift in shifts:
        reach = int(order * shift + 30 * math.sqrt(mu) + 40)
        terms = (
            mpmath.exp(order * log_pmf(k - shift, mu) - (order - 1) * log_pmf(k, mu))
            for k in range(-reach, reach + order * shift + 1)
        )
        total += mpmath.log(mpmath.fsum(terms)) / (order - 1)
    return float(total)


def true_epsilon(shift: int, mu: float, times: int, delta: float) -> float:
    """The smallest ε at `delta` of `times` releases of one coordinate.

    Losses convolved, to a fine grid above.
    """
    reach = int(12 * math.sqrt(mu) + 20)
    support = np.arange(-reach, reach + 1)
    upper = np.array([float(log_pmf(int(k) - shift, mu)) for k in support])
    lower = np.array([float(log_pmf(int(k), mu)) for k in support])
    step = 1e-3
    loss = np.floor((upper - lower) / step).astype(int)  # down: never more than the truth
    mass = np.bincount(loss - loss.min(), weights=np.exp(upper))
    whole, start = np.array([1.0]), 0
    for _ in range(times):
        whole, start = np.convolve(whole, mass), start + loss.min()
    losses = (start + np.arange(len(whole))) * step

    def excess(epsilon: float) -> float:
        above = losses > epsilon
        return float(np.sum(whole[above] * -np.expm1(epsilon - losses[above]))) - delta

    low, high = 0.0, 100.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    return low


class Moved(Release):
    """A release whose sensitivity is given, so that small shifts and small noise can be tried."""

    second: float = 1.0

    @property
    def sensitivity(self) -> float:
        return self.second


def release_of(shifts: tuple[int, ...], mu: float, times: int = 1) -> Release:
    """One that moves by exactly `shifts` under noise of variance μ."""
    second = math.sqrt(sum(each**2 for each in shifts))
    made = Moved(math.sqrt(mu) / second, 1, len(shifts), times)
    object.__setattr__(made, "second", second)
    return made


# --- the accountant -------------------------------------------------------------------------------


@pytest.mark.parametrize("mu", [0.05, 0.7, 4.0, 30.0, 150.0])
@pytest.mark.parametrize("shifts", [(1,), (3,), (1, 1, 1, 1), (2, 1, 0)])
def test_the_bound_is_never_below_the_divergence(shifts: tuple[int, ...], mu: float) -> None:
    release = release_of(shifts, mu)
    for order in (2, 3, 5, 16):
        truth, bound = true_renyi(order, shifts, mu), release.renyi(order)
        assert bound >= truth, (shifts, mu, order)
        if mu >= 150 and order <= 5:
            assert bound <= 1.1 * truth  # and it is no empty bound where there is noise


@pytest.mark.parametrize(
    ("shift", "mu", "times"), [(1, 9.0, 1), (1, 20.0, 8), (2, 30.0, 3), (1, 1.0, 2)]
)
def test_epsilon_is_never_below_the_truth(shift: int, mu: float, times: int) -> None:
    truth = true_epsilon(shift, mu, times, 1e-5)
    bound = epsilon_of_releases([release_of((shift,), mu, times)], 1e-5)
    assert truth <= bound <= (1.5 if mu > 5 else 3) * truth


def test_the_bound_by_hand() -> None:
    """α Δ2²/2μ + min(((2α-1) Δ2² + 6 Δ1)/4μ², 3 Δ1/2μ).

    Either part of the minimum, and Δ1 <= √d Δ2 or Δ2².
    """
    assert release_of((1,), 4.0).renyi(2) == pytest.approx(2 / 8 + (3 + 6) / 64)
    assert release_of((1,), 0.25).renyi(2) == pytest.approx(2 / 0.5 + 3 / 0.5)
    assert release_of((3,), 4.0).renyi(2) == pytest.approx(18 / 8 + (27 + 18) / 64)
    assert release_of((1, 1, 1, 1), 4.0).renyi(3, moved=2) == pytest.approx(
        3 * 16 / 8 + min((5 * 16 + 6 * 8) / 64, 24 / 8)
    )
    mixed = [release_of((1,), 4.0, 2), release_of((2,), 9.0, 3)]
    costs = {
        order: 2 * mixed[0].renyi(order) + 3 * mixed[1].renyi(order)
        + (math.log(1e5) + (order - 1) * math.log(1 - 1 / order) - math.log(order)) / (order - 1)
        for order in range(2, 60)
    }  # fmt: skip
    assert epsilon_of_releases(mixed, 1e-5) == pytest.approx(min(costs.values()))


def test_with_fine_levels_it_is_the_gaussian_cost() -> None:
    """zCDP of 1/2σ²; the terms of Skellam and of rounding vanish against it."""
    release = Release(4.0, 1 << 22, 20_000, 1)
    for order in (2, 8, 64):
        assert release.renyi(order) == pytest.approx(order / 32, rel=1e-6)
    assert release.sensitivity == (1 << 22) + math.sqrt(20_000) / 2
    assert release.renyi(8, moved=2) == pytest.approx(4 * release.renyi(8), rel=1e-6)


@given(
    sigma=st.floats(0.3, 50),
    levels=st.integers(1, 1 << 24),
    coordinates=st.integers(1, 10**7),
    times=st.integers(1, 200),
)
@settings(max_examples=50, deadline=None)
def test_more_noise_costs_less_and_more_releases_cost_more(
    sigma: float, levels: int, coordinates: int, times: int
) -> None:
    def cost(sigma: float, times: int, moved: int = 1) -> float:
        return epsilon_of_releases([Release(sigma, levels, coordinates, times)], 1e-5, moved)

    here = cost(sigma, times)
    assert cost(1.1 * sigma, times) <= here <= cost(sigma, times + 1)
    assert here <= cost(sigma, times, 2)
    one = Release(sigma, levels, coordinates, 1)
    assert epsilon_of_releases([one] * 3, 1e-5) == pytest.approx(cost(sigma, 3))


def test_what_buys_nothing() -> None:
    assert (
        epsilon_of_releases([], 1e-5) == epsilon_of_releases([Release(1.0, 4, 4, 0)], 1e-5) == 0.0
    )
    assert epsilon_of_releases([Release(1.0, 4, 4, 1), Release(0.0, 4, 4, 1)], 1e-5) == math.inf
    good = {"noise_multiplier": 1.0, "levels": 4, "coordinates": 4, "times": 1}
    for change in (
        {"noise_multiplier": math.nan},
        {"noise_multiplier": -1.0},
        {"noise_multiplier": 1e80},
        {"levels": 0},
        {"coordinates": 0},
        {"times": -1},
        {"times": True},
    ):
        with pytest.raises(BadInput, match=next(iter(change))):
            Release(**(good | change))
    for tiny in (1e-170, 1e-90, 1e-60):  # squares that are 0
        assert epsilon_of_releases([Release(tiny, 4, 4, 1)], 1e-5) == math.inf
    for delta in (0.0, 1.0, math.nan):
        with pytest.raises(BadInput, match="delta"):
            epsilon_of_releases([], delta)
    with pytest.raises(BadInput, match="carriers"):
        Release(1.0, 4, 4, 1).share(0)


# --- the clip -------------------------------------------------------------------------------------


@given(st.lists(st.floats(width=32), min_size=1, max_size=50), st.floats(1e-3, 1e3))
@settings(max_examples=300, deadline=None)
def test_a_clipped_update_encodes_to_no_more_than_its_sensitivity(
    values: list[float], bound: float
) -> None:
    from fedlora.common.secagg.ring import Encoding

    vector = clipped(np.array(values, dtype=np.float32), bound)
    assert np.linalg.norm(vector.astype(np.float64)) <= bound
    levels = Encoding(len(values), 64, bound, 1 << 22).encode(vector)
    assert (
        math.isqrt(sum(int(level) ** 2 for level in levels))
        <= (1 << 22) + math.sqrt(len(values)) / 2
    )


def test_what_is_short_stays_and_what_is_no_number_is_nothing() -> None:
    short = np.array([0.3, -0.4], dtype=np.float32)
    assert np.array_equal(clipped(short, 1.0), short)
    assert np.linalg.norm(clipped(10 * short, 1.0)) == pytest.approx(1 - ROOM, abs=1e-6)
    assert not clipped(np.array([np.nan, 1.0], dtype=np.float32), 1.0).any()
    assert not clipped(np.zeros(3, dtype=np.float32), 1.0).any()
    with pytest.raises(BadInput, match="clip"):
        clipped(short, 0.0)


def test_what_leaves_is_checked_as_whole_numbers() -> None:
    release, moved = Release(1.0, 100, 2, 1), np.array([True, True, False])
    assert noised(SOURCE, np.array([60, 80, 0]), moved, release, 2)[2] == 0
    for levels, said in (
        ([102, 0, 0], "expected at most"),
        ([60, 60, 60], "expected at most"),
        ([1, 1, 1], "moves nothing"),
    ):
        with pytest.raises(BadInput, match=said):
            noised(SOURCE, np.array(levels), moved, release, 2)
    with pytest.raises(BadInput, match="coordinates that move"):
        noised(SOURCE, np.array([1, 0, 0]), np.array([True, True, True]), release, 2)


@settings(deadline=None)
@given(
    most=st.integers(1, 10**6),
    part=st.floats(0.0, 1.0),
    sigma=st.floats(0.3, 30.0),
    levels=st.integers(1, 1 << 22),
    order=st.integers(2, 64),
    sampled=st.booleans(),
)
def test_a_round_that_moves_fewer_coordinates_costs_no_more_under_the_same_noise(
    most: int, part: float, sigma: float, levels: int, order: int, sampled: bool
) -> None:
    """The smaller half of LoRA: its sensitivity against the larger one's variance."""
    larger: Release = (UnitRelease if sampled else Release)(sigma, levels, most, 1)
    fewer = max(1, int(part * most))
    alone = replace(larger, coordinates=fewer)
    less = replace(alone, noise_multiplier=math.sqrt(larger.variance) / alone.sensitivity)
    assert less.variance == pytest.approx(larger.variance, rel=1e-12)
    assert less.renyi(order) <= larger.renyi(order) * (1 + 1e-12)


# --- the noise ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.05, 3.7, 15.9, 64.0, 1000.25, 3.3e9, 2.6e13, 2.0**50])
def test_probabilities_are_right_to_twelve_digits(rate: float) -> None:
    with mpmath.workdps(50):
        for deviations in (-9.0, -3.0, -0.3, 0.0, 0.2, 1.0, 2.5, 9.0, 30.0):
            k = max(0, int(rate + deviations * math.sqrt(rate)))
            truth = k * mpmath.log(rate) - mpmath.mpf(rate) - mpmath.loggamma(k + 1)
            if truth > -700:
                found = float(log_poisson(np.array([k]), rate)[0])
                assert abs(float(mpmath.mpf(found) - truth)) < 1e-12
    assert log_poisson(np.array([-1, -(10**6)]), rate).tolist() == [-math.inf, -math.inf]


@pytest.mark.parametrize("rate", [0.3, 4.0, 18.5, 400.0])
def test_poisson_by_chi_squared(rate: float) -> None:
    """Against scipy's pmf, tails pooled.

    A wrong proposal, bound or side fails by orders of magnitude.
    """
    n = 200_000
    drawn = poisson(SOURCE, n, rate)
    low, high = (int(stats.poisson.ppf(q, rate)) for q in (1e-4, 1 - 1e-4))
    inner = np.arange(low, high + 1)
    counts = np.array([np.sum(drawn == k) for k in inner])
    seen = np.append(counts, n - counts.sum())
    law = stats.poisson.pmf(inner, rate)
    expected = n * np.append(law, 1 - law.sum())
    assert stats.chisquare(seen[expected > 5], expected[expected > 5] * seen[expected > 5].sum()
                           / expected[expected > 5].sum()).pvalue > 1e-6  # fmt: skip


@pytest.mark.parametrize("variance", [2.5, 60.0])
def test_skellam_by_chi_squared(variance: float) -> None:
    n = 200_000
    drawn = skellam(SOURCE, n, variance)
    reach = int(3.5 * math.sqrt(variance))
    law = np.array([float(mpmath.exp(log_pmf(k, variance))) for k in range(-reach, reach + 1)])
    counts = np.array([np.sum(drawn == k) for k in range(-reach, reach + 1)])
    expected = n * np.append(law, 1 - law.sum())
    assert stats.chisquare(np.append(counts, n - counts.sum()), expected).pvalue > 1e-6


@pytest.mark.parametrize("variance", [50.0, 1e6, 5e13])
def test_moments_and_tails(variance: float) -> None:
    """Mean, variance, excess kurtosis 1/μ, and two-sided tails beyond 3 and 4 deviations."""
    n = 300_000
    scaled = skellam(SOURCE, n, variance) / math.sqrt(variance)
    assert abs(scaled.mean()) < 6 / math.sqrt(n)
    assert abs(scaled.var() - 1) < 6 * math.sqrt((2 + 1 / variance) / n)
    assert abs((scaled**4).mean() - 3 - 1 / variance) < 6 * math.sqrt(96 / n)
    assert abs((scaled**3).mean()) < 6 * math.sqrt(15 / n)
    # there the tails are the Gaussian's to within far less than the sample shows
    if variance > 1e5:
        for deviations in (3.0, 4.0):
            for side in (scaled > deviations, scaled < -deviations):
                expected = n * stats.norm.sf(deviations)
                assert abs(side.sum() - expected) < 6 * math.sqrt(expected) + 1
        assert stats.kstest(scaled, "norm").pvalue > 1e-6
        # below one level of the proposal's blocks the noise is as even as a Poisson variable's
        parity = np.bincount(np.abs(skellam(SOURCE, n, variance)) % 2, minlength=2)
        assert abs(parity[0] - n / 2) < 6 * math.sqrt(n) / 2


def test_no_seed_fixes_it_and_no_generator_is_touched() -> None:
    drawn = []
    for _ in range(2):
        np.random.seed(1)
        random.seed(1)
        torch.manual_seed(1)
        drawn.append(skellam(SOURCE, 64, 1e6))
        assert np.random.random() == np.random.RandomState(1).random_sample()
    assert not np.array_equal(drawn[0], drawn[1])
    one, two = (skellam(SeededRandom(3, "test"), 64, 1e6) for _ in range(2))
    assert np.array_equal(one, two)  # all of it comes from its source


def test_rates_that_cannot_be_drawn() -> None:
    for rate in (0.0, -1.0, math.nan, math.inf, 2.0**51):
        with pytest.raises(BadInput, match="Poisson rate"):
            poisson(SOURCE, 3, rate)
    assert poisson(SOURCE, 0, 1.0).shape == (0,)


def test_shares_of_those_who_stay_carry_the_whole_noise() -> None:
    """Seven of ten, two of them colluding: five carry μ.

    Measured over 10^5 coordinates, within 2 %.
    """
    release, n = Release(2.0, 1 << 22, 100_000, 1), 100_000
    honest = sum(skellam(SOURCE, n, release.share(5)) for _ in range(5))
    assert np.var(honest) == pytest.approx(release.variance, rel=0.02)
    assert 5 * release.share(5) >= release.variance
