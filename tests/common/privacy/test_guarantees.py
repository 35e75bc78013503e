"""What is stated is what was accounted, and never less."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fedlora.common.config.schema import LoraConfig, ModelConfig
from fedlora.common.manifest.manifest import Network, Phase, RunManifest
from fedlora.common.privacy.modes import guarantee_of
from fedlora.common.privacy.record_level import RecordLevel

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


def test_a_statement_names_unit_neighbours_schedule_noise_and_assumptions() -> None:
    text = " ".join(guarantee_of(MANIFEST).statement(2.0041))
    for part in (
        "(2.005, 1e-05)",
        "a single record",
        "adding or removing one unit",
        "8 steps at rate 0.25",
    ):
        assert part in text
    assert RecordLevel.noise in text and "Poisson" in text and "one institution only" in text
    assert 'column "patient"' in " ".join(
        guarantee_of(replace(MANIFEST, unit="patient")).statement(2.0)
    )


def test_a_statement_rounds_delta_up() -> None:
    assert (
        "1.00001e-05)-differentially"
        in guarantee_of(replace(MANIFEST, delta=1.0000001e-5)).statement(1.0)[0]
    )


def test_a_run_without_privacy_says_so_and_others_are_not_guessed() -> None:
    assert (
        "nothing is guaranteed" in guarantee_of(replace(MANIFEST, mode="none")).statement(None)[0]
    )
    with pytest.raises(ValueError, match="client"):
        guarantee_of(replace(MANIFEST, mode="client")).statement(1.0)
    with pytest.raises(ValueError, match="record"):
        guarantee_of(MANIFEST).statement(None)
