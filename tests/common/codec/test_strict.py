"""Tables from outside become frozen values, or every fault is named at once."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.common.codec.strict import build, from_canonical, to_canonical
from fedlora.common.config.toml import Bounds, Each
from fedlora.common.errors import BadInput
from fedlora.common.trust.identity import Identity, PublicIdentity

KEY = Identity.generate().public


@dataclass(frozen=True)
class Inner:
    rate: float
    on: bool


@dataclass(frozen=True)
class Outer:
    name: str
    count: int
    inner: Inner
    several: tuple[Inner, ...]
    names: tuple[str, ...]
    share: float = field(metadata={"rule": Bounds(0, 1)})
    bounds: tuple[float, ...] = field(
        metadata={"rule": Each(Bounds(0, float("inf"), open_low=True), distinct=False)}
    )
    maybe: Inner | None = None


FLOATS = st.floats(allow_nan=False, allow_infinity=False)
INNER = st.builds(Inner, FLOATS, st.booleans())
OUTER = st.builds(
    Outer,
    st.text(max_size=4),
    st.integers(-(1 << 63), (1 << 63) - 1),
    INNER,
    st.lists(INNER, max_size=2).map(tuple),
    st.lists(st.text(max_size=3), max_size=2).map(tuple),
    st.floats(0, 1),
    st.lists(st.floats(0.5, 9), max_size=2).map(tuple),
    st.none() | INNER,
)
GOOD: dict[str, Any] = {
    "name": "n",
    "count": 1,
    "inner": {"rate": 1, "on": True},
    "several": [{"rate": 0.5, "on": False}],
    "names": ["a"],
    "share": 0.5,
    "bounds": [1, 1],
    "maybe": None,
}


@given(OUTER)
def test_canonical_bytes_come_back(value: Outer) -> None:
    data = to_canonical(value)
    found = from_canonical(Outer, data, "value")
    assert found == value and to_canonical(found) == data


@given(OUTER, st.data())
def test_bytes_that_were_accepted_are_given_back(value: Outer, draw: st.DataObject) -> None:
    data = bytearray(to_canonical(value))
    data[draw.draw(st.integers(0, len(data) - 1))] = draw.draw(st.integers(0, 255))
    try:
        found = from_canonical(Outer, bytes(data), "value")
    except BadInput:
        return
    assert to_canonical(found) == data


@pytest.mark.parametrize("spelled", [{"indent": 1}, {"separators": (", ", ":")}])
def test_another_spelling_is_refused(spelled: dict[str, Any]) -> None:
    value = build(Outer, GOOD, "value")
    table = json.loads(to_canonical(value))
    with pytest.raises(BadInput, match="another spelling"):
        from_canonical(Outer, json.dumps(table, sort_keys=True, **spelled).encode(), "value")
    twice = to_canonical(value).replace(b'"name":"n"', b'"name":"x","name":"n"')
    with pytest.raises(BadInput, match="another spelling"):
        from_canonical(Outer, twice, "value")


def test_numbers_are_floats_and_lists_are_tuples() -> None:
    value = build(Outer, GOOD, "value")
    assert value.inner == Inner(1.0, True) and type(value.inner.rate) is float
    assert value.several == (Inner(0.5, False),) and value.bounds == (1.0, 1.0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": 1}, "value name: found int, expected str"),
        ({"name": "\ud800"}, r"value name: found '\\ud800', expected str"),
        ({"count": True}, "value count: found bool, expected int"),
        ({"count": 1.0}, "value count: found float, expected int"),
        ({"count": 1 << 63}, "value count: found 9223372036854775808, expected int"),
        ({"share": float("nan")}, "value share: found nan, expected float"),
        ({"share": 2}, "value share: expected a finite number >= 0 and <= 1"),
        ({"inner": []}, "value inner: found list, expected a table"),
        ({"inner": {"rate": 1}}, "value inner on: missing"),
        ({"several": {}}, "value several: found dict, expected a list"),
        ({"several": [{"rate": "1", "on": True}]}, "value several rate: found str, expected float"),
        ({"names": "a"}, "value names: found str, expected a list"),
        ({"names": [None]}, "value names: found NoneType, expected str"),
        ({"bounds": [1, 0]}, "value bounds: found 0.0, expected a finite number > 0 in each place"),
        ({"maybe": {"rate": 1, "on": 1}}, "value maybe on: found int, expected bool"),
        ({"more\n": 1}, "value more : unknown field"),
    ],
)
def test_a_fault_names_its_field(change: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput, match=said) as caught:
        build(Outer, GOOD | change, "value")
    assert len(caught.value.faults) == 1 and caught.value.faults[0].isprintable()


def test_every_fault_at_once() -> None:
    with pytest.raises(BadInput) as caught:
        build(Outer, {"name": 1, "more": 2}, "value")
    assert len(caught.value.faults) == 2 + 7


def test_a_type_that_reads_text_reads_it() -> None:
    @dataclass(frozen=True)
    class Keyed:
        identity: PublicIdentity

    # a class of a function: its hints are looked up where it is defined
    Keyed.__annotations__ = {"identity": PublicIdentity}
    assert build(Keyed, {"identity": KEY.text}, "member").identity == KEY
    for found in (1, "ed25519:", None):
        with pytest.raises(BadInput, match="member identity: found"):
            build(Keyed, {"identity": found}, "member")
