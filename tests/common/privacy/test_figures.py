"""What is shown of ε and δ is never less than what was spent, nor more than what is left."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from fedlora.common.privacy.figures import exact, shown_delta, shown_epsilon, shown_left
from fedlora.simulations.report import numbers

SUPERSCRIPT = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")


@given(st.floats(1e-3, 1e4))
def test_epsilon_is_never_rounded_down(epsilon: float) -> None:
    assert float(shown_epsilon(epsilon)) >= epsilon - 1e-9
    assert float(shown_epsilon(epsilon)) <= epsilon + 0.001 + epsilon * 1e-9


@given(st.floats(1e-300, 1.0))
def test_delta_is_never_rounded_down(delta: float) -> None:
    assert delta <= float(shown_delta(delta)) <= delta * (1 + 1e-5)


def test_what_is_left_is_never_rounded_up_and_plain_numbers_stay_plain() -> None:
    assert (shown_left(1.8096), shown_left(0.3), shown_left(0.0)) == ("1.809", "0.3", "0")
    assert (shown_delta(1e-5), shown_delta(0.0), shown_delta(1.0000001e-5)) == (
        "1e-05",
        "0",
        "1.00001e-05",
    )


@given(st.floats(1e-9, 1e9))
def test_epsilon_is_never_understated_and_less_than_a_thousandth_too_much(value: float) -> None:
    shown = Decimal(shown_epsilon(value))
    assert Decimal(repr(value)) <= shown < Decimal(repr(value)) + Decimal("0.001")


def test_epsilon_by_example() -> None:
    found = [
        shown_epsilon(value)
        for value in (None, 0.0, 2.9958, 2.9911, 3.0, 0.00012344, 1234.5, float("inf"))
    ]
    assert found == ["none", "0", "2.996", "2.992", "3", "0.001", "1234.5", "unbounded"]


@given(st.floats(0, 1e308))
def test_spent_is_never_shown_as_less_and_left_never_as_more(value: float) -> None:
    """By exact fractions, and by what a reader's own floats make of it, at every size."""
    spent, left = shown_epsilon(value), shown_left(value)
    assert Fraction(left) <= exact(value) <= Fraction(spent) <= Fraction(left) + Fraction(1, 1000)
    assert float(left) <= value <= float(spent)


@given(st.integers(0, 10**9), st.integers(0, 3))
def test_a_short_decimal_shows_as_itself(count: int, places: int) -> None:
    text = f"{Decimal(count).scaleb(-places).normalize():f}"
    assert shown_epsilon(float(text)) == shown_left(float(text)) == text


def test_a_float_beside_a_short_decimal_is_not_taken_for_it() -> None:
    """0.1 + 0.2 is more than 0.3, and 1 - 0.9 less than 0.1; their exact sums are these."""
    assert shown_epsilon(0.1 + 0.2) == "0.301" and shown_left(1 - 0.9) == "0.099"
    assert shown_epsilon(exact(0.1) + exact(0.2)) == "0.3"
    assert shown_left(exact(1.0) - exact(0.9)) == "0.1"
    assert shown_left(-1.2341) == "-1.235" and shown_left(-0.0) == shown_epsilon(-0.0) == "0"


@given(st.floats(1e-12, 0.9))
def test_the_report_and_the_statement_show_one_delta(value: float) -> None:
    shown = numbers.delta(value).replace("\N{NO-BREAK SPACE}", "")
    mantissa, _, power = f"×{shown}".rpartition("×10")
    digits = Decimal(mantissa.strip("×") or 1).scaleb(int(power.translate(SUPERSCRIPT)))
    assert digits == Decimal(shown_delta(value))
