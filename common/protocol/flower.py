"""The project's messages as Flower records, and back: checked here before they are believed.

    offer    coordinator -> node   the run's manifest
    consent  node -> coordinator   the clients that this node answers for and that consented
    plan     coordinator -> node   one round for one client, with the adapter that it starts from
    update   node -> coordinator   that client's delta
    refusal  node -> coordinator   why there is none: one line that a person can act on

A vector travels as little-endian float32 without a header. Flower's own array format is NumPy's
file format, which is never opened on bytes from outside (`np.load` also reads archives that unpack
to any size).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedlora.common.codec.strict import build
from fedlora.common.config.toml import Each
from fedlora.common.errors import BadInput, FedloraError, Refused
from fedlora.common.manifest.manifest import RunManifest
from fedlora.common.manifest.plan import RoundPlan, Update
from fedlora.common.model.state import AdapterSpec, AdapterState, Vector
from fedlora.common.terminal import one_line

WIRE_VERSION = 1
MAX_CLIENTS = 1_000_000  # of one node
MAX_NAME = 200  # characters of a client's name

FIELDS = "fedlora"  # the message's config record
ARRAYS = "fedlora.arrays"  # its array record, where it carries a vector
VECTOR = "vector"
LITTLE_ENDIAN = "fedlora.f4"  # serialisation type of our arrays

T = TypeVar("T")


class _Name:
    """A client's name, or a digest."""

    def expected(self, noun: str) -> str:
        return f"a printable name of 1 to {MAX_NAME} characters"

    def fault(self, value: str, noun: str) -> str:
        fits = 0 < len(value) <= MAX_NAME and value.isprintable()
        return "" if fits else f"expected {self.expected(noun)}"


NAME = {"rule": _Name()}


@dataclass(frozen=True)
class Task:
    """A plan as a node receives it: for which of its clients, and from which state."""

    client: str
    plan: RoundPlan
    state: AdapterState


@dataclass(frozen=True)
class Refusal:
    """A client's answer without an update. `refused`: by policy or budget, asking again is vain."""

    client: str = field(metadata=NAME)
    reason: str
    refused: bool


@dataclass(frozen=True)
class _Offer:
    manifest: bytes


@dataclass(frozen=True)
class _Consent:
    clients: tuple[str, ...] = field(metadata={"rule": Each(_Name())})


@dataclass(frozen=True)
class _Plan:
    client: str = field(metadata=NAME)
    plan: bytes


@dataclass(frozen=True)
class _Update:
    client: str = field(metadata=NAME)
    manifest: str = field(metadata=NAME)
    round: int
    attempt: int


@dataclass(frozen=True)
class _Envelope:
    envelope: str = field(metadata=NAME)
    data: bytes


def offer_record(manifest: RunManifest) -> RecordDict:
    return _record("offer", {"manifest": manifest.to_bytes()})


def read_offer(record: RecordDict) -> RunManifest:
    """BadInput unless the record is exactly an offer with a well-formed manifest."""
    return RunManifest.from_bytes(_fields(record, "offer", _Offer).manifest)


def consent_record(clients: Sequence[str]) -> RecordDict:
    return _record("consent", {"clients": list(clients)})


def read_consent(record: RecordDict) -> tuple[str, ...]:
    """The names, all different; BadInput otherwise."""
    names = _fields(record, "consent", _Consent).clients
    if len(names) > MAX_CLIENTS:
        raise BadInput(f"consent clients: expected a list of at most {MAX_CLIENTS} names")
    return names


def plan_record(client: str, plan: RoundPlan, state: AdapterState) -> RecordDict:
    ((_, record),) = plan_records([client], plan, state)
    return record


def plan_records(
    clients: Sequence[str], plan: RoundPlan, state: AdapterState
) -> Iterator[tuple[str, RecordDict]]:
    """One message for each client; all share the bytes of one vector."""
    arrays = _arrays(state.vector)
    for client in clients:
        record = _record("plan", {"client": client, "plan": plan.to_bytes()})
        record[ARRAYS] = arrays
        yield client, record


def read_plan(record: RecordDict, spec: AdapterSpec) -> Task:
    """BadInput unless the record is exactly a plan and `spec.size` finite coordinates."""
    fields = _fields(record, "plan", _Plan, vector=True)
    vector = _vector(record, spec.size, "plan")
    if not np.isfinite(vector).all():
        raise BadInput("plan vector: found a value that is not finite")
    return Task(fields.client, RoundPlan.from_bytes(fields.plan), AdapterState(spec, vector))


def update_record(update: Update) -> RecordDict:
    values: dict[str, object] = {
        "client": update.client,
        "manifest": update.manifest,
        "round": update.round,
        "attempt": update.attempt,
    }
    record = _record("update", values)
    record[ARRAYS] = _arrays(update.delta)
    return record


def refusal_record(client: str, error: FedloraError) -> RecordDict:
    """Tell the coordinator why, on one line."""
    values = {
        "client": client,
        "reason": one_line(str(error)),
        "refused": isinstance(error, Refused),
    }
    return _record("refusal", values)


def read_reply(record: RecordDict, size: int) -> Update | Refusal:
    """An update of `size` coordinates or a refusal; BadInput for anything else.

    The values of an update are not judged here: `Update.check` does that against the plan.
    """
    kind = _kind(record)
    if kind == "refusal":
        refusal = _fields(record, "refusal", Refusal)
        return replace(refusal, reason=one_line(refusal.reason))
    fields = _fields(record, "update", _Update, vector=True)
    vector = _vector(record, size, f"update of {fields.client}")
    return Update(fields.client, fields.manifest, fields.round, fields.attempt, vector)


def read_answer(record: RecordDict) -> tuple[str, ...]:
    """The clients of a consent; a refusal is raised as Refused with its reason."""
    if _kind(record) == "refusal":
        refusal = read_reply(record, 0)
        raise Refused(refusal.reason if isinstance(refusal, Refusal) else "refused")
    return read_consent(record)


def envelope_record(kind: str, data: bytes) -> RecordDict:
    """One opaque message of a deployment: only `common.protocol.messages` parses it."""
    return _record("envelope", {"envelope": kind, "data": data})


def read_envelope(record: RecordDict, limit: int) -> tuple[str, bytes]:
    """Kind and bytes; BadInput unless exactly an envelope of at most `limit` bytes."""
    fields = _fields(record, "envelope", _Envelope)
    if len(fields.data) > limit:
        raise BadInput(f"envelope: found more than {limit} bytes")
    return fields.envelope, fields.data


def _record(kind: str, values: Mapping[str, object]) -> RecordDict:
    fields = ConfigRecord({"kind": kind, "version": WIRE_VERSION, **values})  # type: ignore[dict-item]
    return RecordDict({FIELDS: fields})


def _arrays(vector: Vector) -> ArrayRecord:
    data = vector.astype("<f4", copy=False).tobytes()
    return ArrayRecord({VECTOR: Array("float32", vector.shape, LITTLE_ENDIAN, data)})


def _kind(record: RecordDict) -> str:
    """Kind of a message, after its version."""
    fields = record.get(FIELDS)
    if not isinstance(fields, ConfigRecord):
        raise BadInput(f"message: found no record {FIELDS!r}")
    version = fields.get("version")
    if type(version) is not int or version != WIRE_VERSION:
        raise BadInput(f"message version: found {one_line(repr(version))}, expected {WIRE_VERSION}")
    return str(fields.get("kind"))


def _fields(record: RecordDict, kind: str, cls: type[T], *, vector: bool = False) -> T:
    """The values of a message of this kind; every part that is not what it must be is named."""
    found = _kind(record)
    if found != kind:
        raise BadInput(f"message kind: found {one_line(repr(found))}, expected {kind!r}")
    table: dict[str, object] = dict(record[FIELDS].items())
    del table["kind"], table["version"]
    parts = {FIELDS, ARRAYS} if vector else {FIELDS}
    extra = [name for name in record if name not in parts]
    if extra:
        raise BadInput([f"{kind}: found an extra record {one_line(name)!r}" for name in extra])
    return build(cls, table, kind)


def _vector(record: RecordDict, size: int, where: str) -> Vector:
    """The (size,) float32 vector of a message, read-only and without a copy."""
    arrays = record.get(ARRAYS)
    if not isinstance(arrays, ArrayRecord) or set(arrays) != {VECTOR}:
        raise BadInput(f"{where}: found no record {ARRAYS!r} with exactly the array {VECTOR!r}")
    array = arrays[VECTOR]
    if array.stype != LITTLE_ENDIAN or array.dtype != "float32":
        found = one_line(f"{array.dtype} as {array.stype}")
        raise BadInput(f"{where} vector: found {found}, expected float32 as {LITTLE_ENDIAN}")
    if len(array.data) != 4 * size or tuple(array.shape) != (size,):
        raise BadInput(
            f"{where} vector: found {len(array.data)} bytes of shape {one_line(str(array.shape))}, "
            f"expected {4 * size} of ({size},)"
        )
    return np.frombuffer(array.data, dtype="<f4").astype(np.float32, copy=False)
