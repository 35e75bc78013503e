"""What a run promises, and everything that follows from it: one class for each way to promise.

A guarantee says what is clipped and where noise is added, what a budget is charged, what is stated
and for whom, what a policy must permit, what an un-noised update's digest may reveal, and how far
an honest update goes. `common.privacy.modes` finds it by the name that a manifest or a
configuration has; nothing else asks for that name. What is a class's own is known before there is a
manifest.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from fedlora.common.config.schema import AggregationConfig
from fedlora.common.errors import BadInput
from fedlora.common.manifest.manifest import Phase, RunManifest
from fedlora.common.manifest.plan import RoundPlan, Update
from fedlora.common.manifest.turns import BY_TURNS
from fedlora.common.model.state import AdapterSpec, Vector
from fedlora.common.privacy.accountant import Spend
from fedlora.common.privacy.calibration import Asked, Schedule
from fedlora.common.privacy.skellam import Ints

# of an ε that another machine computed: it differs where δ is so small that a transform's last bits
# count. Far less than the discretisation adds to either.
SLACK = 1 + 1e-4
NOT_COVERED = (
    "Not covered: who took part and when, how long training took, and how the hyperparameters were"
    " found."
)


class Permits(Protocol):
    """What an institution's policy says about guarantees that are not its own noise alone."""

    @property
    def allow_unnoised(self) -> bool:
        """Whether runs without any privacy may have data."""

    @property
    def client_level(self) -> bool:
        """Whether updates of whole institutions may leave under a share of the noise alone."""

    @property
    def shared_noise(self) -> bool:
        """Whether sums of records may leave under a share of the noise alone."""


@dataclass(frozen=True)
class Guarantee(ABC):
    """What the run of one manifest promises."""

    manifest: RunManifest

    name: ClassVar[str]  # of the mode, in a manifest and in a configuration
    # whether anything is promised: then there is an ε, a ledger that pays it before data are
    # touched, and no randomness that anybody can repeat
    private: ClassVar[bool]
    # whether every local step clips each unit's gradient
    clip_in_step: ClassVar[bool]
    # whether it also adds the whole noise, so that more steps may follow
    noise_in_step: ClassVar[bool]
    # whether updates may leave under masks only
    needs_masks: ClassVar[bool]
    whom: ClassVar[str]  # is protected, for somebody who reads a node's report
    mechanism: ClassVar[str]
    neighbours: ClassVar[str]
    noise: ClassVar[str]
    second_accountant: ClassVar[str]
    # of one institution, for which what is promised is known to hold
    most_units: ClassVar[float] = math.inf
    cost_name: ClassVar[str] = "ε"  # of what a consent states and a budget is charged

    # --- before there is a manifest

    @staticmethod
    @abstractmethod
    def refusal(permits: Permits) -> str:
        """Why a policy does not let such a run in, or ""."""

    @staticmethod
    @abstractmethod
    def check_delta(delta: float, units: int, where: str, institutions: int) -> None:
        """BadInput unless δ is below one over the number of those who are protected: of `units` in
        the data that `where` names, or of institutions.
        """

    @staticmethod
    @abstractmethod
    def coordinate_bound(phase: Phase) -> float:
        """Where a coordinate of an update saturates under secure aggregation. Public."""

    @staticmethod
    def noise_part(members: float, aggregation: AggregationConfig) -> float:
        """What each of about so many adds, as a part of the variance of the whole noise."""
        return 1.0

    @staticmethod
    @abstractmethod
    def calibrated(phases: tuple[Phase, ...], asked: Asked) -> Schedule:
        """`phases` with the least noise that keeps all attempts within ε; BadInput if none does."""

    # --- what it costs

    def evaluation_epsilon(self) -> float | None:
        """What the evaluation would cost by itself, all its attempts; None where there is none."""
        terms = self.manifest.evaluation
        if terms is None or not self.private:
            return None
        return self.epsilon_of([*(0 for _ in self.manifest.phases), terms.attempts])

    @abstractmethod
    def epsilon_of(self, attempts: Sequence[int]) -> float:
        """ε of so many attempts of each of the manifest's `accounted`, for the unit that is
        protected; infinite where any of their steps has no noise. BadInput where there is none, or
        a phase is no mechanism.
        """

    def stated_epsilon(self) -> float:
        """ε of the whole schedule, for the unit that is protected."""
        return self.epsilon_of([phase.attempts for phase in self.manifest.accounted])

    def charged_epsilon(self) -> float:
        """What the whole schedule costs a budget of records: never less than what is stated."""
        return self.stated_epsilon()

    def charge(self) -> Spend:
        """What a ledger reserves for the run; BadInput where nothing bounds it."""
        return Spend(self.charged_epsilon(), self.manifest.delta)

    def stated(self, reserved: float) -> float:
        """ε for the unit that is protected, where a ledger proves that `reserved` was charged."""
        return reserved

    def cap(self, epsilon: float) -> float:
        """Of a budget that one run fits into which states at most `epsilon`."""
        return epsilon

    def attempts_within(
        self, phase: Phase, noise_multiplier: float, epsilon: float, most: int
    ) -> int | None:
        """The most attempts of a phase that cost at most ε with this noise, up to `most`. None
        where a phase alone has no price.
        """
        return None

    @property
    @abstractmethod
    def accountant(self) -> str:
        """What ε was computed by."""

    def second_epsilon(self) -> float | None:
        """ε of the whole schedule by other arithmetic; None where there is no finite one."""
        return None

    # --- what is said

    @property
    def unit(self) -> str:
        """Whom ε is stated for."""
        return self.manifest.unit or "record"

    def statement(self, epsilon: float | None) -> list[str]:
        """What is guaranteed where a ledger reserved `epsilon`, and what it rests on, in sentences
        that a data protection officer can read. ValueError where there is no such statement.
        """
        parts = (
            self._promise(epsilon),
            self._turns(),
            self._counts(),
            self._masks(),
            self._rounding(),
        )
        return [sentence for part in parts for sentence in part]

    @abstractmethod
    def _promise(self, epsilon: float | None) -> list[str]:
        """The statement but for what masks and rounding add."""

    def _counts(self) -> list[str]:
        """What an evaluation at the institutions releases; nothing without one."""
        terms = self.manifest.evaluation
        if terms is None:
            return []
        noise = (
            f"Gaussian noise with noise multiplier {terms.noise_multiplier:.4g}, which ε covers"
            f" {'once' if terms.attempts == 1 else f'{terms.attempts} times'} and without a draw"
            if self.private
            else "no noise"
        )
        return [
            f"After the last round each institution counts how the released adapter does"
            f" ({', '.join(terms.counts)}) on about {terms.hold_out:.0%} of its units, which this"
            " run did not train on and which a keyed hash of each by itself chose. A unit moves"
            f" the counts by an L2 norm of at most 1, whatever its records are; they have {noise}."
        ]

    def _masks(self) -> list[str]:
        """What secure aggregation adds, and under which conditions; nothing without it."""
        terms = self.manifest.secure
        if terms is None:
            return []
        return [
            "Updates were aggregated securely: the coordinator learnt sums of at least"
            f" {self.manifest.minimum_cohort} institutions' updates and, as long as at most"
            f" {terms.max_colluders} of them sided with it, no single one. With n institutions"
            " in a round, t = ⌊2n/3⌋ + 1 of them had to stay to the end.",
            "Secure aggregation is no differential privacy: a sum can say much about its parts."
            " ε is what bounds that.",
        ]

    def _turns(self) -> list[str]:
        """What by turns means for an update; nothing where all of LoRA moves in each round."""
        if self.manifest.network.variant != BY_TURNS:
            return []
        what = "clipped, noised and sent" if self.private else "sent"
        cost = ", and a round costs what it would with both" if self.private else ""
        return [
            "The halves of LoRA move by turns, B in the first round of a phase that moves LoRA: in"
            f" each round only the half that moves is {what}{cost}."
        ]

    def _rounding(self) -> list[str]:
        """How updates are rounded as they leave; nothing where they are not."""
        if self.manifest.wire == "float32":
            return []
        after = ", after its noise was added: that costs no privacy" if self.private else ""
        return [f"An update leaves its institution rounded to {self.manifest.wire}{after}."]

    def schedule(self) -> list[dict[str, Any]]:
        """What was composed of each phase, as a run's summary shows it."""
        return [
            {
                "phase": phase.name,
                "steps": phase.steps * phase.attempts,
                "sampling_rate": phase.sampling_rate,
                "noise_multiplier": phase.noise_multiplier,
            }
            for phase in self.manifest.accounted
        ]

    # --- what leaves

    def clipped(self, delta: Vector, phase: Phase) -> Vector:
        """A trained update as it may be masked or sent: clipped, where it is clipped as a whole."""
        return delta

    def committed(self, plan: RoundPlan, update: Update) -> bytes:
        """What a ledger keeps the digest of: the chain of digests may leave the node."""
        return update.delta.astype("<f4", copy=False).tobytes()

    @abstractmethod
    def update_bound(self, phase: int, size: int) -> float:
        """The largest L2 norm that an update of (size,) coordinates may have in a phase. Public."""

    # --- noise that institutions share under masks

    def shared_noise(self) -> str:
        """How noise is shared, for who judges the manifest; BadInput where its terms are not whole
        or have no place in it.
        """
        if self.manifest.skellam is not None or self.manifest.largest_cohort:
            raise BadInput("expected none where each institution's noise is its own")
        return "no shared noise"

    @property
    def honest_peers(self) -> int | None:
        """How many others an institution's promise relies on in a sum, at least; None: on none."""
        return None

    def epsilon_alone(self) -> float | None:
        """ε for a unit whose institution alone is honest, where that is another figure; None where
        it is the stated one, or there is no finite one.
        """
        return None

    def check_node(self, colluders: int) -> None:  # noqa: B027  (most need nothing of a node)
        """Refused where a node that expects so many colluders can't take part under masks."""

    def check_network(self, spec: AdapterSpec) -> None:  # noqa: B027
        """BadInput where the promise is of another network; before anything is charged."""

    def check_cohort(self, phase: int, spec: AdapterSpec, members: int) -> None:  # noqa: B027
        """Refused, or BadInput, where a cohort of so many can't keep the promise of a phase."""

    def noised(self, levels: Ints, plan: RoundPlan, spec: AdapterSpec, members: int) -> Ints:
        """An encoded update with what a member of a cohort adds to it before its mask."""
        return levels

    def member_noise(self, phase: int) -> float:
        """Standard deviation of what a member adds to an encoded update, in levels, at most."""
        return 0.0
