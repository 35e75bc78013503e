"""Numbers and shades of the report: losses are never understated, and every cell can be read."""

from __future__ import annotations

import re
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.simulations.report import numbers, tables


@given(st.floats(1e-12, 0.9))
def test_delta_is_never_understated(value: float) -> None:
    mantissa, power = re.fullmatch(r"(?:([\d.]+)\s×\s)?10(.+)", numbers.delta(value)).groups()  # type: ignore[union-attr]
    exponent = int(power.translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")))
    shown = Decimal(mantissa or 1).scaleb(exponent)
    assert Decimal(repr(value)) <= shown <= Decimal(value) * Decimal("1.1001")


def test_delta_by_example() -> None:
    found = [numbers.delta(value) for value in (None, 0.0, 1e-5, 2.5e-6, 0.00011, 1e-12)]
    assert found == ["none", "0", "10⁻⁵", "2.5\xa0×\xa010⁻⁶", "1.1\xa0×\xa010⁻⁴", "10⁻¹²"]


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0.0 s"),
        (3.21, "3.2 s"),
        (59.6, "1 min 0 s"),
        (72.4, "1 min 12 s"),
        (3600, "1 h 0 min"),
        (9_000, "2 h 30 min"),
    ],
)
def test_durations(seconds: float, shown: str) -> None:
    assert numbers.duration(seconds).replace("\xa0", " ") == shown


def test_sizes_and_numbers() -> None:
    assert numbers.size(1_203_965_952) == "1.2\xa0GB"
    assert numbers.size(999) == "999\xa0B"
    found = [
        numbers.number(value)
        for value in (None, True, 12_345, 0.7329101, 12_345.6, 3.0, float("nan"), "x")
    ]
    assert found == ["–", "yes", "12,345", "0.7329", "12,346", "3", "nan", "x"]
    assert [numbers.counted(1, "class", "classes"), numbers.counted(2_000, "round")] == [
        "1 class",
        "2,000 rounds",
    ]
    assert [numbers.percent(value) for value in (0.8714, None, float("nan"))] == [
        "87.1\xa0%",
        "–",
        "–",
    ]


def test_wilson_interval_by_example() -> None:
    """10 of 20 and 0 of 10, as statsmodels' proportion_confint(method="wilson") has them."""
    assert numbers.wilson(0.5, 20) == pytest.approx((0.2993, 0.7007), abs=1e-4)
    assert numbers.wilson(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)


@given(st.floats(-1, 2))
def test_every_cell_can_be_read(share: float) -> None:
    ground, ink = (
        tuple(int(color[at : at + 2], 16) for at in (0, 2, 4))
        for color in re.findall("#([0-9a-f]{6})", tables.shade(share))
    )
    assert tables.contrast(ground, ink) >= 4.5


def test_contrast_by_example() -> None:
    assert tables.contrast((0, 0, 0), (255, 255, 255)) == pytest.approx(21)
    # WCAG's own grey
    assert tables.contrast((118, 118, 118), (255, 255, 255)) == pytest.approx(4.54, abs=0.01)


def test_more_is_darker() -> None:
    grounds = [tables.shade(share).split("#")[1] for share in (0, 0.01, 0.1, 0.5, 1)]
    assert grounds == sorted(grounds, reverse=True) and len(set(grounds)) == 5


def test_confusions_are_the_mistakes_in_order() -> None:
    counts = np.array([[5, 1, 4], [0, 9, 0], [2, 0, 0]], dtype=np.float64)
    found = [
        (each.true, each.guessed, each.count)
        for each in tables.confusions(counts, ["a", "b", "c"], 2)
    ]
    assert found == [("a", "c", 4), ("c", "a", 2)]
    assert tables.confusions(counts, ["a", "b", "c"], 9)[0].share == pytest.approx(0.4)
    assert len(tables.confusions(counts, ["a", "b", "c"], 9)) == 3


def test_spread_leaves_out_what_is_not_finite() -> None:
    assert tables.spread([1.0, 2.0, 3.0, float("nan")])[::2] == [
        ("least", 1.0),
        ("median", 2.0),
        ("most", 3.0),
    ]
    assert tables.spread([]) == []
