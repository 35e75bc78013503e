"""Vectors as bytes: without a header, little-endian, in the width that their manifest names.

An adapter goes out in float32. An update comes back in float32, or rounded to bfloat16, half as
many bytes: the first 16 bits of a float32, the nearest of the two and the even one of a tie
(IEEE 754), so that a coordinate is off by at most 2⁻⁸ of itself. A node rounds once, after its
noise: what it commits, sends and sends again is what was rounded.
"""

from __future__ import annotations

import numpy as np

from fedlora.common.errors import BadInput
from fedlora.common.model.state import Vector, is_finite

BFLOAT16 = "bfloat16"
BYTES = {"float32": 4, BFLOAT16: 2}  # of a coordinate
# beyond it, the nearest bfloat16 would be infinite
LARGEST = np.array([0x7F7F0000], dtype=np.uint32).view(np.float32)[0]


def rounded(vector: Vector, wire: str) -> Vector:
    """(size,) float32 of what `wire` can carry; `vector` is finite. A second time changes none."""
    if wire == "float32":
        return vector.astype(np.float32, copy=False)
    return _read(vector_to_bytes(vector, wire), wire)


def vector_to_bytes(vector: Vector, wire: str = "float32") -> bytes:
    """`BYTES` a coordinate; BadInput for a wire that is not known."""
    if wire == "float32":
        return vector.astype("<f4", copy=False).tobytes()
    if wire != BFLOAT16:
        raise _unknown(wire)
    bits = np.clip(vector, -LARGEST, LARGEST).astype(np.float32).view(np.uint32)
    # half of what is cut off; a bit less where the last that stays is 0, for a tie goes to the even
    nearest = bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
    return (nearest >> np.uint32(16)).astype("<u2").tobytes()


def vector_from_bytes(
    data: bytes | memoryview, size: int, where: str, wire: str = "float32"
) -> Vector:
    """The (size,) float32 vector, read-only; BadInput where length or a value is wrong."""
    if wire not in BYTES:
        raise _unknown(wire)
    expected = BYTES[wire] * size
    if len(data) != expected:
        raise BadInput(
            f"{where} vector: found {len(data)} bytes, expected {expected} for {size} coordinates"
            f" in {wire}"
        )
    vector = _read(data, wire)
    if not is_finite(vector):
        raise BadInput(f"{where} vector: found a value that is not finite")
    return vector


def _read(data: bytes | memoryview, wire: str) -> Vector:
    if wire == "float32":
        vector = np.frombuffer(data, dtype="<f4").astype(np.float32, copy=False)
    else:
        bits = np.frombuffer(data, dtype="<u2").astype(np.uint32)
        bits <<= np.uint32(16)
        vector = bits.view(np.float32)
        vector.flags.writeable = False
    return vector


def _unknown(wire: str) -> BadInput:
    return BadInput(f"wire: found {wire!r}, expected one of {', '.join(BYTES)}")
