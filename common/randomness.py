"""Where randomness comes from: the operating system where privacy depends on it, a seed where nothing does.

Draws and noise of a private run must not be reproducible by anybody: a known sampling seed voids
amplification, known noise is no noise. `SeededRandom` serves partitions, initialisation and runs without
privacy. Everything is built from 64-bit words, so that one test of the words covers both.
"""

from __future__ import annotations

import hashlib
import os
from typing import Protocol

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from fedlora.common.errors import BadInput

Words = npt.NDArray[np.uint64]
Floats = npt.NDArray[np.float64]


class Random(Protocol):
    """A source of uniform 64-bit words."""

    def words(self, n: int) -> Words:
        """(n,) independent uniform words."""


class OsRandom:
    """Words of the operating system's generator: AES-256-CTR under a key that is drawn anew for each call."""

    def words(self, n: int) -> Words:
        stream = Cipher(algorithms.AES(os.urandom(32)), modes.CTR(bytes(16))).encryptor()
        return np.frombuffer(stream.update(bytes(8 * n)), dtype="<u8").astype(np.uint64)


class SeededRandom:
    """Philox under a seed and a path of names. Never for draws or noise of a private run."""

    def __init__(self, seed: int, *path: int | str) -> None:
        name = hashlib.sha256(repr((seed, *path)).encode()).digest()
        self._generator = np.random.Generator(np.random.Philox(key=np.frombuffer(name[:16], dtype="<u8")))

    def words(self, n: int) -> Words:
        return self._generator.integers(0, 2**64 - 1, size=n, dtype=np.uint64, endpoint=True)


def uniform53(source: Random, n: int) -> Floats:
    """(n,) multiples of 2^-53 in (0, 1]: never 0, so that a logarithm is finite."""
    return ((source.words(n) >> np.uint64(11)).astype(np.float64) + 1.0) * 2.0**-53


def gaussian(source: Random, n: int, std: float) -> Floats:
    """(n,) float64 samples of N(0, std²) by Box and Muller, from 53-bit uniforms: tails reach 8.5 std."""
    if not 0 <= std < float("inf"):
        raise BadInput(f"noise standard deviation: found {std}, expected a finite number >= 0")
    half = (n + 1) // 2
    uniform = uniform53(source, 2 * half)
    radius = np.sqrt(-2.0 * np.log(uniform[:half]))
    angle = 2.0 * np.pi * uniform[half:]
    return std * np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:n]


def bernoulli(source: Random, n: int, rate: float) -> npt.NDArray[np.bool_]:
    """(n,) true with probability `rate`, independently; exact to 2^-64, and at 0 and 1."""
    if not 0 <= rate <= 1:
        raise BadInput(f"sampling rate: found {rate}, expected a number from 0 to 1")
    if rate == 1:
        return np.ones(n, dtype=bool)
    return source.words(n) < np.uint64(int(rate * 2.0**64))
