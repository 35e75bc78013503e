"""An envelope survives the trip as Flower's own bytes, and nothing else is taken for one."""

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

from fedlora.common.errors import BadInput
from fedlora.common.protocol import flower

LIMIT = 100


def over_the_wire(record: RecordDict) -> RecordDict:
    proto = Proto.FromString(recorddict_to_proto(record).SerializeToString())
    return recorddict_from_proto(proto)


@given(st.from_regex(r"[a-z]{1,20}", fullmatch=True), st.binary(max_size=LIMIT))
def test_round_trip(kind: str, data: bytes) -> None:
    record = over_the_wire(flower.envelope_record(kind, data))
    assert flower.read_envelope(record, LIMIT) == (kind, data)


def good() -> RecordDict:
    return flower.envelope_record("request", bytes(LIMIT))


def fields(record: RecordDict) -> dict[str, object]:
    """The message's config record, to be spoilt."""
    return cast("dict[str, object]", record[flower.FIELDS])


def put(**values: object) -> Callable[[RecordDict], object]:
    return lambda record: fields(record).update(values)


ARRAYS = ArrayRecord({"vector": Array(np.zeros(4, dtype=np.float32))})
BAD: dict[str, tuple[Callable[[RecordDict], object], str]] = {
    "wrong-kind": (put(kind="plan"), "message kind: found 'plan', expected 'envelope'"),
    "wrong-version": (put(version=2), "message version: found 2, expected 1"),
    "version-bool": (put(version=True), "message version: found True"),
    "no-fields": (lambda record: record.pop(flower.FIELDS), "found no record 'fedlora'"),
    "other-fields": (lambda record: record.update({flower.FIELDS: ARRAYS}), "found no record"),
    "missing-field": (lambda record: fields(record).pop("data"), "envelope data: missing"),
    "unknown-field": (put(weight=9.0), "envelope weight: unknown field"),
    "unprintable-field": (lambda record: fields(record).update({"a\x1b[2J": 1}), "unknown field"),
    "mistyped-field": (put(data="3"), "envelope data: found str, expected bytes"),
    "empty-name": (put(envelope=""), "envelope envelope: expected 1 to 20 small letters"),
    "unprintable-name": (put(envelope="a\x1b[2J"), "envelope envelope: expected 1 to 20"),
    "long-name": (put(envelope="a" * 21), "envelope envelope: expected 1 to 20 small letters"),
    "extra-record": (
        lambda record: record.update({"more": ConfigRecord()}),
        "found an extra record 'more'",
    ),
    "arrays": (lambda record: record.update({"more": ARRAYS}), "found an extra record 'more'"),
    "msg-oversize": (put(data=bytes(LIMIT + 1)), "found more than 100 bytes"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_envelope(name: str) -> None:
    spoil, message = BAD[name]
    record = good()
    spoil(record)
    with pytest.raises(BadInput) as caught:
        flower.read_envelope(over_the_wire(record), LIMIT)
    assert any(message in fault for fault in caught.value.faults)
    assert all(fault.isprintable() for fault in caught.value.faults)


def test_all_faults_of_a_message_are_named_at_once() -> None:
    record = good()
    fields(record).update({"envelope": 3, "weight": 1.0})
    del fields(record)["data"]
    with pytest.raises(BadInput) as caught:
        flower.read_envelope(record, LIMIT)
    assert len(caught.value.faults) == 3
