"""Which key serves what: each is derived for one purpose, pair and context, and used once."""

from __future__ import annotations

from fedlora.common.codec.framing import digest, framed
from fedlora.common.secagg import keys, wire


def check_key(context: bytes) -> bytes:
    """The public key of an attempt's linear check."""
    return digest(f"{wire.PROTOCOL} check", context)


def seed_mask(seed: bytes, context: bytes, dealers: bytes) -> bytes:
    """The key of a node's own mask."""
    return keys.hkdf(seed, framed("salt", context, dealers), b"seed")


def pair_mask(
    secret: bytes, context: bytes, cohort_hash: bytes, dealers: bytes, one: str, other: str
) -> bytes:
    """The key of the mask that two nodes share: the earlier name adds, the later subtracts."""
    first, second = sorted((one, other))
    info = framed("mask", first.encode(), second.encode())
    return keys.hkdf(secret, framed("salt", context, cohort_hash, dealers), info)


def sealing_key(secret: bytes, cohort_hash: bytes, dealer: str, receiver: str) -> bytes:
    """The key that seals one dealer's shares for one receiver."""
    info = framed("share", dealer.encode(), receiver.encode())
    return keys.hkdf(secret, framed("salt", cohort_hash), info)


def sealed_for(cohort_hash: bytes, dealer: str, receiver: str) -> bytes:
    """What a sealed share is bound to."""
    return framed(f"{wire.PROTOCOL} sealed", cohort_hash, dealer.encode(), receiver.encode())
