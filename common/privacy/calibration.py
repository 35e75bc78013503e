"""The smallest noise with which a schedule costs at most the ε asked for; found once, kept."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

from fedlora.common.disk.files import write_atomically
from fedlora.common.errors import BadInput
from fedlora.common.privacy.accountant import Mechanism, accountant_name, check_request, epsilon_of

CALIBRATION = 1e-3  # relative tolerance of a calibrated noise multiplier


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
    check_request(sampling_rate, steps, epsilon)

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


def _key(fixed: Sequence[Mechanism], *numbers: float) -> str:
    listing = [[asdict(each) for each in fixed], list(numbers), accountant_name()]
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
