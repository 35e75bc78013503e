"""The public bound on an update's norm: beyond it, it is its sender's failure, not the sum's.

A sum hides who sent what, so one absurd update must be refused before it is added. The bound
follows from the manifest alone and is generous: an honest node never meets it, and nothing about
its data is needed. It does not make a malicious node harmless; robust rules do that.

With s steps, rate η, proximal μ, and G a bound on one step's gradient, SGD moves by at most
η G s (1 + η μ)^s. AdamW moves no coordinate by more than ADAM_STEP η a step: by Cauchy-Schwarz
|m̂| <= 7.3 √v̂ for β = (0.9, 0.999). What G is, each guarantee says: where units are clipped, that of
a noised gradient; where nothing is, only gross nonsense is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from fedlora.common.disk.mapped import let_go
from fedlora.common.errors import BadInput
from fedlora.common.manifest.manifest import Phase
from fedlora.common.manifest.plan import Delta, Update

# a Gaussian vector's norm passes its root mean square by this many deviations: never seen
NOISE_TAIL = 10.0
ADAM_STEP = 10.0
_STRETCH = 1 << 16  # coordinates


def check_norm(update: Update, bound: float) -> None:
    """BadInput where the L2 norm of `update` is beyond `bound`, or is not a number."""
    norm = math.sqrt(sum(_squares(update.delta)))
    if not norm <= bound:
        raise BadInput(
            f"update of {update.client}: found an L2 norm of {norm:.4g}, expected at most"
            f" {bound:.4g}"
        )


def _squares(delta: Delta) -> Iterator[float]:
    """The squared norm of each stretch, in float64: a copy of it all may be too large."""
    for start in range(0, delta.size, _STRETCH):
        part = delta[start : start + _STRETCH]
        wide = part.astype(np.float64)
        let_go(part)
        yield float(wide @ wide)


def stepped(phase: Phase, gradient: float, size: int = 1) -> float:
    """How far a phase's local steps move (size,) coordinates whose gradient has norm `gradient` at
    most; BadInput for an optimizer that is not known.
    """
    if phase.optimizer == "adamw":
        return phase.steps * ADAM_STEP * phase.learning_rate * math.sqrt(size)
    if phase.optimizer != "sgd":
        raise BadInput(
            f"manifest phase optimizer: found {phase.optimizer!r}, expected sgd or adamw"
        )
    growth = (1 + phase.learning_rate * phase.proximal_mu) ** phase.steps
    return phase.steps * phase.learning_rate * gradient * growth
