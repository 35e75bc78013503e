"""Noise of which every member of a cohort adds a part before its mask, and what that rests on.

A sum under masks has at least t = ⌊2n/3⌋ + 1 inputs of a cohort of n, of which at most c are of
institutions that side with the coordinator, or leave their part out. So each adds Skellam noise of
the whole's variance over t - c: any t - c honest parts together are the whole, or more. What a
guarantee is stated for, its class says.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

from fedlora.common.errors import BadInput, Refused
from fedlora.common.manifest.manifest import SecureTerms, SkellamTerms
from fedlora.common.manifest.plan import RoundPlan, Update
from fedlora.common.manifest.turns import most_moved
from fedlora.common.model.state import AdapterSpec
from fedlora.common.privacy.guarantee import Guarantee
from fedlora.common.privacy.randomness import OsRandom
from fedlora.common.privacy.skellam import Ints, Release, epsilon_of_releases, noised
from fedlora.common.secagg import cohort


class SharedNoise(Guarantee):
    """A policy must opt in: the noise of the others is relied on, up to the colluders."""

    private = True
    noise_in_step = False
    needs_masks = True
    noise = "Skellam on whole numbers, shared between the institutions"
    second_accountant = (
        "none: no second implementation of the Skellam mechanism's bound is installed"
    )

    @abstractmethod
    def _made(self, secure: SecureTerms, terms: SkellamTerms) -> Sequence[Release]:
        """A release of each phase, as the terms say."""

    @abstractmethod
    def _own_faults(self, secure: SecureTerms, terms: SkellamTerms) -> list[str]:
        """What does not fit this guarantee, in a manifest whose terms are of all its phases."""

    def releases(self) -> list[Release]:
        """Every sum that all attempts may release, one kind a phase; BadInput where the terms are
        not whole.
        """
        secure, terms = self._terms()
        faults = self._faults(secure, terms)
        if faults:
            raise BadInput([f"manifest {fault}" for fault in faults])
        return list(self._made(secure, terms))

    def epsilon_of(self, attempts: Sequence[int]) -> float:
        """Of so many noised sums of each phase, by the Skellam mechanism's Rényi bound."""
        pairs = zip(self.releases(), attempts, strict=True)
        done = tuple(replace(each, times=count) for each, count in pairs)
        return composed(done, self.manifest.delta)

    def committed(self, plan: RoundPlan, update: Update) -> bytes:
        """Nothing of an update that has no noise yet."""
        return plan.to_bytes()

    @property
    def honest_peers(self) -> int:
        """Beside the institution itself: the fewest honest ones in a sum that may be learnt."""
        return self._terms()[1].carriers - 1

    def shared_noise(self) -> str:
        """How many honest institutions carry it; BadInput where its terms are not whole."""
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

    def check_network(self, spec: AdapterSpec) -> None:
        """What each phase moves is what was promised to be noised."""
        for phase in range(len(self.releases())):
            self._check_moved(phase, spec)

    def check_cohort(self, phase: int, spec: AdapterSpec, members: int) -> None:
        """Before anything trains: fewer than was promised would carry the noise, or what a phase
        moves is not what was promised to be noised.
        """
        self._carriers(phase, spec, members)

    def noised(self, levels: Ints, plan: RoundPlan, spec: AdapterSpec, members: int) -> Ints:
        """With this institution's part of the noise, on what the round moves; Refused of few."""
        carriers = self._carriers(plan.phase, spec, members)
        moved = spec.moved_by(self.manifest.recipe_of(plan.round).name)
        return noised(OsRandom(), levels, moved, self.releases()[plan.phase], carriers)

    def member_noise(self, phase: int) -> float:
        """One institution's part, in levels, in the smallest cohort."""
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
        if 0 < self.manifest.largest_cohort < members:
            raise Refused(
                f"cohort: {members} members, of whose noise each adds less than of that of"
                f" {self.manifest.largest_cohort}, expected at most as many"
            )
        self._check_moved(phase, spec)
        return carriers

    def _check_moved(self, phase: int, spec: AdapterSpec) -> None:
        name, variant = self.manifest.phases[phase].name, self.manifest.network.variant
        moved, noised = most_moved(spec, name, variant), self._terms()[1].coordinates[phase]
        if noised != moved:
            raise BadInput(
                f"manifest skellam coordinates: found {noised} in phase {phase}, expected the"
                f" {moved} that it moves"
            )

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
        if self.manifest.evaluation is not None:
            faults.append("evaluation: expected none where institutions share noise")
        if not len(secure.update_bounds) == len(terms.coordinates) == len(phases):
            faults.append(
                "skellam: expected a bound and a number of coordinates for each of"
                f" {len(phases)} phases"
            )
        else:
            faults += self._own_faults(secure, terms)
        carriers = cohort.threshold(self.manifest.minimum_cohort) - secure.max_colluders
        if terms.carriers != carriers or carriers < 2:
            faults.append(
                f"skellam carriers: found {terms.carriers}, expected t - max_colluders ="
                f" {carriers}, at least 2"
            )
        if not faults:
            made = self._made(secure, terms)
            faults += [f"skellam {each}" for one in made if (each := one.beyond(terms.carriers))]
        return faults


@lru_cache(maxsize=1024)
def composed(done: tuple[Release, ...], delta: float, moved: int = 1) -> float:
    """ε of all releases, once for all runs of one schedule."""
    return epsilon_of_releases(done, delta, moved)
