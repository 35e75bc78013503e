"""A budget, and what of it is spent: exact sums of the decimal numbers that people write."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

from fedlora.common.errors import BadInput
from fedlora.common.privacy.accountant import Spend
from fedlora.common.privacy.figures import exact


@dataclass(frozen=True)
class Budget:
    """A named budget of one population, and what it may spend over all runs."""

    name: str
    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        for field, value in (("epsilon", self.epsilon), ("delta", self.delta)):
            if not (math.isfinite(value) and value > 0):
                raise BadInput(
                    f"budget {self.name} {field}: found {value}, expected a finite number > 0"
                )


@dataclass(frozen=True)
class Total:
    """An exact sum of spends."""

    epsilon: Fraction = Fraction(0)
    delta: Fraction = Fraction(0)

    def __add__(self, spend: Spend) -> Total:
        return Total(self.epsilon + exact(spend.epsilon), self.delta + exact(spend.delta))


def total_of(charges: Iterable[Spend]) -> Total:
    """The exact sum of what runs were charged."""
    total = Total()
    for each in charges:
        total += each
    return total


def beyond(budget: Budget, before: Total, more: Spend) -> str:
    """Why `more` does not fit a budget whose exact spend is `before`, or ""."""
    after = before + more
    for name, used, needed, cap in (
        ("ε", before.epsilon, after.epsilon, budget.epsilon),
        ("δ", before.delta, after.delta, budget.delta),
    ):
        if needed > exact(cap):
            return (
                f"budget {budget.name}: {name} = {float(used):.6g} is spent and would reach "
                f"{float(needed):.6g}, past its cap of {cap:.6g}"
            )
    return ""
