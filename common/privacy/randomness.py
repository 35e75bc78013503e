"""Where random words come from, and what is made of them: uniforms, noise and draws.

    OsRandom      everything that privacy rests on: draws, noise, masks. Cannot be seeded, keeps no
                  state, so forks, restarts and equal seeds elsewhere never repeat a word.
    SeededRandom  experiments without privacy: a seed that somebody knows voids amplification and
                  noise.

Noise is a continuous Gaussian in double precision from 53-bit uniforms, with tails to 8.57 standard
deviations (24-bit uniforms end at 5.8). A draw compares 64-bit integers and never includes a unit
more often than its rate says. No function here touches a global generator (torch, NumPy, random).

Sources: Box and Muller 1958; AES-256-CTR as a generator, NIST SP 800-90A; Philox, Salmon et al.
2011.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from fractions import Fraction
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from fedlora.common.errors import BadInput

Words = npt.NDArray[np.uint64]
Name = TypeVar("Name")

_DIRECT_WORDS = 4096  # up to here the system call is as fast as a cipher's set-up
_CIPHER_WORDS = 1 << 20  # words a cipher call: bounds the memory of its input
_PAIRS = 1 << 18  # Gaussian pairs a step: bounds the memory of the temporaries


class Random(Protocol):
    """A source of independent, uniform 64-bit words."""

    def words(self, n: int) -> Words:
        """(n,) uint64, never the same words again."""


class OsRandom:
    """The system's generator; large requests: AES-256-CTR under a key that is used once."""

    def words(self, n: int) -> Words:
        """(n,) uint64: the operating system's bytes, or AES in counter mode under a key of them."""
        if n <= _DIRECT_WORDS:
            return np.frombuffer(os.urandom(8 * _count(n)), dtype=np.uint64)
        stream = Cipher(algorithms.AES(os.urandom(32)), modes.CTR(bytes(16))).encryptor()
        result = np.empty(n, dtype=np.uint64)
        for start in range(0, n, _CIPHER_WORDS):
            part = result[start : start + _CIPHER_WORDS]
            part[:] = np.frombuffer(stream.update(bytes(part.nbytes)), dtype=np.uint64)
        return result


class SeededRandom:
    """A reproducible stream, without privacy; `path` separates purposes, clients and rounds."""

    def __init__(self, seed: int, *path: int | str) -> None:
        # repr keeps 1 and "1", ("a", "b") and ("ab",) apart; plain concatenation would not
        digest = hashlib.sha256(repr((seed, *path)).encode()).digest()
        self._stream = np.random.Philox(key=int.from_bytes(digest[:16], "little"))

    def words(self, n: int) -> Words:
        """(n,) uint64: the next of the stream that the seed decides."""
        return np.asarray(self._stream.random_raw(_count(n)), dtype=np.uint64)


def uniform53(source: Random, n: int) -> npt.NDArray[np.float64]:
    """(n,) multiples of 2⁻⁵³ in (0, 1], equally likely; not 0, for its logarithm is taken."""
    return ((source.words(n) >> np.uint64(11)) + np.uint64(1)).astype(np.float64) * 2.0**-53


def gaussian(source: Random, n: int, std: float) -> npt.NDArray[np.float64]:
    """(n,) float64 independent N(0, std²) by Box-Muller; BadInput unless 0 < `std` < ∞."""
    if not (math.isfinite(std) and std > 0):
        raise BadInput(f"noise standard deviation: found {std}, expected a finite number > 0")
    result = np.empty(_count(n), dtype=np.float64)
    for start in range(0, n, 2 * _PAIRS):
        part = result[start : start + 2 * _PAIRS]
        part[:] = _box_muller(source, len(part))
    result *= std
    return result


def bernoulli(source: Random, n: int, rate: float) -> npt.NDArray[np.bool_]:
    """(n,) independent draws, true with probability ⌊rate·2⁶⁴⌋/2⁶⁴.

    Exact at 0 and 1, never above `rate`.
    """
    if not 0 <= rate <= 1:  # also refuses nan
        raise BadInput(f"sampling rate: found {rate}, expected 0 to 1")
    threshold = math.floor(Fraction(rate) * 2**64)
    if threshold == 2**64:  # does not fit a word
        return np.ones(_count(n), dtype=np.bool_)
    return np.asarray(source.words(n) < np.uint64(threshold), dtype=np.bool_)


def draw_units(units: int, rate: float, source: Random) -> npt.NDArray[np.int64]:
    """Indices of the units that join a step: a Poisson sample, possibly empty."""
    return np.flatnonzero(bernoulli(source, units, rate)).astype(np.int64)


def participants(names: Sequence[Name], rate: float, source: Random) -> list[Name]:
    """A Poisson sample: each name joins with probability `rate`, independently of the others."""
    return [names[place] for place in draw_units(len(names), rate, source)]


def _box_muller(source: Random, n: int) -> npt.NDArray[np.float64]:
    pairs = (n + 1) // 2
    uniforms = uniform53(source, 2 * pairs)
    radius = np.sqrt(-2.0 * np.log(uniforms[:pairs]))
    angle = 2.0 * np.pi * uniforms[pairs:]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:n]


def _count(n: int) -> int:
    if n < 0:
        raise BadInput(f"number of random words: found {n}, expected at least 0")
    return n
