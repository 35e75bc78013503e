"""Privacy of whole institutions: each clips its whole update, and all share one noise under masks.

A sum is one release with Skellam noise (`common.privacy.skellam`), of which every member adds a
part before its mask (`common.privacy.shared_noise`). Nothing of a single update is protected by ε
before it is masked, so no digest of it is kept either.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from fedlora.common.config.schema import check_delta
from fedlora.common.manifest.manifest import Phase, SecureTerms, SkellamTerms
from fedlora.common.model.state import Vector
from fedlora.common.privacy.calibration import with_skellam_noise
from fedlora.common.privacy.figures import shown_delta, shown_epsilon
from fedlora.common.privacy.guarantee import NOT_COVERED, Permits
from fedlora.common.privacy.norm_bound import NOISE_TAIL
from fedlora.common.privacy.shared_noise import SharedNoise, composed
from fedlora.common.privacy.skellam import Release, clipped, releases


class InstitutionLevel(SharedNoise):
    """The unit is an institution; what one record can do costs more, and a budget is charged it."""

    name = "client"
    clip_in_step = False
    whom = "institution"
    mechanism = "clip of the whole update, Skellam noise shared under secure aggregation"
    neighbours = (
        "cohorts of which one institution's update is there or zero; a budget is charged for data"
        " sets that differ by one record"
    )
    accountant = "Rényi bound of the Skellam mechanism (Agarwal, Kairouz and Liu 2021)"
    unit = "institution"
    cost_name = "ε of a record"
    calibrated = staticmethod(with_skellam_noise)

    @staticmethod
    def refusal(permits: Permits) -> str:
        """Allowed where the policy says `client_level`."""
        if permits.client_level:
            return ""
        return "its noise is shared with others; client_level is false"

    @staticmethod
    def check_delta(delta: float, units: int, where: str, institutions: int) -> None:
        """Against the number of institutions: they are the units."""
        check_delta(delta, institutions, "[federation] clients:")

    @staticmethod
    def coordinate_bound(phase: Phase) -> float:
        """The clip: the whole update is clipped, and its noise added after this."""
        return phase.clip

    def charged_epsilon(self) -> float:
        """ε is stated for an update that is there or zero. One record more or less makes it any
        other update, which is twice as far: a budget that also pays for records would be charged
        too little by the former.
        """
        return composed(tuple(self.releases()), self.manifest.delta, 2)

    def stated(self, reserved: float) -> float:
        """An institution's ε, where anything was reserved; what was reserved is a record's."""
        return self.stated_epsilon() if reserved else 0.0

    def cap(self, epsilon: float) -> float:
        """What a budget that pays for records is charged, which is more than `epsilon`."""
        return self.charged_epsilon()

    def _promise(self, epsilon: float | None) -> list[str]:
        """ε is computed from the manifest: what was reserved is the larger one, of a record."""
        manifest, secure, terms = self.manifest, self.manifest.secure, self.manifest.skellam
        if epsilon is None or secure is None or terms is None:
            raise ValueError(f"no statement is known for mode {self.name!r} without its terms")
        sums = "; ".join(
            f"phase {phase.name}, {phase.attempts} sums of {count} coordinates with noise"
            f" multiplier {phase.noise_multiplier:.4g} and clip {phase.clip:g}"
            for phase, count in zip(manifest.phases, terms.coordinates, strict=True)
        )
        delta = shown_delta(manifest.delta)
        return [
            "The sums of updates that left the institutions are"
            f" ({shown_epsilon(self.stated_epsilon())}, {delta})-differentially private. The"
            " unit is an institution, with all its records; neighbours differ in whether its"
            " update is added or zero, in a cohort that is fixed.",
            "One record more or less at an institution changes its update to any other: for it"
            f" the same run is ({shown_epsilon(self.charged_epsilon())},"
            f" {delta})-differentially private, and that is what budgets are charged.",
            "ε covers every attempt that was consented to, also where the run stopped earlier."
            " It was computed with the Rényi bound of the Skellam mechanism (Agarwal, Kairouz"
            f" and Liu 2021): {sums}.",
            "Each institution trains without noise, clips its whole update, rounds it to whole"
            " numbers and adds a share of integer noise from the operating system's generator."
            f" The noise is {self.noise}: an update by itself is protected by its mask, not by"
            " ε.",
            "This holds only with secure aggregation whose sums have at least t = ⌊2n/3⌋ + 1 of"
            f" the n institutions of a round, of which at most c = {secure.max_colluders} side"
            " with the coordinator or leave their noise out: any t - c others, at least"
            f" {terms.carriers}, carry all of the noise. It is computational, as masks are.",
            "Assumed: base model, label set and configuration were chosen without looking at"
            " the private records, and validation and test files are public.",
            NOT_COVERED,
        ]

    def schedule(self) -> list[dict[str, Any]]:
        """Each attempt is one release of a whole update; local steps are not accounted."""
        return [
            {**each, "steps": phase.attempts, "sampling_rate": 1.0}
            for each, phase in zip(super().schedule(), self.manifest.phases, strict=True)
        ]

    def clipped(self, delta: Vector, phase: Phase) -> Vector:
        """The whole update, to the phase's clip."""
        return clipped(delta, phase.clip)

    def update_bound(self, phase: int, size: int) -> float:
        """Clipped whole, rounded, noised after that."""
        secure, _ = self._terms()
        noise = self.member_noise(phase) * (math.sqrt(size) + NOISE_TAIL)
        clip, levels = self.manifest.phases[phase].clip, secure.levels
        return clip * (levels + math.sqrt(size) / 2 + noise) / levels

    def _made(self, secure: SecureTerms, terms: SkellamTerms) -> Sequence[Release]:
        return releases(self.manifest.phases, terms.coordinates, secure.levels)

    def _own_faults(self, secure: SecureTerms, terms: SkellamTerms) -> list[str]:
        pairs = zip(self.manifest.phases, secure.update_bounds, strict=True)
        if any(phase.clip != bound or phase.head_clip for phase, bound in pairs):
            return [
                "secure update_bounds: found others than the clips, which they are in mode client"
            ]
        return []
