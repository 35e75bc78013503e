"""Accounting: what Poisson-subsampled Gaussian steps cost, and the noise that keeps a budget.

Neighbouring data sets differ by adding or removing one unit. ε is the upper end of Opacus' PRV
accountant (Gopi, Lee and Wutschitz 2021), which composes the pair "removed"; tests hold it against
dp-accounting's PLD, which composes both pairs and takes the worse. Outside the range where its
arithmetic is known to hold, ε is infinite: never something smaller than the truth. Everything here
is a function of public numbers, so that anybody can run it and check it. Which steps a run takes,
its guarantee says; sums with shared noise are composed by `common.privacy.skellam`.

How wide the accountant must look, a Rényi bound says: divergences (Mironov, Talwar and Zhang
2019) and conversion to ε are Opacus'. At rates near 1/2 the series of a fractional order is long:
there the orders below 3 are bounded by a chord between whole ones. An upper bound of a divergence
makes an upper bound of ε.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from typing import Any

from fedlora.common.errors import BadInput

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

# of Rényi divergences: Opacus' own
ORDERS = (*(1 + tenth / 10 for tenth in range(1, 100)), *range(12, 64))
QUICK_ORDERS = tuple(order for order in ORDERS if order > 3 or float(order).is_integer())


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
    """As a privacy statement names it, with the version that computes."""
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


def renyi_bound(history: Sequence[tuple[float, float, int]], delta: float) -> float:
    """Upper bound of ε at `delta` for (noise > 0, rate, steps); what Opacus raises, it raises."""
    from opacus.accountants.analysis import rdp

    total = sum(_step_curve(noise, rate) * count for noise, rate, count in history)
    return float(rdp.get_privacy_spent(orders=ORDERS, rdp=total, delta=delta)[0])


@lru_cache(maxsize=1024)
def _step_curve(noise: float, rate: float) -> Any:
    """Rényi divergence of a step at each of `ORDERS`; an upper bound where the series is long."""
    from opacus.accountants.analysis import rdp

    def curve(orders: Sequence[float]) -> Any:
        return rdp.compute_rdp(q=rate, noise_multiplier=noise, steps=1, orders=orders)

    made = _filled(curve(QUICK_ORDERS)) if _series_is_long(noise, rate) else curve(ORDERS)
    made.flags.writeable = False  # it is shared
    return made


def _series_is_long(noise: float, rate: float) -> bool:
    """Whether orders below 3 have series of 10⁴ to 10⁶ terms, as they have at rates near 1/2.

    Terms fall by |log(1 / rate - 1)| each, down to e⁻³⁰, as far as the noise reaches, and by a
    power from there on.
    """
    return noise >= 5 and abs(rate - 0.5) < max(0.75 / noise, 0.01)


def _filled(quick: Any) -> Any:
    """A curve over `ORDERS` from `QUICK_ORDERS`: (order - 1) · divergence is convex, 0 at 1."""
    import numpy as np

    known = dict(zip(QUICK_ORDERS, quick, strict=True))
    two, three = known[2], 2 * known[3]

    def chord(order: float) -> float:
        return float(
            known[2] if order < 2 else ((3 - order) * two + (order - 2) * three) / (order - 1)
        )

    return np.array([known[order] if order in known else chord(order) for order in ORDERS])
