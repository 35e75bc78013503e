"""How long a round's noise is beside its mean update. Where noise is longer, little is learnt.

All of it is public: the manifest says how much noise is added, and the sum is noised already.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from fedlora.common.config.schema import AggregationConfig
from fedlora.common.manifest.manifest import Phase, RunManifest
from fedlora.common.manifest.turns import turns
from fedlora.common.model.state import AdapterSpec
from fedlora.common.privacy.accountant import group_scales
from fedlora.common.privacy.modes import guarantee_of


def noise_of_mean(
    manifest: RunManifest, phase: Phase, spec: AdapterSpec, members: float
) -> float | None:
    """The L2 norm that noise alone gives the mean update of so many `members` in a round, about.

    `phase` is named by what the round moves of it (`RunManifest.recipe_of`). None where that can't
    be told: no step is noised, or a node's optimiser is not SGD, whose steps are in proportion to
    what is noised.
    """
    guarantee = guarantee_of(manifest)
    noised = guarantee.clip_in_step and phase.noise_multiplier > 0
    if not noised or phase.optimizer != "sgd" or members < 1:
        return None
    counts = _coordinates(phase, spec)
    scales = group_scales(phase.noise_multiplier, _clips(phase))
    variance = sum(count * scale**2 for count, scale in zip(counts, scales, strict=True))
    secure = manifest.secure
    asked = (
        AggregationConfig()
        if secure is None
        else AggregationConfig(max_colluders=secure.max_colluders)
    )
    variance *= phase.steps * guarantee.noise_part(members, asked) / members
    return phase.learning_rate / phase.expected_units * math.sqrt(variance)


def signal_to_noise(
    manifest: RunManifest, phase: Phase, spec: AdapterSpec, members: float
) -> float | None:
    """The most that a phase's updates can come to together, as a multiple of their noise.

    If all gradients of the expected draws were as long as the clip and pointed one way, in every
    round: a signal adds up, and noise by the root of the rounds alone. Texts that differ pull in
    many directions; a quarter of it is much. None as in `noise_of_mean`.
    """
    rounds = (replace(phase, name=each) for each in turns(phase.name, manifest.network.variant))
    noise = max(noise_of_mean(manifest, each, spec, members) or 0.0 for each in rounds)
    if not noise:
        return None
    signal = phase.learning_rate * phase.steps * math.hypot(*_clips(phase))
    return signal / noise * math.sqrt(phase.rounds)


def _clips(phase: Phase) -> Sequence[float]:
    return (phase.clip, phase.head_clip) if phase.head_clip else (phase.clip,)


def _coordinates(phase: Phase, spec: AdapterSpec) -> Sequence[int]:
    """How many each of `_clips` bounds: LoRA's and the head's, or all that a round moves."""
    moved = int(spec.moved_by(phase.name).sum())
    head = int(spec.head_mask().sum())
    return (moved - head, head) if phase.head_clip else (moved,)
