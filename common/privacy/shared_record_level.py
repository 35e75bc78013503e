"""Privacy of records with the noise of one: institutions share it under masks, a step at a time.

A round is one local step. Each institution draws its units, clips each unit's gradient, adds them
up, rounds the sum to whole numbers and adds its part of a Skellam noise (`shared_noise`); the
coordinator learns the sum over all institutions, and makes the step. What one unit moves, and what
a draw is worth, `common.privacy.unit_release` says and proves.

Several local steps can't be had: from the second on, every gradient depends on what the first made
of each unit, which no clip bounds and no noise covers before the sums are added. For the same
reason the step is SGD's: what AdamW divides by has no noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from fedlora.common.config.schema import AggregationConfig, check_delta
from fedlora.common.manifest.manifest import Phase, SecureTerms, SkellamTerms
from fedlora.common.privacy.calibration import with_shared_unit_noise
from fedlora.common.privacy.figures import shown_delta, shown_epsilon
from fedlora.common.privacy.guarantee import NOT_COVERED, Permits
from fedlora.common.privacy.norm_bound import NOISE_TAIL
from fedlora.common.privacy.record_level import MAX_DRAW_RATIO, PACKED, RecordLevel
from fedlora.common.privacy.shared_noise import SharedNoise, composed
from fedlora.common.privacy.skellam import Release
from fedlora.common.privacy.unit_release import CAPACITY, MOST_UNITS, unit_releases
from fedlora.common.secagg import cohort

LEAST_UNITS = 1e-3  # expected of a draw: levels of a clip are divided by it
ONE_STEP = "a second one would depend on units that no noise covers yet"


class SharedRecordLevel(SharedNoise):
    """(ε, δ) of a unit against the coordinator and c institutions that side with it.

    Against all other institutions together, its own institution's part of the noise is what is
    left: `epsilon_alone`.
    """

    name = "shared-record"
    clip_in_step = True
    most_units = MOST_UNITS
    whom = "record or person (with noise that institutions share)"
    mechanism = (
        "Poisson sampling and per-unit clip, Skellam noise shared under secure aggregation, one"
        " local step a round"
    )
    neighbours = RecordLevel.neighbours
    accountant = (
        "Rényi bound of the Skellam mechanism (Agarwal, Kairouz and Liu 2021) under Poisson"
        " sampling (Mironov, Talwar and Zhang 2019; Zhu and Wang 2019)"
    )
    calibrated = staticmethod(with_shared_unit_noise)

    @staticmethod
    def refusal(permits: Permits) -> str:
        """Allowed where the policy says `shared_noise`."""
        if permits.shared_noise:
            return ""
        return "its noise is shared with others; shared_noise is false"

    @staticmethod
    def check_delta(delta: float, units: int, where: str, institutions: int) -> None:
        """Against the number of units."""
        check_delta(delta, units, where)

    @staticmethod
    def coordinate_bound(phase: Phase) -> float:
        """Of a sum without its noise: twice the expected units, whose gradients are all the clip
        and in this one coordinate, fit; what is beyond is cut off, which brings no two sums apart.
        """
        return CAPACITY * phase.learning_rate * phase.clip

    @staticmethod
    def noise_part(members: float, aggregation: AggregationConfig) -> float:
        """One in t - c, which any sum that may be learnt has."""
        carriers = cohort.threshold(int(members)) - aggregation.max_colluders
        return 1 / max(1, carriers)

    def shared_noise(self) -> str:
        """Also what this institution's own part is worth without the others'."""
        told = super().shared_noise()
        alone = self.epsilon_alone()
        shown = "no finite ε" if alone is None else f"ε = {shown_epsilon(alone)}"
        return (
            f"{told}; {shown} by this node's part alone, in a cohort of"
            f" {self.manifest.largest_cohort} at most"
        )

    def epsilon_alone(self) -> float | None:
        """By this institution's own part of the noise, in the largest cohort there may be."""
        secure, _ = self._terms()
        carriers = cohort.threshold(self.manifest.largest_cohort) - secure.max_colluders
        parts = tuple(
            replace(each, noise_multiplier=each.noise_multiplier / math.sqrt(carriers))
            for each in self.releases()
        )
        epsilon = composed(parts, self.manifest.delta)
        return epsilon if math.isfinite(epsilon) else None

    def _promise(self, epsilon: float | None) -> list[str]:
        manifest, secure, terms = self.manifest, self.manifest.secure, self.manifest.skellam
        if epsilon is None or secure is None or terms is None:
            raise ValueError(f"no statement is known for mode {self.name!r} without its terms")
        unit = (
            f'all records that share a value of the column "{manifest.unit}"'
            if manifest.unit
            else "a single record"
        )
        delta = shown_delta(manifest.delta)
        return [
            "The sums over institutions that were learnt are"
            f" ({shown_epsilon(epsilon)}, {delta})-differentially private. The unit is {unit};"
            " neighbouring data sets differ by adding or removing one unit at one institution.",
            "ε covers every attempt that was consented to, spare ones included, also where the run"
            f" stopped earlier. It was computed with the {self.accountant}: {self._sums(terms)}.",
            "Each round is one step. Each institution draws its units independently at a public"
            " rate (Poisson sampling), clips each unit's gradient once, rounds their sum to whole"
            " numbers and adds its part of integer noise, all from the operating system's"
            f" generator. The noise is {self.noise}: what leaves one institution is protected by"
            " its mask and the others' noise, not by ε alone.",
            "This holds only with secure aggregation whose sums have at least t = ⌊2n/3⌋ + 1 of"
            f" the n institutions of a round, of which at most c = {secure.max_colluders} side"
            " with the coordinator or leave their noise out: any t - c others, at least"
            f" {terms.carriers}, carry all of the noise. It is computational, as masks are.",
            self._alone(delta),
            *([PACKED] if manifest.batches == "packed" else []),
            "Assumed: a unit occurs at one institution only (otherwise its ε and δ add up), the"
            " base model, the label set and the configuration were chosen without looking at"
            " the private records, and validation and test files are public.",
            NOT_COVERED,
        ]

    def _sums(self, terms: SkellamTerms) -> str:
        return "; ".join(
            f"phase {phase.name}, {phase.attempts} sums of {count} coordinates at rate"
            f" {phase.sampling_rate:g} with noise multiplier {phase.noise_multiplier:.4g}"
            for phase, count in zip(self.manifest.phases, terms.coordinates, strict=True)
        )

    def _alone(self, delta: str) -> str:
        alone = self.epsilon_alone()
        told = "no finite ε" if alone is None else f"ε = {shown_epsilon(alone)} at δ = {delta}"
        return (
            "If all other institutions sided with the coordinator, what is left to a unit is its"
            f" own institution's part of the noise: {told}, in a cohort of"
            f" {self.manifest.largest_cohort}, the largest that there may be."
        )

    def update_bound(self, phase: int, size: int) -> float:
        """The drawn sum that is far beyond any, rounded, noised after that."""
        secure, _ = self._terms()
        recipe = self.manifest.phases[phase]
        noise = math.sqrt(size) / 2 + self.member_noise(phase) * (math.sqrt(size) + NOISE_TAIL)
        level = secure.update_bounds[phase] / secure.levels
        return MAX_DRAW_RATIO * recipe.learning_rate * recipe.clip + noise * level

    def _made(self, secure: SecureTerms, terms: SkellamTerms) -> Sequence[Release]:
        return unit_releases(self.manifest.phases, terms.coordinates, secure.levels)

    def _own_faults(self, secure: SecureTerms, terms: SkellamTerms) -> list[str]:
        manifest, faults = self.manifest, list[str]()
        if manifest.network.head_hidden:  # how its products are rounded follows from who is drawn
            found = f"network head_hidden: found {manifest.network.head_hidden}, expected 0"
            faults.append(
                f"{found}: a unit would turn others' gradients by more than is allowed for"
            )
        for place, phase in enumerate(manifest.phases):
            where = f"phases[{place}]"
            if phase.steps != 1:
                faults.append(f"{where} steps: found {phase.steps}, expected 1: {ONE_STEP}")
            if phase.optimizer != "sgd":
                faults.append(f"{where} optimizer: found {phase.optimizer!r}, expected sgd")
            if not LEAST_UNITS <= phase.expected_units < math.inf:
                faults.append(
                    f"{where} expected_units: found {phase.expected_units}, expected at least"
                    f" {LEAST_UNITS}"
                )
            if phase.head_clip:
                faults.append(f"{where} head_clip: found {phase.head_clip:g}, expected 0")
            if secure.update_bounds[place] != self.coordinate_bound(phase):
                faults.append(
                    f"secure update_bounds: found {secure.update_bounds[place]:g}, expected"
                    f" {self.coordinate_bound(phase):g}, which {where} asks for"
                )
        if manifest.largest_cohort < manifest.minimum_cohort:
            faults.append(
                f"largest_cohort: found {manifest.largest_cohort}, expected at least"
                f" {manifest.minimum_cohort}"
            )
        return faults or [
            f"secure levels: {each.coarse}"
            for each in unit_releases(manifest.phases, terms.coordinates, secure.levels)
            if each.coarse
        ]
