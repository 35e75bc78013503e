"""How the report writes numbers: nothing looks too exact, and δ as it is rounded everywhere."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fedlora.common.privacy.figures import rounded_delta

NBSP = "\N{NO-BREAK SPACE}"
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def delta(value: float | None) -> str:
    """As in the privacy statement, as a power of ten: 0.00001 is shown as 10⁻⁵."""
    if value is None:
        return "none"
    if value == 0:
        return "0"
    rounded = rounded_delta(value)
    exponent = rounded.adjusted()
    mantissa = f"{rounded.scaleb(-exponent).normalize():f}"
    power = "10" + str(exponent).translate(_SUPERSCRIPT)
    return power if mantissa == "1" else f"{mantissa}{NBSP}×{NBSP}{power}"


def percent(value: float | None) -> str:
    """A share in 0..1 with one decimal; a dash where there is none."""
    return "–" if value is None or not math.isfinite(value) else f"{100 * value:.1f}{NBSP}%"


def duration(seconds: float) -> str:
    """Hours, minutes or seconds, the two largest."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f}{NBSP}s" if seconds < 10 else f"{whole}{NBSP}s"
    hours, rest = divmod(whole, 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours}{NBSP}h {minutes}{NBSP}min" if hours else f"{minutes}{NBSP}min {left}{NBSP}s"


def size(count: float) -> str:
    """Bytes in decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g}{NBSP}{unit}"
        count /= 1000
    return f"{count:,.3g}{NBSP}TB"


def number(value: Any) -> str:
    """Any figure: four digits, thousands apart, a dash where there is none."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        whole = value.is_integer() or abs(value) >= 10_000
        return f"{value:,.0f}" if math.isfinite(value) and whole else f"{value:,.4g}"
    return str(value)


def counted(count: int, one: str, many: str | None = None) -> str:
    """1 round, 2 rounds."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share seen in `count` records (Wilson 1927)."""
    z = 1.96
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = (
        z
        * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
        / (1 + z * z / count)
    )
    return max(0.0, middle - half), min(1.0, middle + half)


def cohorts(secure: Mapping[str, Any]) -> str:
    """How a run was securely aggregated: everything that a reader needs to judge it."""
    smallest, largest = secure["cohort"]
    lowest, highest = secure["threshold"]
    lost = ", ".join(f"{stage} {count}" for stage, count in secure["dropouts"].items() if count)
    return (
        f"{secure['sums']} sums of {_span(smallest, largest)} institutions with t ="
        f" {_span(lowest, highest)}, at least {secure['minimum_cohort']} demanded,"
        f" {secure['smallest_sum']} in the smallest sum, {secure['colluders']} assumed to collude,"
        f" drop-outs: {lost or 'none'}"
    )


def _span(low: int, high: int) -> str:
    return str(low) if low == high else f"{low} to {high}"
