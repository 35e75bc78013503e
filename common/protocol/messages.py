"""What coordinator and institutions send each other in a deployment: signed, for any carrier.

    offer    coordinator -> node   the signed manifest, the projection that it names, and a signed
                                   address: to which institution this offer goes, and until when
    start    coordinator -> node   who consented, signed: the run begins (common.protocol.consent)
    task     coordinator -> node   a signed plan, and the adapter that it starts from
    stage    coordinator -> node   one signed step of secure aggregation (common.protocol.stages)
    piece    coordinator -> node   a part of the adapter that a later task starts from
    fetch    coordinator -> node   which part of an answer to send (both: common.protocol.pieces)
    consent  node -> coordinator   what the node would reserve, under which policy
    started  node -> coordinator   that it is reserved now, for which start
    answer   node -> coordinator   the noised update
    staged   node -> coordinator   the node's own message of that step
    taken    node -> coordinator   how many parts of the adapter have come
    parted   node -> coordinator   in place of an answer or a staged one: the digests of its parts
    part     node -> coordinator   one of them
    decline  node -> coordinator   why there is none

A message is a mark, a version, and a frame (`common.codec.framing`) whose tag is its kind.
Manifest, address and plan carry the coordinator's signature; a reply carries its institution's,
over federation, manifest, round, attempt, kind and body. So nobody between the two can change, swap
or reuse one, and a relay need not parse any.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated

from fedlora.common.codec.framing import (
    Framed,
    Signature,
    Text,
    Whole,
    frame,
    kind_of,
    parts_of,
    unframe,
)
from fedlora.common.codec.strict import from_canonical, to_canonical
from fedlora.common.errors import BadInput, Refused
from fedlora.common.protocol.consent import Begun, Reason, Terms
from fedlora.common.protocol.pieces import Count, Fetch, Part, Parted, Piece, Taken
from fedlora.common.protocol.vector_parts import Parts
from fedlora.common.terminal import one_line
from fedlora.common.trust.identity import Identity, PublicIdentity, Signed

REQUEST_VERSION = 3  # 2: an offer carries its address; 3: a start follows the consents
REPLY_VERSION = 1
MARK = b"fedlora"
MAX_REQUEST_BYTES = MAX_REPLY_BYTES = 256 << 20
MAX_BODY_BYTES = 1 << 16  # of an address, a consent or a decline
MAX_LIST_BYTES = MAX_BODY_BYTES + (1 << 12)  # of a reply that lists parts
MAX_NAME = 200  # bytes of an institution's name or a digest
MAX_NUMBER = 1 << 31  # of a round or an attempt

MANIFEST_TAG = "fedlora-manifest-1"
OFFER_TAG = "fedlora-offer-1"
START_TAG = "fedlora-start-1"
PLAN_TAG = "fedlora-plan-1"
STAGE_TAG = "fedlora-stage-1"
REPLY_TAG = "fedlora-reply-1"

Line = Annotated[str, Text(1, MAX_NAME, line=True)]
Number = Annotated[int, Whole(MAX_NUMBER)]


@dataclass(frozen=True)
class Offer(Framed):
    """A run's manifest, signed under MANIFEST_TAG, and its `Address`, signed under OFFER_TAG.

    `projection` is a safetensors file, or b"" where there is none.
    """

    TAG = "offer"

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
        """Canonical JSON."""
        return to_canonical(self)

    @classmethod
    def from_bytes(cls, body: bytes) -> Address:
        """BadInput unless these are the canonical bytes of an address."""
        return from_canonical(cls, body, "offer address", MAX_BODY_BYTES)


@dataclass(frozen=True)
class SignedStart(Framed):
    """The start of a run: a `start.Start` as bytes, signed under START_TAG."""

    TAG = "start"

    start: Signed


@dataclass(frozen=True)
class Task(Framed):
    """One attempt at one round: the plan, signed under PLAN_TAG.

    `vector` is the adapter, little-endian float32; empty where it came in pieces.
    """

    TAG = "task"

    manifest_digest: Line
    plan: Signed
    vector: bytes


@dataclass(frozen=True)
class SignedStage(Framed):
    """One step of secure aggregation: a `stages.Request` as bytes, signed under STAGE_TAG."""

    TAG = "stage"

    request: Signed


@dataclass(frozen=True)
class Consent:
    """What the node reserves for the whole schedule of `manifest`, a digest, once it starts."""

    institution: str
    manifest: str
    policy_digest: str
    epsilon: float  # 0 where the run is not private
    delta: float
    # the node's ledger then: how many entries it had, and which one it was, under its own key; 0
    # and "" where an earlier version spoke
    height: int = field(default=0, kw_only=True)
    head: str = field(default="", kw_only=True)


@dataclass(frozen=True)
class Started(Consent):
    """It is reserved in the node's ledger now; `start` is the digest of the signed start."""

    start: str


@dataclass(frozen=True)
class Answer:
    """The update of one attempt; `vector` is in the manifest's wire (`common.protocol.vectors`)."""

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
    """Why no consent, no start (round and attempt 0) or no update. `refused`: asking is vain."""

    institution: str
    manifest: str  # a digest, or "" where the request named none that could be read
    round: int
    attempt: int
    reason: str
    refused: bool


Request = Offer | SignedStart | Task | SignedStage | Piece | Fetch
Reply = Consent | Started | Answer | Staged | Taken | Parted | Part | Decline
REQUESTS: Mapping[str, type[Request]] = {
    each.TAG: each for each in (Offer, SignedStart, Task, SignedStage, Piece, Fetch)
}
REPLIES = ("consent", "started", "answer", "staged", "taken", "parted", "part", "decline")


def request_to_bytes(request: Request) -> bytes:
    """Mark, version and frame."""
    return _marked(REQUEST_VERSION, request.to_bytes())


def request_from_bytes(data: bytes, limit: int = MAX_REQUEST_BYTES) -> Request:
    """BadInput unless `data` is exactly one request of this version.

    Signatures are checked by who opens them.
    """
    body = _unmarked(data, "request", REQUEST_VERSION, limit)
    return unframe(REQUESTS[_kind(body, "request", REQUESTS)], body)


def reply_to_bytes(identity: Identity, federation: str, reply: Reply) -> bytes:
    """A reply that `identity` signs; every call for one reply gives the same bytes."""
    kind, sent = _sent(reply)
    signature = identity.sign(REPLY_TAG, *sent.signed(federation, kind))
    return _marked(REPLY_VERSION, frame(replace(sent, signature=signature), kind))


def reply_from_bytes(
    data: bytes,
    federation: str,
    members: Mapping[str, PublicIdentity],
    limit: int = MAX_REPLY_BYTES,
) -> Reply:
    """A member's reply.

    Refused where the member named did not sign it, BadInput where it is malformed.
    """
    body = _unmarked(data, "reply", REPLY_VERSION, limit)
    kind = _kind(body, "reply", REPLIES)
    sent = unframe(_Sent, body, kind)
    member = members.get(sent.institution)
    if member is None:
        raise Refused(f"{kind}: found the institution {sent.institution!r}, which is not a member")
    member.verify(sent.signature, REPLY_TAG, *sent.signed(federation, kind))
    return _received(kind, sent)


@dataclass(frozen=True)
class _Sent:
    """What travels of any reply, in a frame whose tag is its kind."""

    manifest: Annotated[str, Text(0, MAX_NAME, line=True)]
    round: Number
    attempt: Number
    institution: Line
    body: bytes
    signature: Signature = b""

    def signed(self, federation: str, kind: str) -> tuple[bytes, ...]:
        manifest, round_, attempt, institution, body, _ = parts_of(self)
        return (federation.encode(), manifest, round_, attempt, kind.encode(), institution, body)


def _sent(reply: Reply) -> tuple[str, _Sent]:
    """A reply's kind, and what travels of it, unsigned."""
    if isinstance(reply, Consent):
        said = (reply.policy_digest, float(reply.epsilon), float(reply.delta))
        kind, terms = "consent", Terms(*said, height=reply.height, head=reply.head)
        if isinstance(reply, Started):
            kind, terms = "started", Begun(**asdict(terms), start=reply.start)
        return kind, _Sent(reply.manifest, 0, 0, reply.institution, to_canonical(terms))
    if isinstance(reply, Taken):
        return "taken", _Sent(
            reply.manifest, 0, 0, reply.institution, to_canonical(Count(reply.count))
        )
    if isinstance(reply, Answer):
        kind, body = "answer", reply.vector
    elif isinstance(reply, Staged):
        kind, body = "staged", reply.message
    elif isinstance(reply, Parted):
        kind, body = "parted", to_canonical(reply.parts)
    elif isinstance(reply, Part):
        kind, body = "part", reply.data
    else:
        kind, body = "decline", to_canonical(Reason(one_line(reply.reason), reply.refused))
    return kind, _Sent(reply.manifest, reply.round, reply.attempt, reply.institution, body)


def _received(kind: str, sent: _Sent) -> Reply:
    place = (sent.institution, sent.manifest, sent.round, sent.attempt)
    if kind == "answer":
        return Answer(*place, sent.body)
    if kind == "staged":
        return Staged(*place, sent.body)
    if kind == "part":
        return Part(*place, sent.body)
    if kind == "parted":
        return Parted(*place, from_canonical(Parts, sent.body, kind, MAX_BODY_BYTES))
    if kind == "decline":
        told = from_canonical(Reason, sent.body, kind, MAX_BODY_BYTES)
        return Decline(*place, told.reason, told.refused)
    if (sent.round, sent.attempt) != (0, 0):
        raise BadInput(f"{kind}: found round {sent.round} attempt {sent.attempt}, expected 0 and 0")
    if kind == "taken":
        return Taken(*place[:2], from_canonical(Count, sent.body, kind, MAX_BODY_BYTES).parts)
    terms = from_canonical(Begun if kind == "started" else Terms, sent.body, kind, MAX_BODY_BYTES)
    said = (sent.institution, sent.manifest, terms.policy, terms.epsilon, terms.delta)
    consent = Consent(*said, height=terms.height, head=terms.head)
    return Started(**asdict(consent), start=terms.start) if isinstance(terms, Begun) else consent


def parts_in(data: bytes) -> Parts | None:
    """The list of parts that a reply of one's own is; None where it is another reply."""
    body = _unmarked(data, "reply", REPLY_VERSION, MAX_REPLY_BYTES)
    if kind_of(body, "reply") != "parted":
        return None
    sent = unframe(_Sent, body, "parted")
    return from_canonical(Parts, sent.body, "parted", MAX_BODY_BYTES)


def _kind(body: memoryview, what: str, known: Mapping[str, object] | tuple[str, ...]) -> str:
    kind = kind_of(body, what)
    if kind not in known:
        raise BadInput(f"{what} kind: found {kind!r}, expected one of {', '.join(known)}")
    return kind


def _marked(version: int, body: bytes) -> bytes:
    return MARK + struct.pack(">H", version) + body


def _unmarked(data: bytes, where: str, expected: int, limit: int) -> memoryview:
    """What follows mark and version, not copied."""
    if len(data) > limit:
        raise BadInput(f"{where}: found {len(data)} bytes, expected at most {limit}")
    start = len(MARK) + 2
    if len(data) < start or data[: len(MARK)] != MARK:
        raise BadInput(f"{where}: found bytes that are no message of this protocol")
    version = int.from_bytes(data[len(MARK) : start], "big")
    if version != expected:
        raise BadInput(f"{where} version: found {version}, expected {expected}")
    return memoryview(data)[start:]
