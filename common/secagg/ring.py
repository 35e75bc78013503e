"""Fixed point in a ring, masks, and the words that detect accidents.

A coordinate x becomes q = round(x · levels / bound), saturated at ±levels, as a word of Z_2^bits.
Sums of n words are exact as long as n · levels stays below half the ring, which `Encoding.check`
makes sure of before anything is sent. A mask is the AES-256-CTR key stream of a key that is used
once; adding masks never rounds.

Two words of 64 bits follow the coordinates: a count of 1, and Σ r_k q_k mod 2^64 for a public
random r. They are masked like the rest. They detect accidents (a lost, doubled or damaged input),
not attackers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes

from fedlora.common.errors import BadInput

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
WordArray = npt.NDArray[np.unsignedinteger[Any]]

KEY_BYTES = 32
CHECK_WORDS = 2
MOST_LEVELS = 1 << 52  # beyond it a float64 no longer holds every level
NOISE_TAIL = 10.0  # standard deviations that the range check leaves for noise
_CHUNK = 1 << 17  # bytes of key stream at a time: fits a core's cache
_BLOCK = 16
_ZEROS = bytes(_CHUNK)


@dataclass(frozen=True)
class Encoding:
    """How `size` real coordinates become words of `bits` bits; public, fixed by the manifest."""

    size: int
    bits: int
    # a coordinate saturates at ± this; a public value of its own, not the privacy clip
    bound: float
    levels: int  # integer steps from 0 to the bound
    # standard deviation, in levels, of what a member adds beyond the bound; an upper bound
    noise: float = 0.0

    def __post_init__(self) -> None:
        faults = []
        if self.size < 1:
            faults.append(f"size: found {self.size}, expected at least 1")
        if self.bits not in (32, 64):
            faults.append(f"bits: found {self.bits}, expected 32 or 64")
        if not (math.isfinite(self.bound) and self.bound > 0):
            faults.append(f"update_bound: found {self.bound}, expected a finite number > 0")
        if not 1 <= self.levels <= MOST_LEVELS:
            faults.append(f"levels: found {self.levels}, expected 1 to {MOST_LEVELS}")
        if not (math.isfinite(self.noise) and self.noise >= 0):
            faults.append(f"noise: found {self.noise}, expected a finite number >= 0")
        if faults:
            raise BadInput([f"secure aggregation {fault}" for fault in faults])

    @classmethod
    def fitting(
        cls, size: int, bound: float, levels: int, members: int, noise: float = 0.0
    ) -> Encoding:
        """The narrower ring with exact sums of `members` words; BadInput if neither is wide."""
        narrow = cls(size, 32, bound, levels, noise)
        if narrow.fits(members):
            return narrow
        wide = cls(size, 64, bound, levels, noise)
        wide.check(members)
        return wide

    def reach(self, members: int) -> float:
        """The most levels that a coordinate of a sum of `members` has."""
        return members * self.levels + NOISE_TAIL * self.noise * math.sqrt(members)

    def fits(self, members: int) -> bool:
        """Whether no sum of `members` words can wrap."""
        return self.reach(members) < 1 << (self.bits - 1)

    def check(self, members: int) -> None:
        """BadInput where a sum could wrap."""
        if not self.fits(members):
            raise BadInput(
                f"secure aggregation range: {members} members of {self.levels} levels with noise"
                f" {self.noise:g} do not fit half of 2^{self.bits}: expected fewer members or"
                " levels"
            )

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of a word: little-endian, unsigned."""
        return np.dtype("<u4" if self.bits == 32 else "<u8")

    @property
    def vector_bytes(self) -> int:
        """Length of a masked vector on the wire."""
        return self.size * self.bits // 8 + 8 * CHECK_WORDS

    def encode(self, values: npt.NDArray[np.floating[Any]]) -> Ints:
        """(size,) int64 levels, rounded; BadInput for another shape or what is not finite."""
        if values.shape != (self.size,):
            raise BadInput(f"update: found shape {values.shape}, expected ({self.size},)")
        if not np.isfinite(values).all():
            raise BadInput("update: found a value that is not finite")
        scaled = np.clip(values.astype(np.float64), -self.bound, self.bound)
        scaled *= self.levels / self.bound
        return np.rint(scaled, out=scaled).astype(np.int64)

    def decode(self, total: Ints) -> Floats:
        """(size,) float64 from a sum of levels."""
        return total.astype(np.float64) * (self.bound / self.levels)


@dataclass(eq=False)
class Masked:
    """Words and check words of one input, or of a sum of inputs. Grows by addition only."""

    encoding: Encoding
    body: WordArray  # (size,)
    tail: npt.NDArray[np.uint64]  # (CHECK_WORDS,)
    # for key streams, kept between masks
    _scratch: bytearray = field(default_factory=bytearray, repr=False)

    @classmethod
    def zeros(cls, encoding: Encoding) -> Masked:
        """The empty sum."""
        return cls(encoding, np.zeros(encoding.size, encoding.dtype), np.zeros(CHECK_WORDS, "<u8"))

    @classmethod
    def of(cls, encoding: Encoding, values: Ints, check_key: bytes) -> Masked:
        """A node's unmasked input: its levels, a count of 1, and the linear check."""
        if values.shape != (encoding.size,) or values.dtype != np.int64:
            raise BadInput(
                f"levels: found {values.dtype} {values.shape}, expected int64 ({encoding.size},)"
            )
        body = values.astype(encoding.dtype)  # two's complement: the ring's own signs
        tail = np.array([1, linear_check(check_key, values)], dtype="<u8")
        return cls(encoding, body, tail)

    @classmethod
    def from_bytes(cls, encoding: Encoding, data: bytes | memoryview, where: str) -> Masked:
        """A view of what was received; BadInput unless exactly as long as the encoding."""
        if len(data) != encoding.vector_bytes:
            raise BadInput(f"{where}: found {len(data)} bytes, expected {encoding.vector_bytes}")
        at = encoding.vector_bytes - 8 * CHECK_WORDS
        body = np.frombuffer(data, encoding.dtype, count=encoding.size)
        return cls(encoding, body, np.frombuffer(data, "<u8", count=CHECK_WORDS, offset=at))

    def to_bytes(self) -> bytes:
        """Words and check words, little-endian: `encoding.vector_bytes` of them."""
        return self.body.tobytes() + self.tail.tobytes()

    def add(self, other: Masked) -> None:
        """Add another's words to these."""
        np.add(self.body, other.body, out=self.body)
        np.add(self.tail, other.tail, out=self.tail)

    def apply_mask(self, key: bytes, positive: bool) -> None:
        """Add, or subtract, the key stream of `key`."""
        combine = np.add if positive else np.subtract
        stream = key_stream(key)
        self._scratch = self._scratch or bytearray(_CHUNK + _BLOCK - 1)
        words = np.frombuffer(
            self._scratch, self.encoding.dtype, count=_CHUNK // self.encoding.dtype.itemsize
        )
        for start in range(0, len(self.body), len(words)):
            part = self.body[start : start + len(words)]
            stream.update_into(_ZEROS[: part.nbytes], self._scratch)
            combine(part, words[: len(part)], out=part)
        last = np.frombuffer(stream.update(bytes(8 * CHECK_WORDS)), "<u8")
        combine(self.tail, last, out=self.tail)

    def levels(self) -> Ints:
        """The words as signed integers; exact where the range check held and no mask is left."""
        signed = np.dtype(f"<i{self.encoding.bits // 8}")
        return self.body.view(signed).astype(np.int64)

    def check(self, members: int, check_key: bytes) -> Ints:
        """Levels of an unmasked sum of `members` inputs; BadInput if check words or range fail."""
        values = self.levels()
        count, linear = (int(word) for word in self.tail)
        if count != members:
            raise BadInput(f"sum check: found a count of {count}, expected {members}")
        if linear != linear_check(check_key, values):
            raise BadInput("sum check: found words that do not belong to their linear check")
        largest = max(int(values.max()), -int(values.min()))
        if largest > self.encoding.reach(members):
            raise BadInput(
                f"sum range: found a coordinate of {largest} levels, expected at most "
                f"{members} times {self.encoding.levels} and noise of {self.encoding.noise:g}"
            )
        return values


def key_stream(key: bytes) -> CipherContext:
    """AES-256-CTR from counter 0; each key serves one stream."""
    if len(key) != KEY_BYTES:
        raise BadInput(f"mask key: found {len(key)} bytes, expected {KEY_BYTES}")
    return Cipher(algorithms.AES(key), modes.CTR(bytes(_BLOCK))).encryptor()


def linear_check(key: bytes, values: Ints) -> int:
    """Σ r_k v_k mod 2^64, where r is the key stream of `key` in words of 64 bits."""
    stream, total, step = key_stream(key), 0, _CHUNK // 8
    words = values.view(np.uint64)
    for start in range(0, len(words), step):
        part = words[start : start + step]
        weights = np.frombuffer(stream.update(_ZEROS[: part.nbytes]), "<u8")
        total += int(np.dot(weights, part))
    return total & (1 << 64) - 1
