"""Sums of drawn units with shared noise: what one unit moves, and ε never below the truth.

Independent figures: divergences summed term by term, dp-accounting's PLD of the exact probabilities
of Skellam noise in both directions, and its Rényi accountant in the limit of a Gaussian.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from dp_accounting import PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting import dp_event as events
from dp_accounting.pld import privacy_loss_distribution as pld
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ive

from fedlora.common.errors import BadInput
from fedlora.common.privacy.skellam import Release, epsilon_of_releases
from fedlora.common.privacy.unit_release import (
    CAPACITY,
    COARSEST,
    MOST_ORDER,
    ROOM,
    UnitRelease,
    unit_releases,
)
from fedlora.common.secagg.ring import Encoding
from tests.server.fakes import manifest_of

Pmf = npt.NDArray[np.float64]
# sampling rate, noise multiplier, releases
SCHEDULES = [
    (1.0, 4.0, 1),
    (1.0, 8.0, 30),
    (1.0, 40.0, 200),
    (0.5, 3.0, 20),
    (0.3, 1.2, 5),
    (0.1, 1.0, 50),
    (0.05, 0.8, 100),
    (0.02, 0.9, 500),
    (0.01, 1.5, 1000),
    (0.002, 0.7, 2000),
]


def pair(noise: float, shift: int, rate: float) -> tuple[Pmf, Pmf]:
    """Probabilities of whole numbers without the unit, and with it at its rate."""
    reach = math.ceil(12 * noise) + shift + 10
    values = np.arange(-reach, reach + 1)
    without, moved = (ive(np.abs(values - at), noise**2) for at in (0, shift))
    return without, (1 - rate) * without + rate * moved


def divergence(order: int, upper: Pmf, lower: Pmf) -> float:
    """D_α, summed term by term where both are above 0."""
    here = (upper > 1e-290) & (lower > 1e-290)
    logs = order * np.log(upper[here]) - (order - 1) * np.log(lower[here])
    return float(np.logaddexp.reduce(logs)) / (order - 1)


def pld_epsilon(upper: Pmf, lower: Pmf, times: int, delta: float) -> float:
    """dp-accounting's, which rounds losses upwards to a fine mesh."""
    keep = (upper > 1e-280) & (lower > 1e-280)
    places = np.flatnonzero(keep).tolist()
    found = pld.from_two_probability_mass_functions(
        *({k: float(np.log(each[k])) for k in places} for each in (lower, upper)),
        value_discretization_interval=1e-4 if times > 30 else 1e-3,
    )
    return float(found.self_compose(times).get_epsilon_for_delta(delta))


# --- what it costs --------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.01, 0.2, 0.7])
@pytest.mark.parametrize(("levels", "noise_multiplier"), [(4, 0.8), (20, 1.5), (100, 4.0)])
def test_the_bound_is_never_below_the_divergence_of_either_direction(
    levels: int, noise_multiplier: float, rate: float
) -> None:
    release = UnitRelease(noise_multiplier, levels, 1, 1, rate)
    shift = math.floor(release.sensitivity)
    without, mixture = pair(math.sqrt(release.variance), shift, rate)
    for order in (2, 3, 5, 9):
        removed = divergence(order, mixture, without)
        added = divergence(order, without, mixture)
        assert added <= removed + 1e-12 <= release.renyi(order) + 2e-12
        if levels == 100:
            assert release.renyi(order) <= 1.1 * removed


@pytest.mark.parametrize(("rate", "noise_multiplier", "times"), SCHEDULES)
def test_epsilon_against_an_independent_accountant(
    rate: float, noise_multiplier: float, times: int
) -> None:
    """Exact probabilities of one coordinate, composed by PLD: never below, and no empty bound."""
    release = UnitRelease(noise_multiplier, 150, 1, times, rate)
    found = epsilon_of_releases([release], 1e-5)
    shift = math.floor(release.sensitivity)
    without, mixture = pair(math.sqrt(release.variance), shift, rate)
    truths = [
        pld_epsilon(upper, lower, times, 1e-5)
        for upper, lower in ((mixture, without), (without, mixture))
    ]
    loose = 1.35 if rate >= 0.01 else 1.65  # a Rényi bound is, where the loss has a heavy tail
    assert max(truths) <= found <= loose * max(truths)


@pytest.mark.parametrize(("rate", "noise_multiplier", "times"), SCHEDULES)
def test_on_a_fine_grid_it_is_the_gaussian_s(
    rate: float, noise_multiplier: float, times: int
) -> None:
    release = UnitRelease(noise_multiplier, 1 << 22, 10_000, times, rate)
    accountant = RdpAccountant(orders=[*range(2, 256)])
    one = PoissonSampledDpEvent(rate, events.GaussianDpEvent(noise_multiplier))
    accountant.compose(SelfComposedDpEvent(one, times))
    expected = accountant.get_epsilon(1e-5)
    found = epsilon_of_releases([release], 1e-5)
    assert expected - 1e-6 <= found * (1 + 1e-9) or rate == 1  # where larger orders are better
    assert found <= expected * 1.0001 + 1e-4


def test_a_draw_amplifies_and_never_costs_more() -> None:
    whole = Release(2.0, 1000, 50, 1)
    costs = [UnitRelease(2.0, 1000, 50, 1, rate).renyi(8) for rate in (0, 1e-9, 0.1, 0.9, 1)]
    assert costs == sorted(costs) and costs[0] == costs[1] < 1e-7  # a rate of 0 is taken as 1e-9
    assert costs[-1] == pytest.approx(whole.renyi(8), rel=1e-6)  # at the noise that it asks for
    assert UnitRelease(2.0, 1000, 50, 1).variance > whole.variance  # √d, not √d / 2; ROOM
    assert UnitRelease(2.0, 1000, 50, 1, 0.1).renyi(MOST_ORDER + 1) == math.inf
    assert UnitRelease(0.0, 1000, 50, 1, 0.1).renyi(2) == math.inf
    mixed = [UnitRelease(3.0, 1000, 50, 4, 0.1), UnitRelease(8.0, 1000, 50, 4)]
    alone = [epsilon_of_releases([each], 1e-5) for each in mixed]
    assert max(alone) < epsilon_of_releases(mixed, 1e-5) < sum(alone)


@pytest.mark.parametrize("rate", [-0.1, 1.1, math.nan])
def test_a_rate_that_is_none(rate: float) -> None:
    with pytest.raises(BadInput, match="sampling_rate"):
        UnitRelease(1.0, 10, 1, 1, rate)


def test_neighbours_differ_by_one_unit_alone() -> None:
    with pytest.raises(BadInput, match="expected 1"):
        UnitRelease(1.0, 10, 1, 1, 0.5).renyi(2, moved=2)


# --- what one unit moves --------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    units=st.integers(0, 400),
    size=st.integers(1, 60),
    aligned=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_one_unit_moves_the_whole_numbers_by_the_stated_sensitivity_at_most(
    units: int, size: int, aligned: bool, seed: int
) -> None:
    """Whatever the others are, saturated or not, and in whatever order they are added."""
    rng = np.random.default_rng(seed)
    (phase,) = manifest_of(1, expected_units=8.0, clip=0.7).phases
    bound = CAPACITY * phase.learning_rate * phase.clip
    encoding = Encoding(size, 32, bound, 1 << 14)
    (release,) = unit_releases([phase], [size], encoding.levels)
    assert release.levels == (1 << 14) / 16
    clipped = rng.normal(size=(units + 1, size)) + 5 * aligned
    clipped *= phase.clip / np.linalg.norm(clipped, axis=1, keepdims=True)

    def encoded(rows: Pmf) -> npt.NDArray[np.int64]:
        return encoding.encode(rows.sum(axis=0) * (-phase.learning_rate / phase.expected_units))

    moved = encoded(rng.permutation(clipped)) - encoded(clipped[:-1])
    assert np.linalg.norm(moved) <= release.sensitivity
    first = min(math.sqrt(size) * release.sensitivity, release.sensitivity**2)
    assert np.abs(moved).sum() <= first


def test_rounding_and_room_are_paid_for_and_bounded() -> None:
    release = UnitRelease(1.0, 4000, 100, 1)
    assert release.sensitivity == 4000 * (1 + ROOM) + 10 and not release.coarse
    assert "more than 1%" in UnitRelease(1.0, 400, 100, 1).coarse
    assert release.sensitivity <= (1 + COARSEST) * release.levels
    n = 1 << 20  # float64: two sums of n units, in whatever order
    assert 2 * n**2 * 2.0**-53 < ROOM / 2
