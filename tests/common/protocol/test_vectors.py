"""What a wire carries: bytes by the coordinate, an error that is bounded, the same bytes again."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedlora.common.errors import BadInput
from fedlora.common.model.state import Vector
from fedlora.common.protocol.vectors import (
    BYTES,
    LARGEST,
    rounded,
    vector_from_bytes,
    vector_to_bytes,
)

FINITE = arrays(
    np.float32,
    st.integers(0, 40),
    elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
)


@given(FINITE)
def test_rounding_is_off_by_at_most_a_256th(vector: Vector) -> None:
    """Half of the last of 8 bits, and below the smallest normal number half of what there is."""
    near = np.clip(vector.astype(np.float64), -float(LARGEST), float(LARGEST))
    off = np.abs(rounded(vector, "bfloat16").astype(np.float64) - near)
    assert (off <= np.maximum(2.0**-8 * np.abs(near), 2.0**-134)).all()
    assert (rounded(vector, "float32") == vector).all()


@given(FINITE)
def test_rounding_is_that_of_the_processor(vector: Vector) -> None:
    """To the nearest, ties to the even; what would be infinite is the largest there is."""
    bounded = np.clip(vector, -LARGEST, LARGEST)
    expected = torch.from_numpy(bounded).to(torch.bfloat16).view(torch.int16).numpy()
    assert vector_to_bytes(vector, "bfloat16") == expected.astype("<i2").tobytes()


@given(FINITE)
def test_what_was_rounded_is_carried_as_it_is(vector: Vector) -> None:
    once = rounded(vector, "bfloat16")
    data = vector_to_bytes(once, "bfloat16")
    assert data == vector_to_bytes(vector, "bfloat16") and len(data) == 2 * len(vector)
    found = vector_from_bytes(data, len(vector), "update", "bfloat16")
    assert found.dtype == np.float32 and not found.flags.writeable
    assert found.tobytes() == once.tobytes()


def test_a_tie_goes_to_the_even() -> None:
    bits = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0xFF7FFFFF], dtype=np.uint32)
    found = np.frombuffer(vector_to_bytes(bits.view(np.float32), "bfloat16"), dtype="<u2")
    assert [hex(each) for each in found] == ["0x3f80", "0x3f82", "0x3f81", "0xff7f"]


@pytest.mark.parametrize("wire", list(BYTES))
def test_a_vector_is_as_long_as_its_adapter_and_finite(wire: str) -> None:
    data = vector_to_bytes(np.ones(3, dtype=np.float32), wire)
    with pytest.raises(BadInput, match=rf"expected {2 * BYTES[wire]} for 2 coordinates in {wire}"):
        vector_from_bytes(data, 2, "update", wire)
    endless = {"float32": b"\x00\x00\x80\x7f", "bfloat16": b"\x80\x7f"}[wire]
    with pytest.raises(BadInput, match="not finite"):
        vector_from_bytes(endless, 1, "update", wire)


def test_another_wire_is_refused() -> None:
    with pytest.raises(BadInput, match="wire: found 'int8', expected one of float32, bfloat16"):
        vector_to_bytes(np.ones(1, dtype=np.float32), "int8")
    with pytest.raises(BadInput, match="wire: found 'int8'"):
        vector_from_bytes(b"", 0, "update", "int8")
