"""The public bound on an update's norm: beyond it, it is its sender's failure, not the sum's.

A sum hides who sent what, so one absurd update must be refused before it is added. The bound
follows from the manifest alone and is generous: an honest node never meets it, and nothing about
its data is needed. It does not make a malicious node harmless; robust rules do that.

With s steps, rate η, proximal μ, and G a bound on one step's noised gradient, SGD moves by at most
η G s (1 + η μ)^s. G is MAX_DRAW_RATIO times the clip (a draw of that many times the expected units,
all aligned) plus the norm of the noise. AdamW moves no coordinate by more than ADAM_STEP η a step:
by Cauchy-Schwarz |m̂| <= 7.3 √v̂ for β = (0.9, 0.999). A run without privacy clips nothing; with
SGD only gross nonsense is refused there.
"""

from __future__ import annotations

import math

import numpy as np

from fedlora.common.errors import BadInput
from fedlora.common.manifest.manifest import Phase, RunManifest
from fedlora.common.manifest.plan import Update
from fedlora.common.privacy.accountant import member_noise

MAX_DRAW_RATIO = 100.0
# a Gaussian vector's norm passes its root mean square by this many deviations: never seen
NOISE_TAIL = 10.0
ADAM_STEP = 10.0
PLAIN_RMS = 100.0  # root mean square of an un-clipped update's coordinates


def check_norm(update: Update, bound: float) -> None:
    """BadInput where the L2 norm of `update` is beyond `bound`, or is not a number."""
    norm = float(np.linalg.norm(update.delta.astype(np.float64)))
    if not norm <= bound:
        raise BadInput(
            f"update of {update.client}: found an L2 norm of {norm:.4g}, expected at most"
            f" {bound:.4g}"
        )


def update_bound(manifest: RunManifest, phase: int, size: int) -> float:
    """The largest L2 norm that an update of (size,) coordinates may have in a phase. Public."""
    recipe = manifest.phases[phase]
    # clipped whole, rounded, noised after that
    if manifest.mode == "client" and manifest.secure is not None:
        levels = manifest.secure.levels
        noise = member_noise(manifest, phase) * (math.sqrt(size) + NOISE_TAIL)
        return recipe.clip * (levels + math.sqrt(size) / 2 + noise) / levels
    if recipe.optimizer == "adamw":
        return recipe.steps * ADAM_STEP * recipe.learning_rate * math.sqrt(size)
    if recipe.optimizer != "sgd":
        raise BadInput(
            f"manifest phase optimizer: found {recipe.optimizer!r}, expected sgd or adamw"
        )
    if manifest.mode == "none":
        return PLAIN_RMS * math.sqrt(size)
    if manifest.mode != "record":  # nor "client" without secure aggregation
        raise BadInput(f"manifest mode: found {manifest.mode!r}, expected record or none")
    growth = (1 + recipe.learning_rate * recipe.proximal_mu) ** recipe.steps
    return recipe.steps * recipe.learning_rate * _gradient_bound(recipe, size) * growth


def coordinate_bound(phase: Phase, mode: str) -> float:
    """Where a coordinate of an update saturates under secure aggregation. Public.

    Not the clip: a noised update is longer. A drawn sum of twice the expected units whose gradients
    all lie in this one coordinate fits, and so do NOISE_TAIL deviations of its noise; what is
    beyond is cut off, not refused. In mode "client" the whole update is clipped and its noise added
    after this: there, and only there, it is the clip.
    """
    recipe = phase
    if mode == "client":
        return recipe.clip
    if recipe.optimizer == "adamw":
        return recipe.steps * ADAM_STEP * recipe.learning_rate
    if recipe.optimizer != "sgd":
        raise BadInput(
            f"manifest phase optimizer: found {recipe.optimizer!r}, expected sgd or adamw"
        )
    if mode == "none":
        step = PLAIN_RMS
    elif mode == "record":
        groups = 2 if recipe.head_clip else 1
        clip = math.hypot(recipe.clip, recipe.head_clip)
        deviation = math.sqrt(groups) * recipe.noise_multiplier * clip / recipe.expected_units
        step = 2 * clip + NOISE_TAIL * deviation
    else:
        raise BadInput(f"manifest mode: found {mode!r}, expected record or none")
    growth = (1 + recipe.learning_rate * recipe.proximal_mu) ** recipe.steps
    return recipe.steps * recipe.learning_rate * step * growth


def _gradient_bound(phase: Phase, size: int) -> float:
    """The norm of one noised mean gradient; of two groups, each gets √2 of what one would."""
    groups = 2 if phase.head_clip else 1
    clip = math.hypot(phase.clip, phase.head_clip)
    noise = math.sqrt(groups) * phase.noise_multiplier * clip * (math.sqrt(size) + NOISE_TAIL)
    return MAX_DRAW_RATIO * clip + noise / phase.expected_units
