"""Privacy of whole institutions: each clips its whole update, and all share one noise under masks.

A sum is one release with Skellam noise (`common.privacy.skellam`), of which every member adds a
part before its mask: those who stay carry all of it. Nothing of a single update is protected by ε
before it is masked, so no digest of it is kept either.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from fedlora.common.config.schema import check_delta
from fedlora.common.errors import BadInput, Refused
from fedlora.common.manifest.manifest import Phase, SecureTerms, SkellamTerms
from fedlora.common.manifest.plan import RoundPlan, Update
from fedlora.common.model.state import AdapterSpec, Vector
from fedlora.common.privacy.calibration import with_skellam_noise
from fedlora.common.privacy.figures import shown_delta, shown_epsilon
from fedlora.common.privacy.guarantee import NOT_COVERED, Guarantee, Permits
from fedlora.common.privacy.norm_bound import NOISE_TAIL
from fedlora.common.privacy.randomness import OsRandom
from fedlora.common.privacy.skellam import (
    Ints,
    Release,
    clipped,
    epsilon_of_releases,
    noised,
    releases,
)
from fedlora.common.secagg import cohort


class InstitutionLevel(Guarantee):
    """A policy must opt in: the noise of the others is relied on, up to the colluders."""

    name = "client"
    private = True
    noise_in_step = False
    needs_masks = True
    whom = "institution"
    mechanism = "clip of the whole update, Skellam noise shared under secure aggregation"
    neighbours = (
        "cohorts of which one institution's update is there or zero; a budget is charged for data"
        " sets that differ by one record"
    )
    noise = "Skellam on whole numbers, shared between the institutions"
    second_accountant = (
        "none: no second implementation of the Skellam mechanism's bound is installed"
    )
    accountant = "Rényi bound of the Skellam mechanism (Agarwal, Kairouz and Liu 2021)"
    unit = "institution"
    cost_name = "ε of a record"
    calibrated = staticmethod(with_skellam_noise)

    @staticmethod
    def refusal(permits: Permits) -> str:
        if permits.client_level:
            return ""
        return "its noise is shared with others; client_level is false"

    @staticmethod
    def check_delta(delta: float, units: int, where: str, institutions: int) -> None:
        check_delta(delta, institutions, "[federation] clients:")

    @staticmethod
    def coordinate_bound(phase: Phase) -> float:
        """The clip: the whole update is clipped, and its noise added after this."""
        return phase.clip

    def releases(self) -> list[Release]:
        """Every sum that all attempts may release, one kind a phase; BadInput where the terms are
        not whole.
        """
        secure, terms = self._terms()
        faults = self._faults(secure, terms)
        if faults:
            raise BadInput([f"manifest {fault}" for fault in faults])
        return releases(self.manifest.phases, terms.coordinates, secure.levels)

    def epsilon_of(self, attempts: Sequence[int]) -> float:
        pairs = zip(self.releases(), attempts, strict=True)
        done = tuple(replace(each, times=count) for each, count in pairs)
        return _composed(done, self.manifest.delta, 1)

    def charged_epsilon(self) -> float:
        """ε is stated for an update that is there or zero. One record more or less makes it any
        other update, which is twice as far: a budget that also pays for records would be charged
        too little by the former.
        """
        return _composed(tuple(self.releases()), self.manifest.delta, 2)

    def stated(self, reserved: float) -> float:
        return self.stated_epsilon() if reserved else 0.0

    def cap(self, epsilon: float) -> float:
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
        return [
            {**each, "steps": phase.attempts, "sampling_rate": 1.0}
            for each, phase in zip(super().schedule(), self.manifest.phases, strict=True)
        ]

    def clipped(self, delta: Vector, phase: Phase) -> Vector:
        return clipped(delta, phase.clip)

    def committed(self, plan: RoundPlan, update: Update) -> bytes:
        """Nothing of an update that has no noise yet."""
        return plan.to_bytes()

    def update_bound(self, phase: int, size: int) -> float:
        """Clipped whole, rounded, noised after that."""
        secure, _ = self._terms()
        noise = self.member_noise(phase) * (math.sqrt(size) + NOISE_TAIL)
        clip, levels = self.manifest.phases[phase].clip, secure.levels
        return clip * (levels + math.sqrt(size) / 2 + noise) / levels

    def shared_noise(self) -> str:
        self.releases()
        _, terms = self._terms()
        return f"noise carried by {terms.carriers} honest institutions at least"

    def check_node(self, colluders: int) -> None:
        """The others add the variance over t - c. Under a larger c of a node's own, what the honest
        ones add would be less than what ε was computed for, and a larger share of this node alone
        would not make up for it.
        """
        self.releases()
        secure, _ = self._terms()
        if secure.max_colluders < colluders:
            raise Refused(
                f"manifest secure max_colluders: found {secure.max_colluders}, expected at least"
                f" this node's {colluders}: the others' shares of the noise follow from it"
            )

    def check_cohort(self, phase: int, spec: AdapterSpec, members: int) -> None:
        """Before anything trains: fewer than was promised would carry the noise, or what a phase
        moves is not what was promised to be noised.
        """
        self._carriers(phase, spec, members)

    def noised(self, levels: Ints, phase: int, spec: AdapterSpec, members: int) -> Ints:
        carriers = self._carriers(phase, spec, members)
        moved = spec.moved_by(self.manifest.phases[phase].name)
        return noised(OsRandom(), levels, moved, self.releases()[phase], carriers)

    def member_noise(self, phase: int) -> float:
        _, terms = self._terms()
        return math.sqrt(self.releases()[phase].share(terms.carriers))

    def _carriers(self, phase: int, spec: AdapterSpec, members: int) -> int:
        """t - c of a cohort of so many."""
        secure, terms = self._terms()
        cohort.check_colluders(members, secure.max_colluders)
        carriers = cohort.threshold(members) - secure.max_colluders
        if carriers < terms.carriers:
            raise Refused(
                f"cohort: {members} members leave {carriers} to carry the noise, expected at least"
                f" {terms.carriers}"
            )
        moved = int(spec.moved_by(self.manifest.phases[phase].name).sum())
        if terms.coordinates[phase] != moved:
            raise BadInput(
                f"manifest skellam coordinates: found {terms.coordinates[phase]} in phase {phase},"
                f" expected the {moved} that it moves"
            )
        return carriers

    def _terms(self) -> tuple[SecureTerms, SkellamTerms]:
        secure, terms = self.manifest.secure, self.manifest.skellam
        if secure is None or terms is None:
            raise BadInput(
                f"manifest mode: found {self.name!r}, expected {self.name} with secure and skellam"
                " terms"
            )
        return secure, terms

    def _faults(self, secure: SecureTerms, terms: SkellamTerms) -> list[str]:
        """What does not fit between the terms of shared noise and the rest of the manifest."""
        phases, faults = self.manifest.phases, []
        if not len(secure.update_bounds) == len(terms.coordinates) == len(phases):
            faults.append(
                "skellam: expected a bound and a number of coordinates for each of"
                f" {len(phases)} phases"
            )
        elif any(
            phase.clip != bound or phase.head_clip
            for phase, bound in zip(phases, secure.update_bounds, strict=True)
        ):
            faults.append(
                "secure update_bounds: found others than the clips, which they are in mode client"
            )
        carriers = cohort.threshold(self.manifest.minimum_cohort) - secure.max_colluders
        if terms.carriers != carriers or carriers < 2:
            faults.append(
                f"skellam carriers: found {terms.carriers}, expected t - max_colluders ="
                f" {carriers}, at least 2"
            )
        if not faults:
            made = releases(phases, terms.coordinates, secure.levels)
            faults += [f"skellam {each}" for one in made if (each := one.beyond(terms.carriers))]
        return faults


@lru_cache(maxsize=1024)
def _composed(done: tuple[Release, ...], delta: float, moved: int) -> float:
    return epsilon_of_releases(done, delta, moved)
