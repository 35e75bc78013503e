"""How ε and δ are written: never less than what was spent, never more than what is left.

A float stands for the shortest decimal that reads back as it: the number that a person wrote, and
the one that the ledger adds. So 0.3 shows as 0.3, and 0.30000000000000004, which is more, as 0.301.
No figure passes through binary arithmetic: it is taken as an exact fraction and rounded once.
"""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, Context, Decimal
from fractions import Fraction

DELTA_DIGITS = 6


def exact(value: float) -> Fraction:
    """The decimal number that a finite `value` prints as."""
    return Fraction(repr(float(value)))


def shown_epsilon(epsilon: float | Fraction | None) -> str:
    """A spent ε to three decimals, never rounded down; "unbounded" where it is ∞ or no number."""
    if epsilon is None:
        return "none"
    if not math.isfinite(epsilon):
        return "unbounded"
    return _thousandths(math.ceil(1000 * _fraction(epsilon)))


def shown_left(epsilon: float | Fraction) -> str:
    """What is left of a finite ε to three decimals, never rounded up."""
    return _thousandths(math.floor(1000 * _fraction(epsilon)))


def rounded_delta(delta: float) -> Decimal:
    """A finite δ to six digits, never rounded down."""
    context = Context(prec=DELTA_DIGITS, rounding=ROUND_CEILING)
    return context.create_decimal(repr(float(delta)))


def shown_delta(delta: float) -> str:
    """A finite δ to six digits, never rounded down: 1e-05."""
    return f"{float(rounded_delta(delta)):.{DELTA_DIGITS}g}"


def _fraction(value: float | Fraction) -> Fraction:
    return value if isinstance(value, Fraction) else exact(value)


def _thousandths(count: int) -> str:
    whole, rest = divmod(abs(count), 1000)
    return ("-" if count < 0 else "") + f"{whole}.{rest:03}".rstrip("0").rstrip(".")


def learnt_before(records: int) -> tuple[str, ...]:
    """What a statement says of so many public records that an adapter learnt from; of 0 nothing."""
    sentence = f"Before the first round the adapter learnt from {records} public records, which no"
    return (f"{sentence} ε covers.",) if records else ()
