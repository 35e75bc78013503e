"""ε is never less than the truth: closed forms where there are any, else another accountant.

Closed forms: Balle and Wang 2018 (Gaussian), Steinke 2022 (one subsampled step). The accountant is
dp-accounting's PLD, which composes both directions of add/remove.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from dp_accounting.pld import privacy_loss_distribution as pld
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from fedlora.common.config.schema import AggregationConfig, LoraConfig, ModelConfig, PrivacyConfig
from fedlora.common.errors import BadInput
from fedlora.common.manifest.manifest import Network, Phase, RunManifest
from fedlora.common.privacy import accountant, calibration
from fedlora.common.privacy.accountant import (
    Mechanism,
    Spend,
    epsilon_of,
    group_scales,
    renyi_epsilon,
)
from fedlora.common.privacy.calibration import Asked, Schedule, calibrate, with_gaussian_noise
from fedlora.common.privacy.modes import guarantee_of
from fedlora.common.privacy.privacy_loss import composed_epsilon
from fedlora.common.privacy.record_level import RecordLevel
from fedlora.common.privacy.renyi import Steps, renyi_bound


def gaussian_delta(epsilon: float, shift: float) -> float:
    """δ(ε) between N(0, 1) and N(shift, 1), exactly."""
    return float(
        norm.cdf(shift / 2 - epsilon / shift)
        - math.exp(epsilon) * norm.cdf(-shift / 2 - epsilon / shift)
    )


def one_step_deltas(epsilon: float, rate: float, sigma: float) -> tuple[float, float]:
    """δ(ε) of one subsampled step, exactly, for the pairs "removed" and "added"."""
    removed = rate * gaussian_delta(math.log1p(math.expm1(epsilon) / rate), 1 / sigma)
    inverse = (
        math.log1p(math.expm1(-epsilon) / rate) if math.expm1(-epsilon) / rate > -1 else -math.inf
    )
    if inverse == -math.inf:  # no outcome is that much likelier without the unit
        return removed, 0.0
    # where the loss of "added" passes ε: all x below this
    x = sigma**2 * inverse + 0.5
    mixture = (1 - rate) * norm.cdf(x / sigma) + rate * norm.cdf((x - 1) / sigma)
    return removed, float(norm.cdf(x / sigma) - math.exp(epsilon) * mixture)


def pld_epsilon(history: list[Mechanism], delta: float) -> float:
    """dp-accounting's pessimistic ε; its mesh must be fine against the narrowest loss."""
    widths = [each.sampling_rate / each.noise_multiplier for each in history]
    mesh = min(1e-4, min(widths) / 10)
    composed = None
    for each in history:
        one = pld.from_gaussian_mechanism(
            each.noise_multiplier,
            sampling_prob=each.sampling_rate,
            value_discretization_interval=mesh,
        ).self_compose(each.steps)
        composed = one if composed is None else composed.compose(one)
    assert composed is not None
    return float(composed.get_epsilon_for_delta(delta))


def random_mechanism(rng: random.Random) -> Mechanism:
    rate = math.exp(rng.uniform(math.log(3e-3), 0))
    steps = round(math.exp(rng.uniform(0, math.log(1000))))
    # noise that keeps ε in a range of interest, from 1/2 to 6 times √(steps) · rate, and never
    # below 0.4
    sigma = max(0.4, rate * math.sqrt(steps) * math.exp(rng.uniform(math.log(0.5), math.log(6))))
    return Mechanism(rate, sigma, steps)


@pytest.mark.parametrize("seed", range(8))
def test_never_below_an_independent_accountant(seed: int) -> None:
    rng = random.Random(seed)
    mechanism, delta = random_mechanism(rng), 10 ** rng.uniform(-8, -3)
    found, expected = epsilon_of([mechanism], delta), pld_epsilon([mechanism], delta)
    assert 0.99 * expected <= found <= 1.02 * expected + 0.005, (mechanism, delta)


@pytest.mark.parametrize("seed", range(3))
def test_different_mechanisms_compose(seed: int) -> None:
    rng = random.Random(100 + seed)
    history, delta = (
        [random_mechanism(rng) for _ in range(rng.randint(2, 3))],
        10 ** rng.uniform(-8, -3),
    )
    found, expected = epsilon_of(history, delta), pld_epsilon(history, delta)
    assert 0.99 * expected <= found <= 1.02 * expected + 0.005, (history, delta)
    assert epsilon_of(history[::-1], delta) == found
    assert found >= max(epsilon_of([each], delta) for each in history) - 0.01


@settings(max_examples=12, deadline=None)
@given(
    rate=st.floats(1e-4, 0.999), sigma=st.floats(0.4, 20), delta=st.sampled_from([1e-3, 1e-5, 1e-7])
)
def test_one_step_is_within_its_closed_form(rate: float, sigma: float, delta: float) -> None:
    epsilon = epsilon_of([Mechanism(rate, sigma, 1)], delta)
    assert max(one_step_deltas(epsilon, rate, sigma)) <= delta  # no slack: this is the guarantee
    if epsilon > 0.05:
        assert max(one_step_deltas(0.97 * epsilon - 0.01, rate, sigma)) > delta


@pytest.mark.parametrize(("sigma", "steps"), [(0.5, 1), (2.0, 10), (5.0, 10), (40.0, 500)])
def test_without_subsampling_it_is_the_gaussian_mechanism(sigma: float, steps: int) -> None:
    for delta in (1e-3, 1e-6):
        epsilon = epsilon_of([Mechanism(1.0, sigma, steps)], delta)
        shift = math.sqrt(steps) / sigma
        assert (
            gaussian_delta(epsilon, shift) <= delta < gaussian_delta(0.99 * epsilon - 0.002, shift)
        )


# σ that Opacus 1.6 (PRV) and dp-accounting 0.6 (PLD) found for δ = 1e-5, q = 64/5000 and 234 steps.
# Opacus' own tolerance is 0.01 in ε, which is what separates its column from PLD's at ε = 1.
NETWORK = Network.of(ModelConfig(pooling="default"), LoraConfig(targets=("query", "value")))
GOLDEN = [(1.0, 1.108, 1.101), (3.0, 0.736, 0.735), (8.0, 0.530, 0.529)]


@pytest.mark.parametrize(("epsilon", "prv", "exact"), GOLDEN)
def test_calibration_finds_the_golden_noise(epsilon: float, prv: float, exact: float) -> None:
    sigma = calibrate([], 64 / 5000, 234, epsilon, 1e-5)
    assert exact - 0.0005 <= sigma <= prv + 0.0005
    cost = [
        epsilon_of([Mechanism(64 / 5000, sigma * factor, 234)], 1e-5) for factor in (1, 1 / 1.001)
    ]
    assert cost[0] <= epsilon < cost[1]


def test_calibration_takes_what_other_phases_leave() -> None:
    head = Mechanism(0.2, 12.0, 60)
    sigma = calibrate([head], 0.02, 40, 1.0, 1e-5)
    total = epsilon_of([head, Mechanism(0.02, sigma, 40)], 1e-5)
    assert 0.99 < total <= 1.0
    assert sigma > calibrate([], 0.02, 40, 1.0, 1e-5)


def test_calibration_refuses_what_no_noise_can_do() -> None:
    with pytest.raises(BadInput, match="no noise keeps the schedule within it"):
        calibrate([Mechanism(1.0, 1.0, 1)], 0.01, 10, 1.0, 1e-5)
    for arguments in (
        (0.0, 1, 1.0),
        (1.5, 1, 1.0),
        (0.1, 0, 1.0),
        (0.1, 1, math.nan),
        (0.1, 1, math.inf),
        (0.1, 1, 0.0),
    ):
        with pytest.raises(BadInput, match="calibration"):
            calibrate([], *arguments, 1e-5)


@pytest.mark.parametrize(
    ("content", "evaluations"),
    [
        ("as written", 1),
        ("less noise", 2),
        ("far more noise", 2),
        ("not json", 2),
        ("[1]", 2),
        ('{"key": true}', 2),
        ("[" * 100_000, 2),
    ],
    ids=["as-written", "less-noise", "more-noise", "garbage", "list", "other", "deep"],
)
def test_a_cached_noise_is_checked(
    content: str, evaluations: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "folder" / "calibration.json"
    # a cost that is cheap to compute, with its exact answer at σ = 2
    seen = []

    def cost(history: list[Mechanism], delta: float) -> float:
        seen.append(history[-1].noise_multiplier)
        return 2.0 / history[-1].noise_multiplier

    monkeypatch.setattr(calibration, "epsilon_of", cost)
    sigma = calibrate([], 0.1, 10, 1.0, 1e-5, cache)
    assert 2.0 <= sigma <= 2.002
    (key,) = json.loads(cache.read_text())
    tampered = {"as written": sigma, "less noise": 0.5, "far more noise": 900.0}
    cache.write_text(json.dumps({key: tampered[content]}) if content in tampered else content)
    seen.clear()
    assert calibrate([], 0.1, 10, 1.0, 1e-5, cache) == sigma
    assert len(seen) == 1 if evaluations == 1 else len(seen) > 1
    assert json.loads(cache.read_text())[key] == sigma
    assert calibrate([], 0.1, 11, 1.0, 1e-5, cache) == sigma
    assert json.loads(cache.read_text())[key] == sigma  # the other entry stays


def test_a_cache_that_cannot_be_written_costs_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        calibration, "epsilon_of", lambda history, delta: 2.0 / history[-1].noise_multiplier
    )
    (tmp_path / "file").write_text("")
    assert calibrate([], 0.1, 10, 1.0, 1e-5, tmp_path / "file" / "calibration.json") >= 2.0


def test_what_costs_nothing_and_what_has_no_bound() -> None:
    assert epsilon_of([], 1e-5) == 0
    assert epsilon_of([Mechanism(0.0, 0.0, 10), Mechanism(0.5, 0.0, 0)], 1e-5) == 0
    assert epsilon_of([Mechanism(0.5, 0.0, 1)], 1e-5) == math.inf
    # below the arithmetic's resolution
    assert epsilon_of([Mechanism(0.5, 1.0, 1)], 1e-11) == math.inf
    assert epsilon_of([Mechanism(0.01, 1.0 + k, 1) for k in range(17)], 1e-5) == math.inf
    assert epsilon_of([Mechanism(0.5, 1.0, 3)], 0.9) == 0


@pytest.mark.parametrize(
    ("rate", "sigma", "steps"),
    [
        (0.5, 1e-300, 3),
        (0.5, 1e-3, 3),
        (1.0, 0.01, 1),
        (0.01, 1.0, 10**9),
        (0.01, 1e3, 10**12),
        (0.3, 1.0, 10**30),
    ],
)
def test_beyond_its_range_it_is_infinite(rate: float, sigma: float, steps: int) -> None:
    assert epsilon_of([Mechanism(rate, sigma, steps)], 1e-5) == math.inf


def test_extreme_but_sound_schedules_are_bounded() -> None:
    assert 0 < epsilon_of([Mechanism(1e-12, 1.0, 10)], 1e-5) < 0.01
    assert 0 < epsilon_of([Mechanism(1.0, 1e300, 3)], 1e-5) < 0.01
    few, many = (epsilon_of([Mechanism(0.01, 1.0, steps)], 1e-5) for steps in (500, 1000))
    assert 0 < few < many < 2 * few


@pytest.mark.parametrize(("steps", "by_points"), [(10, False), (3000, False), (10**6, True)])
def test_discretising_adds_a_share_of_a_tail_bound_or_what_the_points_allow(
    steps: int, by_points: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    added = []

    def composed(history: list[Steps], delta: float, error: float) -> float:
        added.append(error / renyi_bound(history, delta / 4000))
        return 1.0

    monkeypatch.setattr(accountant, "composed_epsilon", composed)
    accountant._composed.__wrapped__(((1.0, 1e-3, steps),), 1e-5)
    (share,) = added
    assert share > 1.6e-3 if by_points else share == pytest.approx(1.5e-3)


@pytest.mark.parametrize("noise", [10.0, 300.0, 1e4, 1e6])
def test_no_schedule_keeps_a_node_busy_with_sums(noise: float) -> None:
    """At a rate of 1/2 the series of a fractional order has as many terms as noise.

    Minutes for sixteen phases.
    """
    epsilon_of([Mechanism(0.1, 1.0, 1)], 1e-5)  # imports
    history = [Mechanism(0.5 - place * 1e-6, noise, 20) for place in range(4)]
    began = time.process_time()
    assert 0 < epsilon_of(history, 1e-5) < renyi_epsilon(history, 1e-5) < math.inf
    assert time.process_time() - began < 8


def test_the_renyi_bound_is_infinite_where_there_is_none() -> None:
    assert renyi_epsilon([], 1e-5) == 0
    assert renyi_epsilon([Mechanism(0.5, 0.0, 1)], 1e-5) == math.inf
    assert renyi_epsilon([Mechanism(0.01, 1.0 + k, 1) for k in range(17)], 1e-5) == math.inf


def test_equal_mechanisms_count_as_one_of_more_steps() -> None:
    one = Mechanism(0.1, 2.0, 30)
    assert epsilon_of([one, one, replace(one, steps=40)], 1e-5) == epsilon_of(
        [replace(one, steps=100)], 1e-5
    )


@pytest.mark.parametrize(
    ("rate", "sigma", "steps", "field"),
    [
        (-0.1, 1.0, 1, "sampling_rate"),
        (1.1, 1.0, 1, "sampling_rate"),
        (math.nan, 1.0, 1, "sampling_rate"),
        (0.1, -1.0, 1, "noise_multiplier"),
        (0.1, math.nan, 1, "noise_multiplier"),
        (0.1, math.inf, 1, "noise_multiplier"),
        (0.1, 1.0, -1, "steps"),
        (0.1, 1.0, 1.5, "steps"),
        (0.1, 1.0, True, "steps"),
    ],
)
def test_what_is_no_mechanism_is_refused(rate: float, sigma: float, steps: int, field: str) -> None:
    with pytest.raises(BadInput, match=field):
        Mechanism(rate, sigma, steps)


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan, math.inf])
def test_what_is_no_delta_is_refused(delta: float) -> None:
    with pytest.raises(BadInput, match="delta"):
        epsilon_of([], delta)


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf, -math.inf])
def test_what_is_no_spend_is_refused(value: float) -> None:
    for arguments in ((value, 0.1), (0.1, value)):
        with pytest.raises(BadInput, match="spend"):
            Spend(*arguments)


def test_spends_add_up() -> None:
    assert Spend(1.0, 1e-5) + Spend(0.5, 1e-5) == Spend(1.5, 2e-5)
    with pytest.raises(BadInput, match="spend epsilon"):
        Spend(1e308, 0.0) + Spend(1e308, 0.0)


@given(st.floats(1e-3, 1e3), st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6))
def test_groups_share_the_noise_multiplier(noise_multiplier: float, clips: list[float]) -> None:
    scales = group_scales(noise_multiplier, clips)
    moved = sum((clip / scale) ** 2 for clip, scale in zip(clips, scales, strict=True))
    assert moved == pytest.approx(noise_multiplier**-2, rel=1e-12)
    if len(clips) == 1:
        assert scales == [clips[0] * noise_multiplier]


def test_scales_of_no_group_are_refused() -> None:
    for noise_multiplier, clips in (
        (1.0, []),
        (0.0, [1.0]),
        (1.0, [1.0, 0.0]),
        (math.nan, [1.0]),
        (1.0, [math.inf]),
    ):
        with pytest.raises(BadInput):
            group_scales(noise_multiplier, clips)


def manifest_of(*phases: tuple[int, int, float, float], mode: str = "record") -> RunManifest:
    """A manifest with phases of (attempts, steps, rate, noise)."""
    built = [
        Phase(
            name="adapter", rounds=1, attempts=attempts, steps=steps, sampling_rate=rate,
            expected_units=10.0, noise_multiplier=noise, clip=1.0, head_clip=0.0, optimizer="sgd",
            learning_rate=0.1, carry_optimizer=False, proximal_mu=0.0,
        )
        for attempts, steps, rate, noise in phases
    ]  # fmt: skip
    return RunManifest(
        federation="f", run="r", task="sequence-classification", labels=("a", "b"),
        base_digest="b", spec_digest="s", projection_digest="", max_length=8, mode=mode, unit="",
        epsilon=1.0, delta=1e-5, strategy="fedavg", participation=1.0, minimum_cohort=1, seed=0,
        network=NETWORK, phases=tuple(built),
    )  # fmt: skip


def test_a_manifest_states_every_attempt_of_every_phase() -> None:
    manifest = manifest_of((3, 2, 0.2, 8.0), (5, 4, 0.02, 1.0))
    assert RecordLevel(manifest).history() == [Mechanism(0.2, 8.0, 6), Mechanism(0.02, 1.0, 20)]
    assert (
        guarantee_of(manifest).stated_epsilon()
        == epsilon_of(RecordLevel(manifest).history(), 1e-5)
        > 0
    )
    assert (
        guarantee_of(manifest_of((3, 2, 0.2, 8.0), (1, 1, 0.02, 0.0))).stated_epsilon() == math.inf
    )


@pytest.mark.parametrize(
    ("epsilon", "share", "phases"),
    [  # (attempts, steps, rate), as packaged configurations have them
        (8.0, 0.6, [(32, 1, 1.0), (62, 1, 0.1)]),
        (8.0, 0.85, [(32, 1, 1.0), (22, 1, 0.2)]),
        (3.0, 0.6, [(32, 1, 1.0), (62, 1, 0.05)]),
        (8.0, 0.6, [(62, 1, 0.05)]),
    ],
)
def test_one_process_composes_nothing_twice_and_its_figures_are_the_same(
    epsilon: float,
    share: float,
    phases: list[tuple[int, int, float]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The search for σ ends with the ε that is stated next; the reference remembers nothing."""
    privacy = PrivacyConfig(epsilon=epsilon, delta=1e-5, head_epsilon_share=share)
    asked = Asked(privacy, AggregationConfig(), {})
    plain = manifest_of(*((*each, 0.0) for each in phases))
    composed = list[object]()

    def counted(history: Sequence[Steps], delta: float, error: float) -> float:
        composed.append((*history, delta))
        return composed_epsilon(history, delta, error)

    def figures() -> tuple[Schedule, float]:
        schedule = with_gaussian_noise(plain.phases, asked)
        stated = guarantee_of(replace(plain, phases=schedule.phases)).stated_epsilon()
        return schedule, stated

    monkeypatch.setattr(accountant, "composed_epsilon", counted)
    accountant._composed.cache_clear()
    remembered, once = figures(), len(composed)
    assert once == len(set(composed)) > 5 and figures() == remembered and len(composed) == once
    monkeypatch.setattr(accountant, "_composed", accountant._composed.__wrapped__)
    assert figures() == remembered and len(composed) > 2 * once


def test_a_manifest_cannot_buy_privacy_back() -> None:
    for attempts, steps in ((-1, 5), (1, -5), (-2, -3)):
        with pytest.raises(BadInput, match="at least 0"):
            guarantee_of(
                manifest_of((10, 1, 0.1, 1.0), (attempts, steps, 0.1, 1.0))
            ).stated_epsilon()
    with pytest.raises(BadInput, match="sampling_rate"):
        guarantee_of(manifest_of((10, 1, 1.5, 1.0))).stated_epsilon()
    for mode in ("none", "client", "other"):
        with pytest.raises(BadInput, match="mode"):
            guarantee_of(manifest_of((10, 1, 0.1, 1.0), mode=mode)).stated_epsilon()
