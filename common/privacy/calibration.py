"""The smallest noise with which a schedule costs at most the ε asked for; found once, kept.

A head phase may use `head_epsilon_share` of ε by itself; the last phase takes what the composition
leaves.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from fedlora.common.config.schema import AggregationConfig, PrivacyConfig
from fedlora.common.disk.files import write_atomically
from fedlora.common.errors import BadInput
from fedlora.common.manifest.manifest import Phase, SkellamTerms
from fedlora.common.privacy.accountant import ACCOUNTANT, Mechanism, epsilon_of
from fedlora.common.privacy.skellam import Release, epsilon_of_releases, releases
from fedlora.common.secagg.cohort import threshold

CALIBRATION = 1e-3  # relative tolerance of a calibrated noise multiplier
# of a coordinate: as fine as float32 for a value at the bound; 511 institutions in 32 bits
LEVELS = 1 << 22
# of the clip: what rounding may add to the sensitivity where large noise leaves fewer levels
ROUNDING = 0.1


@dataclass(frozen=True)
class Asked:
    """What a schedule's noise is calibrated for, and where noise that was found is kept."""

    privacy: PrivacyConfig
    aggregation: AggregationConfig
    moved: Mapping[str, int]  # by a phase's name, how many coordinates it moves
    cache: Path | None = None


@dataclass(frozen=True)
class Schedule:
    """Phases with their noise, and how it is shared where institutions share it."""

    phases: tuple[Phase, ...]
    levels: int = LEVELS  # of an update bound, under masks
    skellam: SkellamTerms | None = None

    def member_noise(self) -> float:
        """The largest standard deviation that a member adds to an encoded update, in levels."""
        if self.skellam is None:
            return 0.0
        made = releases(self.phases, self.skellam.coordinates, self.levels)
        return max(math.sqrt(each.share(self.skellam.carriers)) for each in made)


def without_noise(phases: tuple[Phase, ...], asked: Asked) -> Schedule:
    """The phases as they are."""
    return Schedule(phases)


def with_gaussian_noise(phases: tuple[Phase, ...], asked: Asked) -> Schedule:
    """Noise of every step of each phase; BadInput where no noise keeps them within ε."""
    done, spent = list[Phase](), list[Mechanism]()
    for phase in phases:
        rate, steps = phase.sampling_rate, phase.steps * phase.attempts
        epsilon = _budget(phase, phases, asked)
        sigma = calibrate(spent, rate, steps, epsilon, asked.privacy.delta, asked.cache)
        spent.append(Mechanism(rate, sigma, steps))
        done.append(replace(phase, noise_multiplier=sigma))
    return Schedule(tuple(done))


def with_skellam_noise(phases: tuple[Phase, ...], asked: Asked) -> Schedule:
    """Noise of a sum in each phase, how it is shared, and the levels. One release an attempt, no
    amplification.

    The more noise, the fewer levels of a clip are needed, and the fewer are possible: a share is
    drawn exactly up to a bound. So they are the largest power of two with which every phase's share
    can be drawn; BadInput where there is none.
    """
    moved, aggregation = asked.moved, asked.aggregation
    if not moved or not aggregation.secure:
        raise BadInput(
            '[privacy] mode = "client": expected [aggregation] secure = true, and what each phase'
            " moves"
        )
    coordinates, levels = tuple(moved[phase.name] for phase in phases), LEVELS
    carriers = threshold(aggregation.minimum_cohort) - aggregation.max_colluders
    while math.sqrt(max(coordinates)) / 2 <= ROUNDING * levels:
        done = _noised(phases, asked, coordinates, levels)
        if not any(each.beyond(carriers) for each in releases(done, coordinates, levels)):
            return Schedule(done, levels, SkellamTerms(coordinates, carriers))
        levels //= 2
    raise BadInput(
        f"[privacy] epsilon = {asked.privacy.epsilon:g}: needs noise that with {max(coordinates)}"
        " coordinates can't be drawn as whole numbers; expected a larger epsilon, or fewer rounds"
    )


def _noised(
    phases: tuple[Phase, ...], asked: Asked, coordinates: tuple[int, ...], levels: int
) -> tuple[Phase, ...]:
    done = list[Phase]()
    for phase, count in zip(phases, coordinates, strict=True):
        spent = releases(done, coordinates[: len(done)], levels)
        one = Release(1.0, levels, count, phase.attempts)
        sigma = smallest_noise(
            lambda noise, spent=spent, one=one: epsilon_of_releases(  # type: ignore[misc]
                [*spent, replace(one, noise_multiplier=noise)], asked.privacy.delta
            ),
            _budget(phase, phases, asked),
        )
        done.append(replace(phase, noise_multiplier=sigma))
    return tuple(done)


def _budget(phase: Phase, phases: tuple[Phase, ...], asked: Asked) -> float:
    """ε that the phases up to this one may use together."""
    share = 1.0 if phase is phases[-1] else asked.privacy.head_epsilon_share
    return share * asked.privacy.epsilon


def calibrate(
    fixed: Sequence[Mechanism],
    sampling_rate: float,
    steps: int,
    epsilon: float,
    delta: float,
    cache: Path | None = None,
) -> float:
    """The smallest noise multiplier (0.1 %) with which `fixed` and `steps` more steps cost <= ε.

    BadInput where no noise does. A cached value is believed only after one computation of its ε.
    """
    _check_request(sampling_rate, steps, epsilon)

    @lru_cache
    def cost(sigma: float) -> float:
        return epsilon_of([*fixed, Mechanism(sampling_rate, sigma, steps)], delta)

    key = _key(fixed, sampling_rate, steps, epsilon, delta)
    known = _cached(cache, key)
    if known is not None and 0.9 * epsilon <= cost(known) <= epsilon:
        return known
    sigma = smallest_noise(cost, epsilon)
    _remember(cache, key, sigma)
    return sigma


def default_cache() -> Path:
    """Where calibrations are kept between runs."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "fedlora" / "calibration.json"


def smallest_noise(cost: Callable[[float], float], epsilon: float) -> float:
    """The smallest noise multiplier, to 0.1 %, whose `cost` is at most ε; BadInput if none."""
    from scipy.optimize import brentq

    def excess(log_sigma: float) -> float:  # close to a straight line; bounded, where ε is infinite
        return math.log(min(cost(math.exp(log_sigma)), 1e6)) - math.log(epsilon)

    high = 0.0
    while excess(high) > 0:
        high += math.log(2)
        if high > math.log(1e5):
            raise BadInput(
                f"[privacy] epsilon = {epsilon:g}: no noise keeps the schedule within it"
            )
    low = high - math.log(2)
    while excess(low) <= 0:
        high, low = low, low - math.log(2)
    sigma = math.exp(float(brentq(excess, low, high, xtol=CALIBRATION / 4, rtol=1e-12)))
    while cost(sigma) > epsilon:  # a root is found from either side; only one is within the budget
        sigma *= 1 + CALIBRATION / 4
    return sigma


def _check_request(sampling_rate: float, steps: int, epsilon: float) -> None:
    faults = []
    if not 0 < sampling_rate <= 1:
        faults.append(f"sampling_rate: found {sampling_rate}, expected above 0 and at most 1")
    if steps < 1:
        faults.append(f"steps: found {steps}, expected at least 1")
    if not (math.isfinite(epsilon) and epsilon > 0):
        faults.append(f"epsilon: found {epsilon}, expected a finite number > 0")
    if faults:
        raise BadInput([f"calibration {fault}" for fault in faults])


def _key(fixed: Sequence[Mechanism], *numbers: float) -> str:
    listing = [[asdict(each) for each in fixed], list(numbers), ACCOUNTANT]
    return hashlib.sha256(json.dumps(listing, sort_keys=True).encode()).hexdigest()


def _cached(cache: Path | None, key: str) -> float | None:
    value = _table(cache).get(key) if cache is not None else None
    return value if isinstance(value, float) and math.isfinite(value) and value > 0 else None


def _remember(cache: Path | None, key: str, sigma: float) -> None:
    if cache is None:
        return
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(cache, json.dumps({**_table(cache), key: sigma}).encode())
    except OSError:
        pass  # a cache that can't be written costs time, nothing else


def _table(cache: Path) -> dict[str, Any]:
    try:
        table = json.loads(cache.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return table if isinstance(table, dict) else {}
