"""One opaque message of a federation as a Flower record, and back.

Whoever carries it parses nothing: `common.protocol.messages` does, at both ends.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from flwr.app import ConfigRecord, RecordDict

from fedlora.common.codec.strict import build
from fedlora.common.config.toml import Pattern
from fedlora.common.errors import BadInput
from fedlora.common.terminal import one_line

WIRE_VERSION = 1
FIELDS = "fedlora"  # the record's only part
KIND = Pattern(r"[a-z]{1,20}", "1 to 20 small letters")


@dataclass(frozen=True)
class _Envelope:
    envelope: str = field(metadata={"rule": KIND})
    data: bytes


def envelope_record(kind: str, data: bytes) -> RecordDict:
    """A record that carries `data` as it is; `kind` says to its reader what to expect."""
    fields = {"kind": "envelope", "version": WIRE_VERSION, "envelope": kind, "data": data}
    return RecordDict({FIELDS: ConfigRecord(fields)})  # type: ignore[arg-type]


def read_envelope(record: RecordDict, limit: int) -> tuple[str, bytes]:
    """Kind and bytes; BadInput unless the record is exactly one envelope of at most `limit` bytes.

    Every missing, extra or mistyped part is named in one BadInput.
    """
    fields = record.get(FIELDS)
    if not isinstance(fields, ConfigRecord):
        raise BadInput(f"message: found no record {FIELDS!r}")
    table: dict[str, object] = dict(fields.items())
    version, kind = table.pop("version", None), table.pop("kind", None)
    if type(version) is not int or version != WIRE_VERSION:  # bool is not int
        raise BadInput(f"message version: found {one_line(repr(version))}, expected {WIRE_VERSION}")
    if kind != "envelope":
        raise BadInput(f"message kind: found {one_line(repr(kind))}, expected 'envelope'")
    extra = [one_line(name) for name in record if name != FIELDS]
    if extra:
        raise BadInput([f"envelope: found an extra record {name!r}" for name in extra])
    found = build(_Envelope, table, "envelope")
    if len(found.data) > limit:
        raise BadInput(f"envelope: found more than {limit} bytes")
    return found.envelope, found.data
