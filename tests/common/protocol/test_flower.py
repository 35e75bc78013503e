"""Messages survive the trip as Flower's own bytes, and nothing else is taken for one."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as Proto
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedlora.common.config.schema import LoraConfig, ModelConfig
from fedlora.common.errors import BadInput, Refused
from fedlora.common.manifest.manifest import Network, Phase, RunManifest
from fedlora.common.manifest.plan import RoundPlan, Update
from fedlora.common.model.state import AdapterSpec, AdapterState, TensorSpec, Vector
from fedlora.common.protocol import flower
from fedlora.common.terminal import MAX_LINE

FINITE = arrays(
    np.float32,
    st.integers(0, 40),
    elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
)
NAMES = st.text(st.characters(categories=("L", "N", "P")), min_size=1, max_size=flower.MAX_NAME)
COUNTS = st.integers(1, 2**31)
PLAN = RoundPlan(manifest="sha256:m", phase=0, round=3, attempt=5, adapter="sha256:a")
PHASE = Phase("adapter", 3, 4, 2, 0.02, 128.0, 0.7, 1.0, 0.0, "adamw", 1e-3, True, 0.0)
MANIFEST = RunManifest(
    federation="north",
    run="0" * 32,
    task="sequence-classification",
    labels=("a", "ü"),
    base_digest="sha256:b",
    spec_digest="sha256:s",
    projection_digest="",
    max_length=64,
    mode="record",
    unit="",
    epsilon=3.0,
    delta=1e-5,
    strategy="fedavg",
    participation=1.0,
    minimum_cohort=1,
    seed=0,
    network=Network.of(ModelConfig(), LoraConfig()),
    phases=(PHASE,),
)
ZEROS = np.zeros(4, dtype=np.float32)


def over_the_wire(record: RecordDict) -> RecordDict:
    proto = Proto.FromString(recorddict_to_proto(record).SerializeToString())
    return recorddict_from_proto(proto)


def spec_of(vector: Vector) -> AdapterSpec:
    return AdapterSpec((TensorSpec("head.weight", vector.shape),))


@given(NAMES, COUNTS, COUNTS, FINITE)
def test_update_round_trip(client: str, number: int, attempt: int, delta: Vector) -> None:
    sent = Update(client, "sha256:m", number, attempt, delta)
    got = flower.read_reply(over_the_wire(flower.update_record(sent)), delta.size)
    assert isinstance(got, Update)
    assert (got.client, got.manifest, got.round, got.attempt) == (
        client,
        "sha256:m",
        number,
        attempt,
    )
    assert got.delta.dtype == np.float32
    assert got.delta.tobytes() == delta.tobytes()


@given(NAMES, COUNTS, FINITE)
def test_plan_round_trip(client: str, number: int, vector: Vector) -> None:
    plan = RoundPlan("sha256:m", 1, number, number + 1, "sha256:a")
    state = AdapterState(spec_of(vector), vector)
    got = flower.read_plan(over_the_wire(flower.plan_record(client, plan, state)), state.spec)
    assert (got.client, got.plan) == (client, plan)
    assert got.state == state


@given(st.lists(NAMES, unique=True, max_size=20))
def test_consent_round_trip(clients: list[str]) -> None:
    assert flower.read_consent(over_the_wire(flower.consent_record(clients))) == tuple(clients)


def test_offer_round_trip() -> None:
    got = flower.read_offer(over_the_wire(flower.offer_record(MANIFEST)))
    assert got == MANIFEST
    assert got.digest == MANIFEST.digest


@given(st.text())
def test_a_refusal_arrives_as_one_bounded_printable_line(reason: str) -> None:
    record = over_the_wire(flower.refusal_record("north", Refused(reason * 50)))
    got = flower.read_reply(record, 4)
    assert isinstance(got, flower.Refusal)
    assert got.client == "north"
    assert got.refused
    assert got.reason.isprintable()
    assert len(got.reason) <= MAX_LINE
    with pytest.raises(Refused):
        flower.read_answer(record)


def good() -> RecordDict:
    return flower.update_record(Update("north", "sha256:m", 3, 5, ZEROS))


def fields(record: RecordDict) -> dict[str, object]:
    """The message's config record, to be spoilt."""
    return cast("dict[str, object]", record[flower.FIELDS])


def put(**values: object) -> Callable[[RecordDict], object]:
    return lambda record: fields(record).update(values)


def send(
    *,
    dtype: str = "float32",
    size: int = 4,
    stype: str = flower.LITTLE_ENDIAN,
    data: bytes = bytes(16),
) -> Callable[[RecordDict], object]:
    array = Array(dtype, (size,), stype, data)
    return lambda record: record.update({flower.ARRAYS: ArrayRecord({flower.VECTOR: array})})


BAD: dict[str, tuple[Callable[[RecordDict], object], str]] = {
    "wrong-kind": (put(kind="plan"), "message kind: found 'plan', expected 'update'"),
    "wrong-version": (put(version=2), "message version: found 2, expected 1"),
    "version-bool": (put(version=True), "message version: found True"),
    "no-fields": (lambda record: record.pop(flower.FIELDS), "found no record 'fedlora'"),
    "missing-field": (lambda record: fields(record).pop("attempt"), "update attempt: missing"),
    "unknown-field": (put(weight=9.0), "update weight: unknown field"),
    "mistyped-field": (put(round="3"), "update round: found str, expected int"),
    "bool-as-int": (put(round=True), "update round: found bool, expected int"),
    "empty-name": (put(client=""), "update client: expected a printable name"),
    "unprintable-name": (put(client="a\x1b[2J"), "update client: expected a printable name"),
    "long-name": (put(client="a" * 201), "update client: expected a printable name"),
    "extra-record": (
        lambda record: record.update({"more": ConfigRecord()}),
        "found an extra record 'more'",
    ),
    "no-vector": (lambda record: record.pop(flower.ARRAYS), "found no record 'fedlora.arrays'"),
    "msg-oversize": (
        send(data=bytes(4 << 20)),
        "found 4194304 bytes of shape (4,), expected 16 of (4,)",
    ),
    "vec-short": (
        send(size=3, data=bytes(12)),
        "found 12 bytes of shape (3,), expected 16 of (4,)",
    ),
    "vec-long": (send(size=5, data=bytes(20)), "found 20 bytes of shape (5,), expected 16 of (4,)"),
    "vec-shape-lies": (send(size=5), "found 16 bytes of shape (5,)"),
    "npz-bomb": (send(stype="numpy.ndarray"), "found float32 as numpy.ndarray"),
    "vec-dtype": (send(dtype="float64"), "found float64 as fedlora.f4"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_reply(name: str) -> None:
    spoil, message = BAD[name]
    record = good()
    spoil(record)
    with pytest.raises(BadInput) as caught:
        flower.read_reply(over_the_wire(record), 4)
    assert any(message in fault for fault in caught.value.faults)
    assert all(fault.isprintable() for fault in caught.value.faults)


def test_all_faults_of_a_message_are_named_at_once() -> None:
    record = good()
    fields(record).update({"round": "3", "weight": 1.0})
    del fields(record)["attempt"]
    with pytest.raises(BadInput) as caught:
        flower.read_reply(record, 4)
    assert len(caught.value.faults) == 3


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_state_that_is_not_finite_is_refused(value: float) -> None:
    state = AdapterState(spec_of(ZEROS), ZEROS + np.float32(value))
    with pytest.raises(BadInput, match="not finite"):
        flower.read_plan(flower.plan_record("north", PLAN, state), state.spec)


def test_a_state_of_another_model_is_refused() -> None:
    state = AdapterState(spec_of(ZEROS), ZEROS)
    with pytest.raises(BadInput, match="expected 20 of"):
        flower.read_plan(
            flower.plan_record("north", PLAN, state), spec_of(np.zeros(5, dtype=np.float32))
        )


@pytest.mark.parametrize("clients", [["a", "a"], [1, 2], ["a\n"]])
def test_bad_consent(clients: list[object]) -> None:
    record = flower.consent_record([])
    fields(record)["clients"] = clients
    with pytest.raises(BadInput, match="consent clients"):
        flower.read_answer(record)
