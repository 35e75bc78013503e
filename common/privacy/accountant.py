"""Accounting: what Poisson-subsampled Gaussian steps cost, and the noise that keeps a budget.

Neighbouring data sets differ by adding or removing one unit. ε is the upper end of Opacus' PRV
accountant (Gopi, Lee and Wutschitz 2021), which composes the pair "removed"; tests hold it against
dp-accounting's PLD, which composes both pairs and takes the worse. With `mode = "client"` a round
is one release with distributed Skellam noise instead (`common.privacy.skellam`). Outside the range
where its arithmetic is known to hold, ε is infinite: never something smaller than the truth.
Everything here is a function of public numbers, so that anybody can run it and check it.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version

from fedlora.common.errors import BadInput
from fedlora.common.manifest.manifest import RunManifest, SecureTerms, SkellamTerms
from fedlora.common.privacy.renyi import renyi_bound
from fedlora.common.privacy.skellam import Release, epsilon_of_releases
from fedlora.common.secagg.cohort import threshold

ACCURACY = 1.5e-3  # of a tail bound of ε: what the accountant may add for its discretisation
COARSEST = 0.5  # the domain that Opacus computes is known to be safe for errors below 1
MOST_POINTS = 1 << 22  # of the accountant's mesh: seconds, and some 100 MB
MOST_MECHANISMS = 16  # distinct ones; a manifest from outside must not keep a node busy for hours
LARGEST_EPSILON = 200.0  # exp(-ε) and exp(ε) stay far inside double precision
# below it rounding errors of the Fourier transform are no longer small against δ
SMALLEST_DELTA = 1e-10
SMALLEST_RATE = 1e-9  # below it exp(t) + q - 1 cancels; a larger rate only costs more
# far above the norm of all coordinates whose squares are 0 in float32: 1e-15 of 10⁸ of them
SMALLEST_CLIP = 1e-6
LARGEST_NOISE = 1e4  # above it the loss is narrower than the mesh; less noise only costs more


@dataclass(frozen=True)
class Mechanism:
    """`steps` Poisson-subsampled Gaussian steps; noise relative to L2 sensitivity, 0 is none."""

    sampling_rate: float
    noise_multiplier: float
    steps: int

    def __post_init__(self) -> None:
        # Each is a way to buy privacy for nothing: fewer than no steps would be taken off the
        # others' cost.
        faults = []
        if not 0 <= self.sampling_rate <= 1:
            faults.append(f"sampling_rate: found {self.sampling_rate}, expected 0 to 1")
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier >= 0):
            faults.append(
                f"noise_multiplier: found {self.noise_multiplier}, expected a finite number >= 0"
            )
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 0:
            faults.append(f"steps: found {self.steps}, expected a whole number >= 0")
        if faults:
            raise BadInput([f"mechanism {fault}" for fault in faults])


@dataclass(frozen=True)
class Spend:
    """(ε, δ); spends of different runs add up."""

    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        for name, value in (("epsilon", self.epsilon), ("delta", self.delta)):
            if not (math.isfinite(value) and value >= 0):
                raise BadInput(f"spend {name}: found {value}, expected a finite number >= 0")

    def __add__(self, other: Spend) -> Spend:
        return Spend(self.epsilon + other.epsilon, self.delta + other.delta)


def epsilon_of(history: Sequence[Mechanism], delta: float) -> float:
    """Upper bound of ε at `delta` for all of `history` together; infinite where none is known.

    The order of the history does not matter, and equal mechanisms count as one of more steps.
    """
    if not 0 < delta < 1:
        raise BadInput(f"delta: found {delta}, expected above 0 and below 1")
    merged = _merged(history)
    if not merged:
        return 0.0
    if (
        any(noise == 0 for noise, *_ in merged)
        or delta < SMALLEST_DELTA
        or len(merged) > MOST_MECHANISMS
    ):
        return math.inf
    return _composed(merged, delta)


def renyi_epsilon(history: Sequence[Mechanism], delta: float) -> float:
    """A looser upper bound of ε, by Opacus' Rényi accountant; infinite where none is known."""
    merged = _merged(history)
    if not merged:
        return 0.0
    if any(noise == 0 for noise, *_ in merged) or len(merged) > MOST_MECHANISMS:
        return math.inf
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that another order might do better
        try:
            epsilon = renyi_bound(merged, delta)
        except (ValueError, ArithmeticError):
            return math.inf
    return epsilon if math.isfinite(epsilon) else math.inf


def history_of(manifest: RunManifest) -> list[Mechanism]:
    """Every step that a manifest's attempts can take; BadInput where a phase is not a mechanism."""
    for phase in manifest.phases:
        for name, found in (("steps", phase.steps), ("attempts", phase.attempts)):
            if found < 0:
                raise BadInput(f"manifest phase {name}: found {found}, expected at least 0")
    return [
        Mechanism(p.sampling_rate, p.noise_multiplier, p.steps * p.attempts)
        for p in manifest.phases
    ]


def releases_of(manifest: RunManifest) -> list[Release]:
    """A "client" manifest's releases, one kind a phase; BadInput where its terms are not whole."""
    faults = _skellam_faults(manifest)
    if faults or manifest.secure is None or manifest.skellam is None:
        raise BadInput([f"manifest {fault}" for fault in faults])
    return _releases(manifest, manifest.secure, manifest.skellam)


def epsilon_of_attempts(manifest: RunManifest, attempts: Sequence[int]) -> float:
    """ε of so many attempts of each phase; infinite where any of their steps has no noise."""
    if manifest.mode == "client":
        pairs = zip(releases_of(manifest), attempts, strict=True)
        return epsilon_of_releases(
            [replace(each, times=count) for each, count in pairs], manifest.delta
        )
    # whatever such a run does to its updates, it is not what is composed here
    if manifest.mode != "record":
        raise BadInput(
            f"manifest mode: found {manifest.mode!r}, expected record or client: there ε is defined"
        )
    phases = [
        replace(phase, attempts=count)
        for phase, count in zip(manifest.phases, attempts, strict=True)
    ]
    return epsilon_of(history_of(replace(manifest, phases=tuple(phases))), manifest.delta)


def stated_epsilon(manifest: RunManifest) -> float:
    """ε of a manifest's whole schedule, for the unit that its mode protects."""
    return epsilon_of_attempts(manifest, [phase.attempts for phase in manifest.phases])


def charged_epsilon(manifest: RunManifest) -> float:
    """What the schedule costs a budget of records: never less than `stated_epsilon`.

    In mode "client" ε is stated for an update that is there or zero. One record more or less makes
    it any other update, which is twice as far: a budget that also pays for records would be charged
    too little by the former.
    """
    if manifest.mode == "client":
        return epsilon_of_releases(releases_of(manifest), manifest.delta, moved=2)
    return stated_epsilon(manifest)


def member_noise(manifest: RunManifest, phase: int) -> float:
    """The standard deviation of what a member adds to its encoded update, in levels; at most."""
    if manifest.mode != "client" or manifest.skellam is None:
        return 0.0
    return math.sqrt(releases_of(manifest)[phase].share(manifest.skellam.carriers))


def group_scales(noise_multiplier: float, clips: Sequence[float]) -> list[float]:
    """Noise deviation of each clip group, equal shares: Σ (C_g / s_g)² = 1 / noise_multiplier².

    One unit moves group g by at most C_g, so the mean of the scaled sum moves by at most 1 /
    noise_multiplier: the groups together are one Gaussian mechanism of that noise multiplier.
    """
    for name, values in (("noise_multiplier", [noise_multiplier]), ("clip", clips)):
        if not values or not all(math.isfinite(value) and value > 0 for value in values):
            raise BadInput(f"{name}: found {list(values)}, expected finite numbers > 0")
    return [clip * noise_multiplier * math.sqrt(len(clips)) for clip in clips]


def accountant_name() -> str:
    return f"Opacus {version('opacus')} PRV"


def _merged(history: Sequence[Mechanism]) -> list[tuple[float, float, int]]:
    """(noise multiplier, rate, steps) of what costs anything, within where arithmetic holds."""
    steps: Counter[tuple[float, float]] = Counter()
    for each in history:
        if each.steps > 0 and each.sampling_rate > 0:
            noise, rate = (
                min(each.noise_multiplier, LARGEST_NOISE),
                max(each.sampling_rate, SMALLEST_RATE),
            )
            steps[noise, rate] += each.steps
    return [(*mechanism, count) for mechanism, count in sorted(steps.items())]


def _composed(history: list[tuple[float, float, int]], delta: float) -> float:
    """Opacus' PRV upper bound for (noise multiplier, rate, steps); infinite if not trustworthy."""
    import numpy as np

    with warnings.catch_warnings(), np.errstate(all="ignore"):
        # it divides by zero at rate 1 and overflows far outside the mass: both right
        warnings.simplefilter("ignore")
        try:
            steps = sum(count for *_, count in history)
            epsilon = prv_epsilon(
                history, delta, _discretisation(renyi_bound(history, delta / 4000), steps, delta)
            )
        except (ValueError, RuntimeError, ArithmeticError, MemoryError):
            return math.inf
    return max(epsilon, 0.0) if math.isfinite(epsilon) else math.inf


def prv_epsilon(history: list[tuple[float, float, int]], delta: float, error: float) -> float:
    """Opacus' `PRVAccountant.get_epsilon`, but that its tail bounds don't take minutes."""
    from opacus.accountants.analysis import prv

    counts, lost = [count for *_, count in history], delta / 1000
    steps = sum(counts)
    single = max(renyi_bound([(*each[:2], 1)], lost / (8 * steps)) for each in history)
    half = max(renyi_bound(history, lost / 4), single, error) + 3  # Gopi et al., remark 5.6
    mesh = error / math.sqrt(steps * math.log(12 / lost) / 2)
    domain = prv.Domain.create_aligned(-half, half, mesh)
    losses = [prv.PoissonSubsampledGaussianPRV(rate, noise) for noise, rate, _ in history]
    cut = [prv.TruncatedPrivacyRandomVariable(loss, domain.t_min, domain.t_max) for loss in losses]
    composed = prv.compose_heterogeneous([prv.discretize(each, domain) for each in cut], counts)
    return float(composed.compute_epsilon(delta, lost, error)[2])


def _discretisation(tail: float, steps: int, delta: float) -> float:
    """The accountant's error of ε for a loss within ±`tail`: a small share, or the mesh's."""
    if not tail <= LARGEST_EPSILON:
        raise ValueError("beyond the accountant's range")
    # the mesh of Gopi et al.: error / √(steps · ln(12 / (δ / 1000)) / 2), over twice the tail and a
    # margin
    points_by_error = 2 * (tail + 4) * math.sqrt(steps * math.log(12_000 / delta) / 2)
    error = max(ACCURACY * tail, points_by_error / MOST_POINTS)
    if error > COARSEST:
        raise ValueError("beyond the accountant's range")
    return error


def _skellam_faults(manifest: RunManifest) -> list[str]:
    """What is missing or unfit between distributed noise's terms and the rest of a manifest."""
    secure, terms, phases = manifest.secure, manifest.skellam, manifest.phases
    if manifest.mode != "client" or secure is None or terms is None:
        return [f"mode: found {manifest.mode!r}, expected client with secure and skellam terms"]
    faults = []
    if not len(secure.update_bounds) == len(terms.coordinates) == len(phases):
        faults.append(
            f"skellam: expected a bound and a number of coordinates for each of {len(phases)}"
            " phases"
        )
    elif any(
        phase.clip != bound or phase.head_clip
        for phase, bound in zip(phases, secure.update_bounds, strict=True)
    ):
        faults.append(
            "secure update_bounds: found others than the clips, which they are in mode client"
        )
    carriers = threshold(manifest.minimum_cohort) - secure.max_colluders
    if terms.carriers != carriers or carriers < 2:
        faults.append(
            f"skellam carriers: found {terms.carriers}, expected t - max_colluders = {carriers}, at"
            " least 2"
        )
    if not faults:
        releases = _releases(manifest, secure, terms)
        faults += [f"skellam {each}" for one in releases if (each := one.beyond(terms.carriers))]
    return faults


def _releases(manifest: RunManifest, secure: SecureTerms, terms: SkellamTerms) -> list[Release]:
    return [
        Release(phase.noise_multiplier, secure.levels, coordinates, phase.attempts)
        for phase, coordinates in zip(manifest.phases, terms.coordinates, strict=True)
    ]


def check_request(sampling_rate: float, steps: int, epsilon: float) -> None:
    faults = []
    if not 0 < sampling_rate <= 1:
        faults.append(f"sampling_rate: found {sampling_rate}, expected above 0 and at most 1")
    if steps < 1:
        faults.append(f"steps: found {steps}, expected at least 1")
    if not (math.isfinite(epsilon) and epsilon > 0):
        faults.append(f"epsilon: found {epsilon}, expected a finite number > 0")
    if faults:
        raise BadInput([f"calibration {fault}" for fault in faults])
