"""Privacy of records, or of whatever a column names: each institution's noise is whole by itself.

Every local step draws units by Poisson sampling, clips each unit's gradient, adds Gaussian noise to
the sum and divides by a public number. `common.privacy.accountant` composes the steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from fedlora.common.config.schema import check_delta
from fedlora.common.errors import BadInput
from fedlora.common.manifest.manifest import Phase
from fedlora.common.privacy.accountant import (
    ACCOUNTANT,
    RENYI,
    Mechanism,
    epsilon_of,
    renyi_epsilon,
)
from fedlora.common.privacy.calibration import with_gaussian_noise
from fedlora.common.privacy.figures import shown_delta, shown_epsilon
from fedlora.common.privacy.guarantee import NOT_COVERED, Guarantee, Permits
from fedlora.common.privacy.norm_bound import NOISE_TAIL, stepped

PACKED = (
    "A step's records were computed in packed batches: by rounding, what one record gives depends"
    " on the others beside it, which the clip does not bound. Fixed batches do not have this."
)
MAX_DRAW_RATIO = 100.0  # a draw of so many times the expected units, all aligned


class RecordLevel(Guarantee):
    """Any policy permits it; nothing but a node's own noise is relied on."""

    name = "record"
    private = True
    clip_in_step = True
    noise_in_step = True
    needs_masks = False
    whom = "record or person (by the node)"
    mechanism = "Poisson-subsampled Gaussian, per-unit clip"
    neighbours = "data sets that differ by adding or removing one unit"
    noise = "continuous Gaussian in floating point"
    second_accountant = RENYI
    accountant = ACCOUNTANT
    calibrated = staticmethod(with_gaussian_noise)

    @staticmethod
    def refusal(permits: Permits) -> str:
        """Every policy allows it."""
        return ""

    @staticmethod
    def check_delta(delta: float, units: int, where: str, institutions: int) -> None:
        """Against the number of units."""
        check_delta(delta, units, where)

    @staticmethod
    def coordinate_bound(phase: Phase) -> float:
        """Not the clip: a noised update is longer. A drawn sum of twice the expected units whose
        gradients all lie in this one coordinate fits, and so do NOISE_TAIL deviations of its noise;
        what is beyond is cut off, not refused.
        """
        groups, clip = _clips(phase)
        deviation = math.sqrt(groups) * phase.noise_multiplier * clip / phase.expected_units
        return stepped(phase, 2 * clip + NOISE_TAIL * deviation)

    def history(self, attempts: Sequence[int] | None = None) -> list[Mechanism]:
        """Every step that so many attempts of each phase, and of the evaluation, take; all of them
        by default.

        BadInput where a phase is not a mechanism.
        """
        phases = self.manifest.accounted
        counts = [phase.attempts for phase in phases] if attempts is None else attempts
        pairs = list(zip(phases, counts, strict=True))
        for phase, count in pairs:
            for name, found in (("steps", phase.steps), ("attempts", count)):
                if found < 0:
                    raise BadInput(f"manifest phase {name}: found {found}, expected at least 0")
        return [Mechanism(p.sampling_rate, p.noise_multiplier, p.steps * n) for p, n in pairs]

    def epsilon_of(self, attempts: Sequence[int]) -> float:
        """All steps of these attempts, draws amplified: the PRV accountant's upper bound."""
        return epsilon_of(self.history(attempts), self.manifest.delta)

    def attempts_within(
        self, phase: Phase, noise_multiplier: float, epsilon: float, most: int
    ) -> int | None:
        """By bisection: what attempts cost grows with their number."""

        def fits(attempts: int) -> bool:
            steps = Mechanism(phase.sampling_rate, noise_multiplier, phase.steps * attempts)
            return epsilon_of([steps], self.manifest.delta) <= epsilon

        low, high = 0, most + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low

    def second_epsilon(self) -> float | None:
        """By Rényi divergences, which is looser; None where no bound is known."""
        epsilon = renyi_epsilon(self.history(), self.manifest.delta)
        return epsilon if math.isfinite(epsilon) else None

    def _promise(self, epsilon: float | None) -> list[str]:
        if epsilon is None:
            raise ValueError(f"no statement is known for mode {self.name!r} without its ε")
        manifest = self.manifest
        unit = (
            f'all records that share a value of the column "{manifest.unit}"'
            if manifest.unit
            else "a single record"
        )
        phases = "; ".join(
            f"phase {phase.name}, {phase.steps * phase.attempts} steps at rate"
            f" {phase.sampling_rate:g} with noise multiplier {phase.noise_multiplier:.4g}"
            for phase in manifest.phases
        )
        return [
            f"Each institution's updates are ({shown_epsilon(epsilon)},"
            f" {shown_delta(manifest.delta)})-differentially private. The unit is {unit};"
            " neighbouring data sets differ by adding or removing one unit.",
            "ε covers the whole schedule that was consented to, spare attempts included, also"
            f" where the run stopped earlier. It was computed by {self.accountant} for the"
            f" sampling that ran: {phases}.",
            "Every step draws each unit independently at a public rate (Poisson sampling),"
            " clips each unit's gradient once, adds Gaussian noise to the sum and divides by a"
            " public number. Draws and noise come from the operating system's generator.",
            f"The noise is {self.noise}: the guarantee is that of the mathematical mechanism,"
            " and the last bits of floating point numbers are not covered by it.",
            *([PACKED] if manifest.batches == "packed" else []),
            "Assumed: a unit occurs at one institution only (otherwise its ε and δ add up), the"
            " base model, the label set and the configuration were chosen without looking at"
            " the private records, and validation and test files are public.",
            NOT_COVERED,
        ]

    def update_bound(self, phase: int, size: int) -> float:
        """G is MAX_DRAW_RATIO times the clip, plus the norm of the noise."""
        recipe = self.manifest.accounted[phase]
        groups, clip = _clips(recipe)
        noise = math.sqrt(groups) * recipe.noise_multiplier * clip * (math.sqrt(size) + NOISE_TAIL)
        return stepped(recipe, MAX_DRAW_RATIO * clip + noise / recipe.expected_units, size)


def _clips(phase: Phase) -> tuple[int, float]:
    """How many groups share the noise, each √groups of what one would have, and the L2 norm of
    their clips.
    """
    return (2 if phase.head_clip else 1), math.hypot(phase.clip, phase.head_clip)
