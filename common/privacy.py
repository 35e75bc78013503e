"""Accounting: what a schedule of Poisson-subsampled Gaussian steps costs, and the noise that keeps it in budget.

Neighbouring data sets differ by adding or removing one unit. ε is the upper end of Opacus' PRV accountant
(Gopi et al. 2021), which tests hold against dp-accounting's PLD. Everything here is a function of public
numbers: it can be run, and checked, by anybody.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from fedlora.common.errors import BadInput
from fedlora.common.messages import RunManifest

EPSILON_ERROR = 0.01  # what the accountant adds for its own discretisation
CALIBRATION = 1e-3  # relative tolerance of a calibrated noise multiplier


@dataclass(frozen=True)
class Mechanism:
    """`steps` Poisson-subsampled Gaussian steps; the noise is relative to the L2 sensitivity."""

    sampling_rate: float
    noise_multiplier: float
    steps: int


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
    """Upper bound of ε at `delta` for all steps of `history` together; infinite where none is known."""
    steps = [(m.noise_multiplier, m.sampling_rate, m.steps) for m in history if m.steps and m.sampling_rate > 0]
    if not steps:
        return 0.0
    if any(noise <= 0 for noise, _, _ in steps):
        return math.inf
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = steps
    try:
        epsilon = float(accountant.get_epsilon(delta, eps_error=EPSILON_ERROR))
    except (ValueError, RuntimeError, MemoryError, OverflowError):
        return math.inf  # outside the accountant's range: never something smaller than the truth
    return epsilon if math.isfinite(epsilon) else math.inf


def history_of(manifest: RunManifest) -> list[Mechanism]:
    """Every step that a manifest's attempts can take."""
    return [Mechanism(p.sampling_rate, p.noise_multiplier, p.steps * p.attempts) for p in manifest.phases]


def stated_epsilon(manifest: RunManifest) -> float:
    """ε of a manifest's whole schedule."""
    return epsilon_of(history_of(manifest), manifest.delta)


def calibrate(
    fixed: Sequence[Mechanism],
    sampling_rate: float,
    steps: int,
    epsilon: float,
    delta: float,
    cache: Path | None = None,
) -> float:
    """The smallest noise multiplier, to 0.1 %, with which `fixed` and `steps` more steps cost at most ε.

    BadInput where `fixed` alone costs more. A cached value is believed only after one computation of its ε.
    """

    def cost(sigma: float) -> float:
        return epsilon_of([*fixed, Mechanism(sampling_rate, sigma, steps)], delta)

    key = _key(fixed, sampling_rate, steps, epsilon, delta)
    known = _cached(cache, key)
    if known is not None and cost(known) <= epsilon:
        return known
    sigma = _search(cost, epsilon)
    _remember(cache, key, sigma)
    return sigma


def group_scales(noise_multiplier: float, clips: Sequence[float]) -> list[float]:
    """Noise standard deviation of each clip group, equal shares: Σ (C_g / s_g)² = 1 / noise_multiplier²."""
    return [clip * noise_multiplier * math.sqrt(len(clips)) for clip in clips]


def accountant_name() -> str:
    return f"Opacus {version('opacus')} PRV"


def default_cache() -> Path:
    """Where calibrations are kept between runs."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "fedlora" / "calibration.json"


def _search(cost: object, epsilon: float) -> float:
    assert callable(cost)
    low, high = 0.0, 1.0
    while cost(high) > epsilon:
        low, high = high, 2 * high
        if high > 1e5:
            raise BadInput(f"[privacy] epsilon = {epsilon:g}: no noise keeps the schedule within it")
    while high - low > CALIBRATION * high:
        middle = (low + high) / 2
        low, high = (low, middle) if cost(middle) <= epsilon else (middle, high)
    return high


def _key(fixed: Sequence[Mechanism], *numbers: float) -> str:
    listing = [[asdict(each) for each in fixed], list(numbers), accountant_name()]
    return hashlib.sha256(json.dumps(listing, sort_keys=True).encode()).hexdigest()


def _cached(cache: Path | None, key: str) -> float | None:
    if cache is None:
        return None
    try:
        value = json.loads(cache.read_bytes()).get(key)
    except (OSError, ValueError, AttributeError):
        return None
    return value if isinstance(value, float) and math.isfinite(value) and value > 0 else None


def _remember(cache: Path | None, key: str, sigma: float) -> None:
    if cache is None:
        return
    try:
        table = json.loads(cache.read_bytes())
    except (OSError, ValueError):
        table = {}
    scratch = cache.with_suffix(f".{os.getpid()}")
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_text(json.dumps({**table, key: sigma}))
        scratch.replace(cache)
    except OSError:
        scratch.unlink(missing_ok=True)  # a cache that can't be written costs time, nothing else
