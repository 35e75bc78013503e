"""Frames have one encoding: what is written is read back, and nothing else is read at all."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.common.codec.framing import (
    Digest,
    Framed,
    Most,
    OneOf,
    Plain,
    Text,
    Whole,
    frame,
    framed,
    kind_of,
    parts_of,
    unframe,
    unframed,
)
from fedlora.common.errors import BadInput


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True)
class Inner(Framed):
    TAG = "inner"

    root: Digest


@dataclass(frozen=True)
class Outer(Framed):
    TAG = "outer"

    name: Annotated[str, Text(1, 8, line=True)]
    count: Annotated[int, Whole(1 << 31)]
    colour: Annotated[Colour, OneOf(Colour)]
    inner: Inner
    listed: Annotated[tuple[Inner, ...], Most(3)]
    rest: bytes


INNER = st.builds(Inner, st.binary(min_size=32, max_size=32))
OUTER = st.builds(
    Outer,
    st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=2),
    st.integers(0, 1 << 31),
    st.sampled_from(Colour),
    INNER,
    st.lists(INNER, max_size=3).map(tuple),
    st.binary(max_size=9),
)


@given(OUTER)
def test_a_value_comes_back_as_it_went(value: Outer) -> None:
    data = value.to_bytes()
    found = Outer.from_bytes(data)
    assert found == value and frame(found) == data and isinstance(found.colour, Colour)
    assert unframe(Outer, frame(value, "other"), "other") == value
    assert kind_of(data, "value") == "outer"


@given(OUTER, st.data())
def test_bytes_that_were_accepted_are_given_back(value: Outer, draw: st.DataObject) -> None:
    """Any byte changed, cut or added: refused, or another value with exactly these bytes."""
    data = bytearray(value.to_bytes())
    place = draw.draw(st.integers(0, len(data) - 1))
    data[place] ^= draw.draw(st.integers(1, 255))
    for changed in (bytes(data), bytes(data[:place]), bytes(data) + b"\0"):
        try:
            found = Outer.from_bytes(changed)
        except BadInput:
            continue
        assert found.to_bytes() == changed


GOOD = Outer("a", 1, Colour.RED, Inner(bytes(32)), (), b"")


@pytest.mark.parametrize(
    ("place", "part", "said"),
    [
        (0, b"", "outer name: found 0 bytes, expected 1 to 8"),
        (0, b"123456789", "outer name: found 9 bytes, expected 1 to 8"),
        (0, b"\xff", "outer name: found bytes that are not UTF-8"),
        (0, b"\xc0\x80", "outer name: found bytes that are not UTF-8"),  # overlong
        (0, b"a\n", "outer name: expected one line of printable characters"),
        (1, b"\0" * 7, "outer count: found no number of 8 bytes"),
        (1, b"\0" * 4 + b"\xff" * 4, "outer count: found no number of 8 bytes up to 2147483648"),
        (2, b"green", "outer colour: found 'green', expected one of red, blue"),
        (3, framed("inner", bytes(31)), "inner root: found a field of 31 bytes, expected 32"),
        (3, framed("outer", bytes(32)), "inner: found another kind of message"),
        (3, framed("inner"), "inner: found 0 fields, expected 1"),
        (4, framed("list", *[framed("inner", bytes(32))] * 4), "too many fields"),
        (4, framed("lost"), "list: found another kind of message"),
    ],
)
def test_a_fault_names_its_field(place: int, part: bytes, said: str) -> None:
    parts = [*parts_of(GOOD)]
    assert Outer.from_bytes(framed("outer", *parts)) == GOOD
    parts[place] = part
    with pytest.raises(BadInput, match=said):
        Outer.from_bytes(framed("outer", *parts))


def test_another_number_of_fields_is_refused() -> None:
    parts = parts_of(GOOD)
    for damaged in (parts[:-1], (*parts, b""), (*parts, *[b""] * 30)):
        with pytest.raises(BadInput, match=r"fields"):
            Outer.from_bytes(framed("outer", *damaged))
    with pytest.raises(BadInput, match="another kind"):
        unframed(b"", "outer")
    for nothing in (b"", bytes(7), bytes(8), framed("\n"), framed("outer")[:-1]):
        with pytest.raises(BadInput, match="found no kind"):
            kind_of(nothing, "value")


def test_a_type_that_nothing_writes_is_a_mistake_of_ours() -> None:
    @dataclass(frozen=True)
    class Wrong(Framed):
        TAG = "wrong"

        name: str

    with pytest.raises(TypeError, match="expected bytes"):
        Wrong("a").to_bytes()


def test_memory_is_written_as_it_is() -> None:
    assert Plain().write(memoryview(b"ab")) == b"ab"
    assert unframed(memoryview(framed("t", b"ab")), "t") == [b"ab"]
