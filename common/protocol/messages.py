"""What coordinator and institutions send each other in a deployment: signed, for any carrier.

    offer    coordinator -> node   the signed manifest, the projection that it names, and a signed
                                   address: to which institution this offer goes, and until when
    task     coordinator -> node   a signed plan, and the adapter that it starts from
    stage    coordinator -> node   one signed step of secure aggregation (common.protocol.stages)
    consent  node -> coordinator   what the node reserved, under which policy
    answer   node -> coordinator   the noised update
    staged   node -> coordinator   the node's own message of that step
    decline  node -> coordinator   why there is none

A message is a mark, a version, a kind and its parts, each behind its length as 8 bytes, big-endian.
Manifest, address and plan carry the coordinator's signature; a reply carries its institution's,
over federation, manifest, round, attempt, kind and body. So nobody between the two can change, swap
or reuse one, and a relay need not parse any.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedlora.common.errors import BadInput, Refused
from fedlora.common.model.state import Vector
from fedlora.common.terminal import printable
from fedlora.common.trust.identity import Identity, PublicIdentity, Signed

REQUEST_VERSION = 2  # 2: an offer carries its address
REPLY_VERSION = 1
MARK = b"fedlora"
MAX_REQUEST_BYTES = MAX_REPLY_BYTES = 256 << 20
MAX_NAME = 200  # characters of an institution's or federation's name
MAX_REASON = 2_000  # characters of a decline
MAX_NUMBER = 1 << 31  # of a round or an attempt

MANIFEST_TAG = "fedlora-manifest-1"
OFFER_TAG = "fedlora-offer-1"
PLAN_TAG = "fedlora-plan-1"
STAGE_TAG = "fedlora-stage-1"
REPLY_TAG = "fedlora-reply-1"


@dataclass(frozen=True)
class Offer:
    """A run's manifest, signed under MANIFEST_TAG, and its `Address`, signed under OFFER_TAG.

    `projection` is a safetensors file, or b"" where there is none.
    """

    manifest: Signed
    projection: bytes
    address: Signed


@dataclass(frozen=True)
class Address:
    """Whom an offer of `manifest` (a digest) is for; until when, in seconds of UTC since 1970."""

    manifest: str
    institution: str
    not_after: int

    def to_bytes(self) -> bytes:
        return _json(
            {
                "manifest": self.manifest,
                "institution": self.institution,
                "not_after": self.not_after,
            }
        )

    @classmethod
    def from_bytes(cls, body: bytes) -> Address:
        kinds = {"manifest": str, "institution": str, "not_after": int}
        return cls(**_table(body, "offer address", kinds))


@dataclass(frozen=True)
class Task:
    """One attempt at one round: the plan, signed under PLAN_TAG.

    `vector` is the adapter, little-endian float32.
    """

    manifest_digest: str
    plan: Signed
    vector: bytes


@dataclass(frozen=True)
class Stage:
    """One step of secure aggregation: a `stages.Request` as bytes, signed under STAGE_TAG."""

    request: Signed


@dataclass(frozen=True)
class Consent:
    """The node reserved (ε, δ) of its budget for the whole schedule of `manifest` (a digest)."""

    institution: str
    manifest: str
    policy_digest: str
    epsilon: float  # 0 where the run is not private
    delta: float


@dataclass(frozen=True)
class Answer:
    """The update of one attempt; `vector` is little-endian float32."""

    institution: str
    manifest: str
    round: int
    attempt: int
    vector: bytes


@dataclass(frozen=True)
class Staged:
    """The answer to a stage: a message of `secagg.wire`, which its node signed for the stage."""

    institution: str
    manifest: str
    round: int
    attempt: int
    message: bytes


@dataclass(frozen=True)
class Decline:
    """Why no consent (round and attempt 0) or no update. `refused`: asking again is vain."""

    institution: str
    manifest: str  # a digest, or "" where the request named none that could be read
    round: int
    attempt: int
    reason: str
    refused: bool


Request = Offer | Task | Stage
Reply = Consent | Answer | Staged | Decline


def request_to_bytes(request: Request) -> bytes:
    if isinstance(request, Offer):
        parts = (request.manifest.to_bytes(), request.projection, request.address.to_bytes())
        return _joined(REQUEST_VERSION, b"offer", *parts)
    if isinstance(request, Task):
        parts = (request.manifest_digest.encode(), request.plan.to_bytes(), request.vector)
        return _joined(REQUEST_VERSION, b"task", *parts)
    if isinstance(request, Stage):
        return _joined(REQUEST_VERSION, b"stage", request.request.to_bytes())
    raise TypeError(f"{type(request).__name__} is no request")


def request_from_bytes(data: bytes, limit: int = MAX_REQUEST_BYTES) -> Request:
    """BadInput unless `data` is one request of this version; who opens it checks signatures."""
    kind, parts = _split(data, "request", REQUEST_VERSION, limit)
    if kind == "offer":
        manifest, projection, address = _exactly(parts, 3, "offer")
        return Offer(
            Signed.from_bytes(manifest, "offer manifest"),
            projection,
            Signed.from_bytes(address, "offer address"),
        )
    if kind == "task":
        digest, plan, vector = _exactly(parts, 3, "task")
        return Task(_line(digest, "task manifest"), Signed.from_bytes(plan, "task plan"), vector)
    if kind == "stage":
        return Stage(Signed.from_bytes(_exactly(parts, 1, "stage")[0], "stage request"))
    raise BadInput(f"request kind: found {kind!r}, expected offer, task or stage")


def reply_to_bytes(identity: Identity, federation: str, reply: Reply) -> bytes:
    """A reply that `identity` signs; every call for one reply gives the same bytes."""
    kind, (round_number, attempt), body = _described(reply)
    header = _header(federation, reply.manifest, round_number, attempt, kind, reply.institution)
    signature = identity.sign(REPLY_TAG, *header, body)
    return _joined(
        REPLY_VERSION, kind.encode(), *header[1:4], reply.institution.encode(), body, signature
    )


def reply_from_bytes(
    data: bytes,
    federation: str,
    members: Mapping[str, PublicIdentity],
    limit: int = MAX_REPLY_BYTES,
) -> Reply:
    """A member's reply; Refused where it did not sign it, BadInput where it is malformed."""
    kind, parts = _split(data, "reply", REPLY_VERSION, limit)
    if kind not in _READERS:
        raise BadInput(f"reply kind: found {kind!r}, expected one of {', '.join(_READERS)}")
    manifest, round_, attempt, name, body, signature = _exactly(parts, 6, kind)
    institution = _line(name, f"{kind} institution")
    member = members.get(institution)
    if member is None:
        raise Refused(f"{kind}: found the institution {institution!r}, which is not a member")
    member.verify(
        signature,
        REPLY_TAG,
        federation.encode(),
        manifest,
        round_,
        attempt,
        kind.encode(),
        name,
        body,
    )
    place = _Place(
        institution,
        _line(manifest, f"{kind} manifest", 0),
        _number(round_, kind),
        _number(attempt, kind),
    )
    return _READERS[kind](place, body)


def vector_to_bytes(vector: Vector) -> bytes:
    """Little-endian float32, without a header."""
    return vector.astype("<f4", copy=False).tobytes()


def vector_from_bytes(data: bytes, size: int, where: str) -> Vector:
    """The (size,) float32 vector, read-only; BadInput where length or a value is wrong."""
    if len(data) != 4 * size:
        raise BadInput(
            f"{where} vector: found {len(data)} bytes, expected {4 * size} for {size} coordinates"
        )
    vector = np.frombuffer(data, dtype="<f4").astype(np.float32, copy=False)
    if not np.isfinite(vector).all():
        raise BadInput(f"{where} vector: found a value that is not finite")
    return vector


def one_line(text: str) -> str:
    """Text from outside as one printable, bounded line: for logs, terminals and reports."""
    kept = printable(text[: MAX_REASON + 1])
    return kept if len(kept) <= MAX_REASON else kept[: MAX_REASON - 1] + "…"


@dataclass(frozen=True)
class _Place:
    """The fields that every reply has."""

    institution: str
    manifest: str
    round: int
    attempt: int


def _described(reply: Reply) -> tuple[str, tuple[int, int], bytes]:
    """Kind, (round, attempt) and body of a reply."""
    if isinstance(reply, Consent):
        body = {"policy": reply.policy_digest, "epsilon": reply.epsilon, "delta": reply.delta}
        return "consent", (0, 0), _json(body)
    if isinstance(reply, Answer):
        return "answer", (reply.round, reply.attempt), reply.vector
    if isinstance(reply, Staged):
        return "staged", (reply.round, reply.attempt), reply.message
    if isinstance(reply, Decline):
        body = {"reason": one_line(reply.reason), "refused": reply.refused}
        return "decline", (reply.round, reply.attempt), _json(body)
    raise TypeError(f"{type(reply).__name__} is no reply")


def _read_consent(place: _Place, body: bytes) -> Consent:
    table = _table(body, "consent", {"policy": str, "epsilon": float, "delta": float})
    if (place.round, place.attempt) != (0, 0):
        raise BadInput(
            f"consent: found round {place.round} attempt {place.attempt}, expected 0 and 0"
        )
    for name in ("epsilon", "delta"):
        if not (math.isfinite(table[name]) and table[name] >= 0):
            raise BadInput(f"consent {name}: found {table[name]}, expected a finite number >= 0")
    policy = one_line(table["policy"])
    return Consent(place.institution, place.manifest, policy, table["epsilon"], table["delta"])


def _read_answer(place: _Place, body: bytes) -> Answer:
    return Answer(place.institution, place.manifest, place.round, place.attempt, body)


def _read_staged(place: _Place, body: bytes) -> Staged:
    return Staged(place.institution, place.manifest, place.round, place.attempt, body)


def _read_decline(place: _Place, body: bytes) -> Decline:
    table = _table(body, "decline", {"reason": str, "refused": bool})
    reason = one_line(table["reason"])
    return Decline(
        place.institution, place.manifest, place.round, place.attempt, reason, table["refused"]
    )


_READERS: dict[str, Callable[[_Place, bytes], Reply]] = {
    "consent": _read_consent,
    "answer": _read_answer,
    "staged": _read_staged,
    "decline": _read_decline,
}


def _header(
    federation: str, manifest: str, round_number: int, attempt: int, kind: str, institution: str
) -> tuple[bytes, ...]:
    numbers = (struct.pack(">Q", round_number), struct.pack(">Q", attempt))
    return (federation.encode(), manifest.encode(), *numbers, kind.encode(), institution.encode())


def _joined(version: int, *parts: bytes) -> bytes:
    framed = b"".join(struct.pack(">Q", len(part)) + part for part in parts)
    return MARK + struct.pack(">H", version) + framed


def _split(data: bytes, where: str, expected: int, limit: int) -> tuple[str, list[bytes]]:
    """Kind and parts; nothing is copied before every length is known to lie within `data`."""
    if len(data) > limit:
        raise BadInput(f"{where}: found {len(data)} bytes, expected at most {limit}")
    start = len(MARK) + 2
    if len(data) < start or data[: len(MARK)] != MARK:
        raise BadInput(f"{where}: found bytes that are no message of this protocol")
    (version,) = struct.unpack(">H", data[len(MARK) : start])
    if version != expected:
        raise BadInput(f"{where} version: found {version}, expected {expected}")
    parts: list[bytes] = []
    while start < len(data):
        if len(parts) > 16 or len(data) - start < 8:
            raise BadInput(f"{where}: found {len(data) - start} bytes too many")
        (length,) = struct.unpack(">Q", data[start : start + 8])
        start += 8
        if length > len(data) - start:
            raise BadInput(
                f"{where}: found a part of {length} bytes, but {len(data) - start} are left"
            )
        parts.append(data[start : start + length])
        start += length
    if not parts:
        raise BadInput(f"{where}: found no kind")
    return _line(parts[0], f"{where} kind"), parts[1:]


def _exactly(parts: list[bytes], count: int, where: str) -> list[bytes]:
    if len(parts) != count:
        raise BadInput(f"{where}: found {len(parts)} parts, expected {count}")
    return parts


def _line(data: bytes, where: str, shortest: int = 1) -> str:
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise BadInput(f"{where}: found bytes that are not UTF-8") from error
    if not shortest <= len(text) <= MAX_NAME or not text.isprintable():
        raise BadInput(f"{where}: expected {shortest} to {MAX_NAME} printable characters")
    return text


def _number(data: bytes, where: str) -> int:
    number = int.from_bytes(data, "big")
    if len(data) != 8 or number > MAX_NUMBER:
        raise BadInput(f"{where}: found a round or attempt that is no number up to {MAX_NUMBER}")
    return number


def _json(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _table(body: bytes, where: str, kinds: Mapping[str, type]) -> dict[str, Any]:
    try:
        table = json.loads(body) if len(body) <= 1 << 16 else None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{where}: found a body that is not JSON") from error
    if not isinstance(table, dict) or set(table) != set(kinds):
        raise BadInput(f"{where}: found another body than {', '.join(kinds)}")
    for name, kind in kinds.items():
        value = table[name]
        if type(value) is int and abs(value) >= 1 << 63:
            raise BadInput(f"{where} {name}: found a number out of range")
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise BadInput(
                f"{where} {name}: found {type(value).__name__}, expected {kind.__name__}"
            )
        table[name] = value
    return table
