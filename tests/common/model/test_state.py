"""Flat, named, file and digest are four views of one value; nothing else gets in."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from fedlora.common.errors import BadInput
from fedlora.common.model.state import (
    AdapterSpec,
    AdapterState,
    TensorSpec,
    safetensors_pieces,
    safetensors_vectors,
)

SPEC = AdapterSpec(
    (TensorSpec("lora_A", (2, 3)), TensorSpec("head.weight", (2,)), TensorSpec("empty", (0, 4)))
)

shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
specs = st.dictionaries(
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12),
    shapes,
    max_size=5,
).map(
    lambda table: AdapterSpec(
        tuple(TensorSpec(name, shape) for name, shape in table.items() if name != "__metadata__")
    )
)


@st.composite
def states(draw: st.DrawFn) -> AdapterState:
    spec = draw(specs)
    values = draw(
        st.lists(
            st.floats(width=32, allow_nan=False, allow_infinity=False),
            min_size=spec.size,
            max_size=spec.size,
        )
    )
    return AdapterState(spec, np.array(values, dtype=np.float32))


@given(states())
def test_round_trips_keep_every_bit(state: AdapterState) -> None:
    assert (
        AdapterState.from_named(state.spec, state.named()).vector.tobytes()
        == state.vector.tobytes()
    )
    back = AdapterState.from_bytes(state.to_bytes(), state.spec)
    assert back.vector.tobytes() == state.vector.tobytes()
    assert back == state and back.digest == state.digest


@given(states(), st.data())
def test_one_changed_coordinate_changes_the_digest(
    state: AdapterState, data: st.DataObject
) -> None:
    if state.spec.size:
        place = data.draw(st.integers(0, state.spec.size - 1))
        changed = state.vector.copy()
        changed[place] = np.nextafter(changed[place], np.float32(0.123))
        assert AdapterState(state.spec, changed) != state


def test_shapes_are_part_of_the_digest() -> None:
    values = np.arange(6, dtype=np.float32)
    wide = AdapterState(AdapterSpec((TensorSpec("a", (2, 3)),)), values)
    tall = AdapterState(AdapterSpec((TensorSpec("a", (3, 2)),)), values)
    assert wide.digest != tall.digest


def test_a_state_can_not_be_written_to() -> None:
    state = AdapterState.zeros(SPEC)
    with pytest.raises(ValueError, match="read-only"):
        state.vector[0] = 1
    with pytest.raises(ValueError, match="read-only"):
        state.named()["lora_A"][0, 0] = 1


def header(table: object, body: bytes = b"") -> bytes:
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return struct.pack("<Q", len(text)) + text + body


GOOD = AdapterState.zeros(SPEC).named()
PART = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
BAD = {
    "st-truncated": AdapterState.zeros(SPEC).to_bytes()[:-3],
    "st-truncated-to-nothing": b"\x01",
    "st-header-2^62": struct.pack("<Q", 1 << 62) + b"{}",
    "st-overlap": header({"a": PART, "b": PART}, bytes(8)),
    "st-duplicate-key": header(
        b'{"a":' + json.dumps(PART).encode() + b',"a":' + json.dumps(PART).encode() + b"}", bytes(8)
    ),
    "st-100k-tensors": header(
        {f"t{k}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for k in range(100_000)}
    ),
    "st-nan": save({**GOOD, "head.weight": np.array([1, np.nan], dtype=np.float32)}),
    "st-wrong-shape": save({**GOOD, "head.weight": np.zeros(3, dtype=np.float32)}),
    "st-wrong-dtype": save({**GOOD, "head.weight": np.zeros(2, dtype=np.float64)}),
    "st-wrong-extra": save({**GOOD, "more": np.zeros(2, dtype=np.float32)}),
    "st-wrong-missing": save({name: GOOD[name] for name in ("lora_A", "empty")}),
    "npz-bomb": b"PK\x03\x04" + bytes(200),
    "not-a-table": header([1, 2]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_in_one_line(name: str) -> None:
    with pytest.raises(BadInput) as caught:
        AdapterState.from_bytes(BAD[name], SPEC, "adapter.safetensors")
    assert caught.value.faults and all(
        line.startswith("adapter.safetensors") for line in caught.value.faults
    )
    assert all("\n" not in line for line in caught.value.faults)


def test_every_wrong_tensor_is_named_at_once() -> None:
    named = {"lora_A": np.zeros((3, 2), dtype=np.float32), "x": np.zeros(1, dtype=np.float32)}
    with pytest.raises(BadInput) as caught:
        AdapterState.from_named(SPEC, named)
    assert len(caught.value.faults) == 4


def test_vectors_are_views_of_a_file_s_bytes() -> None:
    held = {"a": np.arange(5, dtype=np.float32), "b": np.array([np.nan, -0.0], np.float32)}
    data = memoryview(b"".join(safetensors_pieces(held)))
    found = safetensors_vectors(data, "state")
    assert found.keys() == held.keys()
    for name, vector in found.items():
        assert vector.tobytes() == held[name].tobytes() and np.shares_memory(vector, data)
    wide = memoryview(save({"a": np.zeros(3)}))
    with pytest.raises(BadInput, match=r"state a: found .*F64.*, expected a float32 vector"):
        safetensors_vectors(wide, "state")
