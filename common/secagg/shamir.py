"""Shamir's secret sharing over the field of P = 2^256 - 189 (Shamir 1979).

A secret below P is the value at 0 of a random polynomial of degree t - 1; a share is its value at x
= 1 … n. t shares give it back, t - 1 say nothing about it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fedlora.common.errors import BadInput

P = 2**256 - 189
BYTES = 32

RandomBytes = Callable[[int], bytes]


def below_p(draw: RandomBytes) -> int:
    """A uniform field element."""
    while True:
        value = int.from_bytes(draw(BYTES), "big")
        if value < P:
            return value


def split(secret: int, threshold: int, holders: int, draw: RandomBytes) -> list[int]:
    """Shares for x = 1 … holders; any `threshold` of them give the secret."""
    if not 1 <= threshold <= holders:
        raise BadInput(f"threshold: found {threshold}, expected 1 to {holders}")
    if not 0 <= secret < P:
        raise BadInput("secret: found a number outside the field")
    coefficients = [secret] + [below_p(draw) for _ in range(threshold - 1)]
    return [_value_at(x, coefficients) for x in range(1, holders + 1)]


def weights_at_zero(places: Sequence[int]) -> list[int]:
    """Lagrange weights of distinct places x > 0 for the value at 0."""
    if not places or len(set(places)) != len(places) or min(places) < 1:
        raise BadInput(
            f"shares: found the places {list(places)[:8]}, expected distinct numbers from 1"
        )
    weights = []
    for x in places:
        above, below = 1, 1
        for other in places:
            if other != x:
                above, below = above * other % P, below * (other - x) % P
        weights.append(above * pow(below, -1, P) % P)
    return weights


def combine(weights: Sequence[int], shares: Sequence[int]) -> int:
    """The secret from shares at the places that the weights were made for."""
    return sum(weight * share for weight, share in zip(weights, shares, strict=True)) % P


def to_bytes(element: int) -> bytes:
    """A field element in 32 bytes, big-endian."""
    return element.to_bytes(BYTES, "big")


def from_bytes(data: bytes, where: str) -> int:
    """A field element; BadInput for another length or a number not below P."""
    value = int.from_bytes(data, "big")
    if len(data) != BYTES or value >= P:
        raise BadInput(
            f"{where}: found {len(data)} bytes that are no field element, expected {BYTES}"
        )
    return value


def _value_at(x: int, coefficients: Sequence[int]) -> int:
    """Horner's rule; x is small, so one reduction at the end is cheaper than one a step."""
    value = 0
    for coefficient in reversed(coefficients):
        value = value * x + coefficient
    return value % P
