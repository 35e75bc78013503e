"""The length of a round's noise, as told, against noise that is drawn."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fedlora.client.training.step import ClipGroups, GradientSum, private_mean
from fedlora.common.manifest.manifest import Phase, RunManifest
from fedlora.common.model.state import AdapterSpec, TensorSpec
from fedlora.common.privacy.randomness import SeededRandom
from fedlora.server.runs.noise import noise_of_mean, signal_to_noise
from tests.server.fakes import manifest_of

SPEC = AdapterSpec((TensorSpec("lora.a", (40, 100)), TensorSpec("head.weight", (1000,))))
MEMBERS = 5


def run(name: str, **changes: object) -> tuple[RunManifest, Phase]:
    manifest = manifest_of(2, mode="record", spec=SPEC, noise_multiplier=1.5, clip=0.2)
    phase = replace(manifest.phases[0], name=name, **changes)  # type: ignore[arg-type]
    return replace(manifest, phases=(phase,)), phase


def drawn(phase: Phase, groups: ClipGroups) -> float:
    """Of the mean of all members' updates, when there is nothing but noise."""
    source, total = SeededRandom(3), np.zeros(SPEC.size)
    nothing = GradientSum(np.zeros(SPEC.size), 0, 0)
    for _ in range(MEMBERS * phase.steps):
        noise = private_mean(nothing, groups, phase.noise_multiplier, phase.expected_units, source)
        total += phase.learning_rate * noise
    return float(np.linalg.norm(total)) / MEMBERS


@pytest.mark.parametrize("name", ["head", "lora", "adapter"])
@pytest.mark.parametrize("steps", [1, 3])
def test_it_is_as_long_as_what_is_drawn(name: str, steps: int) -> None:
    manifest, phase = run(name, steps=steps)
    found = noise_of_mean(manifest, phase, SPEC, MEMBERS)
    expected = drawn(phase, ClipGroups.flat(SPEC, phase.clip, name))
    assert found == pytest.approx(expected, rel=0.1)
    assert signal_to_noise(manifest, phase, SPEC, MEMBERS) == pytest.approx(
        phase.learning_rate * steps * phase.clip / expected * phase.rounds**0.5, rel=0.1
    )


def test_groups_have_noise_of_their_own() -> None:
    manifest, phase = run("adapter", head_clip=2.0)
    expected = drawn(phase, ClipGroups.split(SPEC, phase.clip, phase.head_clip))
    assert noise_of_mean(manifest, phase, SPEC, MEMBERS) == pytest.approx(expected, rel=0.1)


def test_it_is_not_told_where_it_is_not_known() -> None:
    for changes in ({"optimizer": "adamw"}, {"noise_multiplier": 0.0}):
        assert noise_of_mean(*run("adapter", **changes), SPEC, MEMBERS) is None
    manifest, phase = run("adapter")
    assert noise_of_mean(manifest, phase, SPEC, 0) is None
    assert signal_to_noise(replace(manifest, mode="none"), phase, SPEC, MEMBERS) is None
