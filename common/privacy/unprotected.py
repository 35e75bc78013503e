"""Runs without privacy: nothing is clipped, noised or charged, and nothing is guaranteed."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fedlora.common.errors import BadInput
from fedlora.common.manifest.manifest import Phase
from fedlora.common.manifest.plan import RoundPlan, Update
from fedlora.common.privacy.accountant import Spend
from fedlora.common.privacy.calibration import without_noise
from fedlora.common.privacy.guarantee import Guarantee, Permits
from fedlora.common.privacy.norm_bound import stepped

PLAIN_RMS = 100.0  # root mean square of an un-clipped update's coordinates, at most


class Unprotected(Guarantee):
    """Updates leave as they were trained; a policy must allow it."""

    name = "none"
    private = False
    clip_in_step = False
    noise_in_step = False
    needs_masks = False
    whom = "none"
    mechanism = "none: updates leave without noise"
    neighbours = "none: nothing is guaranteed"
    noise = "none"
    second_accountant = "none: there is no ε"
    calibrated = staticmethod(without_noise)

    @staticmethod
    def refusal(permits: Permits) -> str:
        """Allowed where the policy says `allow_unnoised`."""
        if permits.allow_unnoised:
            return ""
        return "updates would leave without noise; allow_unnoised is false"

    @staticmethod
    def check_delta(delta: float, units: int, where: str, institutions: int) -> None:
        """There is no δ."""

    @staticmethod
    def coordinate_bound(phase: Phase) -> float:
        """As far as steps along gradients of `PLAIN_RMS` lead; what is beyond is cut off."""
        return stepped(phase, PLAIN_RMS)

    def epsilon_of(self, attempts: Sequence[int]) -> float:
        """BadInput: there is none."""
        raise BadInput(f"manifest mode: found {self.name!r}, which has no ε")

    def charge(self) -> Spend:
        """Nothing: nothing is guaranteed."""
        return Spend(0.0, 0.0)

    @property
    def accountant(self) -> str:
        """None has anything to compute."""
        return "none: there is no ε"

    def _promise(self, epsilon: float | None) -> list[str]:
        return [
            "This run trained without privacy: nothing is guaranteed to anybody whose records it"
            " used."
        ]

    def committed(self, plan: RoundPlan, update: Update) -> bytes:
        """No ledger has an entry of such a run; its digest would tell two guesses at it apart."""
        return plan.to_bytes()

    def update_bound(self, phase: int, size: int) -> float:
        """What a coordinator takes for an update at all: nothing is clipped."""
        recipe = self.manifest.accounted[phase]
        if recipe.optimizer == "sgd":  # its steps follow gradients that nothing bounds
            return PLAIN_RMS * math.sqrt(size)
        return stepped(recipe, PLAIN_RMS, size)
