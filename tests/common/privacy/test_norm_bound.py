"""The public bound on an update's norm: no honest node meets it, and nothing absurd passes it."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.common.errors import BadInput
from fedlora.common.manifest.plan import Update
from fedlora.common.model.state import Vector
from fedlora.common.privacy.modes import guarantee_of
from fedlora.common.privacy.norm_bound import check_norm
from tests.server.fakes import manifest_of


def update_of(delta: Vector) -> Update:
    return Update("client-1", "sha256:m", 1, 1, delta)


@settings(deadline=None)
@given(
    size=st.integers(1, 300),
    steps=st.integers(1, 4),
    rate=st.floats(1e-3, 2),
    mu=st.floats(0, 1),
    sigma=st.floats(0, 20),
    clip=st.floats(0.01, 10),
    head_clip=st.sampled_from([0.0, 0.1, 5.0]),
    ratio=st.floats(0, 50),
    seed=st.integers(0, 1000),
)
def test_sgd_with_a_large_draw_of_aligned_units_is_within_it(
    size: int,
    steps: int,
    rate: float,
    mu: float,
    sigma: float,
    clip: float,
    head_clip: float,
    ratio: float,
    seed: int,
) -> None:
    """The worst honest node: `ratio` times the expected units, each at its clip, aligned."""
    random, expected = np.random.default_rng(seed), 16.0
    manifest = manifest_of(
        1,
        mode="record",
        steps=steps,
        learning_rate=rate,
        proximal_mu=mu,
        noise_multiplier=sigma,
        clip=clip,
        head_clip=head_clip,
        expected_units=expected,
    )
    head = np.arange(size) % 2 == 0
    clips = np.where(head & (head_clip > 0), head_clip or clip, clip)
    groups = 2 if head_clip else 1
    weights, direction = np.zeros(size), random.normal(size=size)
    for group in (head, ~head) if head_clip else (np.ones(size, dtype=bool),):
        direction[group] /= np.linalg.norm(direction[group]) or 1.0
    for _ in range(steps):
        noise = random.normal(size=size) * math.sqrt(groups) * sigma * clips
        gradient = (ratio * expected * clips * direction + noise) / expected + mu * weights
        weights = weights - rate * gradient
    check_norm(update_of(weights.astype(np.float32)), guarantee_of(manifest).update_bound(0, size))


@settings(deadline=None)
@given(
    size=st.integers(1, 20),
    steps=st.integers(1, 60),
    rate=st.floats(1e-4, 1),
    scales=st.lists(st.floats(1e-6, 1e6), min_size=60, max_size=60),
)
def test_adamw_on_any_gradients_is_within_it(
    size: int, steps: int, rate: float, scales: list[float]
) -> None:
    manifest = manifest_of(1, optimizer="adamw", steps=steps, learning_rate=rate)
    weights, first, second = np.zeros(size), np.zeros(size), np.zeros(size)
    for t in range(1, steps + 1):
        gradient = np.full(size, scales[t - 1])
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        weights -= rate * (first / (1 - 0.9**t)) / (np.sqrt(second / (1 - 0.999**t)) + 1e-8)
    check_norm(update_of(weights.astype(np.float32)), guarantee_of(manifest).update_bound(0, size))


@pytest.mark.parametrize("mode", ["none", "record"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_bound_itself_passes_and_a_hair_more_does_not(mode: str, optimizer: str) -> None:
    bound = guarantee_of(
        manifest_of(1, mode=mode, optimizer=optimizer, noise_multiplier=1.0)
    ).update_bound(0, 4)
    assert 0 < bound < 1e4
    check_norm(update_of(np.full(4, bound / 2 * 0.9999, dtype=np.float32)), bound)
    with pytest.raises(
        BadInput, match=r"update of client-1: found an L2 norm of .*, expected at most"
    ):
        check_norm(update_of(np.full(4, bound / 2 * 1.0001, dtype=np.float32)), bound)


def test_the_largest_float32_neither_overflows_nor_passes() -> None:
    huge = np.full(100, np.finfo(np.float32).max, dtype=np.float32)
    with pytest.raises(BadInput, match=r"L2 norm of 3\.403e"):
        check_norm(update_of(huge), 1e30)


def test_what_is_not_a_number_does_not_pass() -> None:
    for bound in (1.0, math.nan):
        with pytest.raises(BadInput):
            check_norm(update_of(np.array([np.nan], dtype=np.float32)), bound)


def test_each_phase_has_its_own() -> None:
    manifest = manifest_of(1, 1, mode="record")
    head, adapter = manifest.phases
    assert guarantee_of(manifest).update_bound(0, 9) == guarantee_of(manifest).update_bound(1, 9)
    louder = replace(manifest, phases=(head, replace(adapter, clip=2.0)))
    assert guarantee_of(louder).update_bound(1, 9) == 2 * guarantee_of(louder).update_bound(0, 9)


@pytest.mark.parametrize(("mode", "optimizer"), [("client", "sgd"), ("record", "adagrad")])
def test_an_unknown_recipe_is_refused(mode: str, optimizer: str) -> None:
    with pytest.raises(BadInput, match="expected"):
        guarantee_of(manifest_of(1, mode=mode, optimizer=optimizer)).update_bound(0, 4)
