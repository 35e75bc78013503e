"""The smallest noise with which a schedule costs at most the ε asked for; found once, kept.

A head phase may use `head_epsilon_share` of ε by itself, an evaluation `epsilon_share`; the last
phase takes what the composition leaves.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from fedlora.common.config.schema import AggregationConfig, EvaluationConfig, PrivacyConfig
from fedlora.common.disk.files import write_atomically
from fedlora.common.errors import BadInput
from fedlora.common.manifest.manifest import Phase, SkellamTerms
from fedlora.common.privacy.accountant import ACCOUNTANT, Mechanism, epsilon_of
from fedlora.common.privacy.skellam import Release, epsilon_of_releases, releases
from fedlora.common.privacy.unit_release import CAPACITY, unit_releases
from fedlora.common.secagg.cohort import threshold
from fedlora.common.secagg.ring import MOST_LEVELS, Encoding

CALIBRATION = 1e-3  # relative tolerance of a calibrated noise multiplier
# of a coordinate: as fine as float32 for a value at the bound; 511 institutions in 32 bits
LEVELS = 1 << 22
# of the clip: what rounding may add to the sensitivity where large noise leaves fewer levels
ROUNDING = 0.1
R = TypeVar("R", bound=Release)


@dataclass(frozen=True)
class Asked:
    """What a schedule's noise is calibrated for, and where noise that was found is kept."""

    privacy: PrivacyConfig
    aggregation: AggregationConfig
    moved: Mapping[str, int]  # by a phase's name, how many coordinates it moves
    cache: Path | None = None
    institutions: int = 1  # of a round, at most
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def coordinates(self, phases: Sequence[Phase]) -> tuple[int, ...]:
        """What each phase moves; BadInput where that is not known, or sums are not masked."""
        if not self.moved or not self.aggregation.secure:
            raise BadInput(
                f'[privacy] mode = "{self.privacy.mode}": expected [aggregation] secure = true, and'
                " what each phase moves, where noise is shared"
            )
        return tuple(self.moved[phase.name] for phase in phases)

    @property
    def carriers(self) -> int:
        """Honest institutions in any sum, at least."""
        asked = self.aggregation
        return threshold(asked.minimum_cohort) - asked.max_colluders


@dataclass(frozen=True)
class Schedule:
    """Phases with their noise, and how it is shared where institutions share it."""

    phases: tuple[Phase, ...]
    levels: int = LEVELS  # of an update bound, under masks
    skellam: SkellamTerms | None = None
    # the largest standard deviation that a member adds to an encoded update, in levels
    member_noise: float = 0.0
    largest_cohort: int = 0  # where a part of the noise follows from it
    evaluation_noise: float = 0.0


def without_noise(phases: tuple[Phase, ...], asked: Asked) -> Schedule:
    """The phases as they are."""
    return Schedule(phases)


def with_gaussian_noise(phases: tuple[Phase, ...], asked: Asked) -> Schedule:
    """Noise of every step of each phase, and of the counts of an evaluation; BadInput where no
    noise keeps them within ε.
    """
    done, spent, counted = list[Phase](), list[Mechanism](), _counted(asked)
    for phase in phases:
        rate, steps = phase.sampling_rate, phase.steps * phase.attempts
        epsilon = _budget(phase, phases, asked)
        fixed = [*spent, *counted] if phase is phases[-1] else spent
        sigma = calibrate(fixed, rate, steps, epsilon, asked.privacy.delta, asked.cache)
        spent.append(Mechanism(rate, sigma, steps))
        done.append(replace(phase, noise_multiplier=sigma))
    return Schedule(tuple(done), evaluation_noise=sum(each.noise_multiplier for each in counted))


def _counted(asked: Asked) -> list[Mechanism]:
    """The releases of an evaluation, with the least noise that keeps its own share of ε."""
    terms, privacy = asked.evaluation, asked.privacy
    if not terms.hold_out:
        return []
    epsilon = terms.epsilon_share * privacy.epsilon
    sigma = calibrate([], 1.0, terms.attempts, epsilon, privacy.delta, asked.cache)
    return [Mechanism(1.0, sigma, terms.attempts)]


def with_skellam_noise(phases: tuple[Phase, ...], asked: Asked) -> Schedule:
    """Noise of a sum in each phase, how it is shared, and the levels. One release an attempt, no
    amplification.

    The more noise, the fewer levels of a clip are needed, and the fewer are possible: a share is
    drawn exactly up to a bound. So they are the largest power of two with which every phase's share
    can be drawn; BadInput where there is none.
    """
    coordinates, levels = asked.coordinates(phases), LEVELS
    while math.sqrt(max(coordinates)) / 2 <= ROUNDING * levels:
        done, made = _noised(phases, asked, releases(phases, coordinates, levels))
        if not any(each.beyond(asked.carriers) for each in made):
            skellam = SkellamTerms(coordinates, asked.carriers)
            return Schedule(done, levels, skellam, _largest_share(made, asked))
        levels //= 2
    raise _never_drawn(asked, coordinates)


def with_shared_unit_noise(phases: tuple[Phase, ...], asked: Asked) -> Schedule:
    """Noise of a sum of drawn units in each phase, how it is shared, and the levels.

    The finest grid whose sums of all institutions, noise included, fit words of 32 bits; where
    that is too coarse for a phase, of 64. BadInput where no grid is fine enough whose noise can be
    drawn.
    """
    coordinates = asked.coordinates(phases)
    for bits, levels in _grids(phases, asked.institutions):
        plain = unit_releases(phases, coordinates, levels)
        if any(each.coarse for each in plain):
            continue
        done, made = _noised(phases, asked, plain)
        noise = _largest_share(made, asked)
        fits = Encoding(1, bits, 1.0, levels, noise).fits(asked.institutions)
        if fits and not any(each.beyond(asked.carriers) for each in made):
            skellam = SkellamTerms(coordinates, asked.carriers)
            return Schedule(done, levels, skellam, noise, asked.institutions)
    raise _never_drawn(asked, coordinates)


def _grids(phases: Sequence[Phase], institutions: int) -> Iterator[tuple[int, int]]:
    """Bits of a word and levels of a sum, best first: as fine as fits 32, then 64 and coarser."""
    narrow = 31 - math.ceil(math.log2(institutions + 1))
    clips = CAPACITY * max(phase.expected_units for phase in phases)  # to where a sum saturates
    wide = math.floor(math.log2(min(MOST_LEVELS, max(1.0, LEVELS * clips))))
    for bits, finest in ((32, narrow), (64, wide)):
        yield from ((bits, 1 << power) for power in range(finest, 0, -1))


def _noised(
    phases: tuple[Phase, ...], asked: Asked, plain: Sequence[R]
) -> tuple[tuple[Phase, ...], list[R]]:
    """The phases, and their releases, with the least noise of each; `plain` is without."""
    done, made = list[Phase](), list[R]()
    for phase, one in zip(phases, plain, strict=True):
        sigma = smallest_noise(
            lambda noise, one=one: epsilon_of_releases(  # type: ignore[misc]
                [*made, replace(one, noise_multiplier=noise)], asked.privacy.delta
            ),
            _budget(phase, phases, asked),
        )
        made.append(replace(one, noise_multiplier=sigma))
        done.append(replace(phase, noise_multiplier=sigma))
    return tuple(done), made


def _largest_share(made: Sequence[Release], asked: Asked) -> float:
    return max(math.sqrt(each.share(asked.carriers)) for each in made)


def _never_drawn(asked: Asked, coordinates: Sequence[int]) -> BadInput:
    return BadInput(
        f"[privacy] epsilon = {asked.privacy.epsilon:g}: needs noise that with {max(coordinates)}"
        " coordinates can't be drawn as whole numbers; expected a larger epsilon, or fewer rounds"
    )


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
                f"[privacy] epsilon = {epsilon:g}: no noise keeps the schedule within it at this δ"
                " (of several phases each has a share); a larger epsilon or delta would help"
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
