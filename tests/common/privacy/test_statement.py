"""What is stated is what was accounted, and never less."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.common.config.schema import LoraConfig, ModelConfig
from fedlora.common.manifest.manifest import Network, Phase, RunManifest
from fedlora.common.privacy.statement import (
    NOISE_SOURCE,
    privacy_statement,
    shown_delta,
    shown_epsilon,
    shown_left,
)

PHASE = Phase("adapter", 3, 4, 2, 0.25, 4.0, 3.0, 1.0, 0.0, "sgd", 0.01, True, 0.0)
NETWORK = Network.of(ModelConfig(), LoraConfig())
MANIFEST = RunManifest(
    "f",
    "1",
    "t",
    ("a",),
    "b",
    "s",
    "",
    16,
    "record",
    "",
    3.0,
    1e-5,
    "fedavg",
    1.0,
    1,
    5,
    NETWORK,
    (PHASE,),
)


@given(st.floats(1e-3, 1e4))
def test_epsilon_is_never_rounded_down(epsilon: float) -> None:
    assert float(shown_epsilon(epsilon)) >= epsilon - 1e-9
    assert float(shown_epsilon(epsilon)) <= epsilon + 0.001 + epsilon * 1e-9


@given(st.floats(1e-300, 1.0))
def test_delta_is_never_rounded_down(delta: float) -> None:
    assert delta <= float(shown_delta(delta)) <= delta * (1 + 1e-5)


def test_what_is_left_is_never_rounded_up_and_plain_numbers_stay_plain() -> None:
    assert (shown_left(1.8096), shown_left(0.3), shown_left(0.0)) == ("1.809", "0.3", "0")
    assert (shown_delta(1e-5), shown_delta(0.0), shown_delta(1.0000001e-5)) == (
        "1e-05",
        "0",
        "1.00001e-05",
    )
    assert (
        "1.00001e-05)-differentially"
        in privacy_statement(replace(MANIFEST, delta=1.0000001e-5), 1.0)[0]
    )


def test_a_statement_names_unit_neighbours_schedule_noise_and_assumptions() -> None:
    text = " ".join(privacy_statement(MANIFEST, 2.0041))
    for part in (
        "(2.005, 1e-05)",
        "a single record",
        "adding or removing one unit",
        "8 steps at rate 0.25",
    ):
        assert part in text
    assert NOISE_SOURCE in text and "Poisson" in text and "one institution only" in text
    assert 'column "patient"' in " ".join(privacy_statement(replace(MANIFEST, unit="patient"), 2.0))


def test_a_run_without_privacy_says_so_and_others_are_not_guessed() -> None:
    assert "nothing is guaranteed" in privacy_statement(replace(MANIFEST, mode="none"), None)[0]
    with pytest.raises(ValueError, match="client"):
        privacy_statement(replace(MANIFEST, mode="client"), 1.0)
    with pytest.raises(ValueError, match="record"):
        privacy_statement(MANIFEST, None)
