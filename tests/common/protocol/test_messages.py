"""Messages survive the way there and back, and nothing that was changed on the way is believed."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.common.codec.framing import framed
from fedlora.common.errors import BadInput, FedloraError, Refused
from fedlora.common.protocol.consent import Party, Start
from fedlora.common.protocol.messages import (
    MANIFEST_TAG,
    OFFER_TAG,
    PLAN_TAG,
    REPLY_TAG,
    STAGE_TAG,
    START_TAG,
    Address,
    Answer,
    Consent,
    Decline,
    Offer,
    Reply,
    Request,
    SignedStage,
    SignedStart,
    Staged,
    Started,
    Task,
    reply_from_bytes,
    reply_to_bytes,
    request_from_bytes,
    request_to_bytes,
)
from fedlora.common.protocol.pieces import PARTS_TAG, Coming, Fetch, Part, Parted, Piece, Taken
from fedlora.common.protocol.vector_parts import listed
from fedlora.common.protocol.vectors import vector_from_bytes, vector_to_bytes
from fedlora.common.trust.identity import Identity, Signed

COORDINATOR, NORTH, SOUTH = Identity.generate(), Identity.generate(), Identity.generate()
MEMBERS = {"north": NORTH.public, "south": SOUTH.public}
DIGEST = "sha256:" + "1" * 64
ADDRESS = Address(DIGEST, "north", 1_900_000_000)
OFFER = Offer(
    Signed.by(COORDINATOR, MANIFEST_TAG, b"{}"),
    b"projection",
    Signed.by(COORDINATOR, OFFER_TAG, ADDRESS.to_bytes()),
)
TASK = Task(DIGEST, Signed.by(COORDINATOR, PLAN_TAG, b"{}"), bytes(8))
STAGE = SignedStage(Signed.by(COORDINATOR, STAGE_TAG, b"request"))
PARTS = listed([b"part"])
COMING = Coming(DIGEST, DIGEST, PARTS)
PIECE = Piece(Signed.by(COORDINATOR, PARTS_TAG, COMING.to_bytes()), 0, b"part")
FETCH = Fetch(Signed.by(COORDINATOR, PLAN_TAG, b"{}"), 3)
BODY = Start(DIGEST, (Party("north", DIGEST), Party("south", DIGEST)))
START = SignedStart(Signed.by(COORDINATOR, START_TAG, BODY.to_bytes()))
ANSWER = Answer("north", DIGEST, 3, 5, bytes(range(8)))
CONSENT = Consent("north", DIGEST, "sha256:p", 1.5, 1e-5)
STARTED = Started("north", DIGEST, "sha256:p", 1.5, 1e-5, DIGEST)
DECLINE = Decline("north", "", 0, 0, "no\nway", True)
TAKEN = Taken("north", DIGEST, 3)
PARTED = Parted("north", DIGEST, 3, 5, PARTS)
PART = Part("north", DIGEST, 3, 5, b"part")

numbers = st.integers(0, 2**31)
replies: st.SearchStrategy[Reply] = st.one_of(
    st.builds(Answer, st.just("north"), st.just(DIGEST), numbers, numbers, st.binary(max_size=64)),
    st.builds(Staged, st.just("north"), st.just(DIGEST), numbers, numbers, st.binary(max_size=64)),
    st.builds(
        Consent, st.just("north"), st.just(DIGEST), st.just("p"), st.floats(0, 1e6), st.floats(0, 1)
    ),
    st.builds(
        Started,
        st.just("north"),
        st.just(DIGEST),
        st.just("p"),
        st.floats(0, 1e6),
        st.floats(0, 1),
        st.just(DIGEST),
    ),
    st.builds(Taken, st.just("north"), st.just(DIGEST), st.integers(0, 1 << 16)),
    st.builds(Parted, st.just("north"), st.just(DIGEST), numbers, numbers, st.just(PARTS)),
    st.builds(Part, st.just("north"), st.just(DIGEST), numbers, numbers, st.binary(max_size=64)),
    st.builds(
        Decline, st.just("north"), st.just(DIGEST), numbers, numbers, st.just("why"), st.booleans()
    ),
)


@pytest.mark.parametrize("request_", [OFFER, START, TASK, STAGE, PIECE, FETCH])
def test_requests_come_back_as_they_went(request_: Request) -> None:
    assert request_from_bytes(request_to_bytes(request_)) == request_


@pytest.mark.parametrize(
    "body",
    [
        b"{}",
        b'{"institution":1,"manifest":"m","not_after":1}',
        ADDRESS.to_bytes().replace(b"19", b"1e9"),
    ],
)
def test_an_address_is_whole(body: bytes) -> None:
    assert Address.from_bytes(ADDRESS.to_bytes()) == ADDRESS
    with pytest.raises(BadInput, match="offer address"):
        Address.from_bytes(body)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"{}", "start cohort: missing"),
        (BODY.to_bytes().replace(b"sha256:1", b"sha256:x"), "expected .sha256:. and 64"),
        (BODY.to_bytes().replace(b"sha256:1", b"sha256:../1"), "expected .sha256:. and 64"),
        (BODY.to_bytes().replace(b"south", b"north"), "expected each name once"),
        (BODY.to_bytes().replace(b"south", b"east"), "expected each name once"),
        (BODY.to_bytes() + b" ", "another spelling"),
    ],
)
def test_a_start_is_whole(body: bytes, said: str) -> None:
    assert Start.from_bytes(BODY.to_bytes()) == BODY
    with pytest.raises(BadInput, match=said):
        Start.from_bytes(body)


@given(replies)
def test_replies_come_back_as_they_went(reply: Reply) -> None:
    data = reply_to_bytes(NORTH, "f", reply)
    assert data == reply_to_bytes(NORTH, "f", reply)
    assert reply_from_bytes(data, "f", MEMBERS) == reply


@given(st.sampled_from([OFFER, START, TASK, STAGE, PIECE, FETCH]), st.data())
def test_a_request_that_is_accepted_has_these_bytes(request_: Request, draw: st.DataObject) -> None:
    data = bytearray(request_to_bytes(request_))
    data[draw.draw(st.integers(0, len(data) - 1))] ^= draw.draw(st.integers(1, 255))
    try:
        found = request_from_bytes(bytes(data))
    except BadInput:
        return
    assert request_to_bytes(found) == data


def signed_reply(
    kind: str, round_: int, attempt: int, body: bytes, manifest: str = DIGEST
) -> bytes:
    """What an institution may sign that follows no rule but the frame's."""
    place = (manifest.encode(), struct.pack(">Q", round_), struct.pack(">Q", attempt))
    signature = NORTH.sign(REPLY_TAG, b"f", *place, kind.encode(), b"north", body)
    return b"fedlora\x00\x01" + framed(kind, *place, b"north", body, signature)


BODIES = st.one_of(
    st.binary(max_size=20),
    st.sampled_from(
        [
            b'{"reason":"no","refused":true}',
            b'{"reason":"no","refused":1}',
            b'{"reason": "no", "refused": true}',
            b'{"refused":true,"reason":"no"}',
            b'{"reason":"no","reason":"no","refused":true}',
            b'{"reason":"two\\nlines","refused":true}',
            b'{"reason":"\\u03b5","refused":true}',
            '{"reason":"ε","refused":true}'.encode(),
            b'{"reason":"\\ud800","refused":true}',
            b'{"delta":0.1,"epsilon":1.0,"policy":"p"}',
            b'{"delta":0.1,"epsilon":1,"policy":"p"}',
            b'{"delta":0.10,"epsilon":1.0,"policy":"p"}',
            b'{"delta":-0.1,"epsilon":1.0,"policy":"p"}',
            b'{"delta":NaN,"epsilon":1.0,"policy":"p"}',
            b'{"delta":0.1,"epsilon":1e999,"policy":"p"}',
            b'{"delta":0.1,"epsilon":1.0,"policy":"p\\n"}',
            b'{"delta":0.1,"epsilon":1.0,"policy":"p","more":1}',
            b'{"delta":0.1,"epsilon":1.0,"policy":"p","start":"s"}',
            b'{"delta":0.1,"epsilon":1.0,"policy":"p","start":"s\n"}',
        ]
    ),
)
KINDS = ("consent", "started", "answer", "staged", "decline", "bid")


@given(st.sampled_from(KINDS), st.sampled_from([0, 3, 1 << 31, 1 << 32]), st.booleans(), BODIES)
def test_a_reply_that_is_accepted_has_these_bytes(
    kind: str, round_: int, begun: bool, body: bytes
) -> None:
    data = signed_reply(kind, round_, int(begun), body)
    try:
        found = reply_from_bytes(data, "f", MEMBERS)
    except FedloraError as error:
        assert type(error) is BadInput and all(each.isprintable() for each in error.faults)
        return
    assert reply_to_bytes(NORTH, "f", found) == data


@pytest.mark.parametrize(
    ("kind", "body", "said"),
    [
        ("decline", b'{"reason":"two\\nlines","refused":true}', "decline reason: expected one pri"),
        ("decline", b'{"reason": "no","refused":true}', "decline: found another spelling"),
        ("decline", b'{"reason":"no"}', "decline refused: missing"),
        (
            "consent",
            b'{"delta":0.1,"epsilon":-1,"policy":"p"}',
            "consent epsilon: expected a finite",
        ),
        ("consent", b'{"delta":0.1,"epsilon":1,"policy":"p"}', "consent: found another spelling"),
        ("bid", b"", "reply kind: found 'bid', expected one of consent, started, answer, sta"),
    ],
)
def test_what_is_signed_and_wrong_is_named(kind: str, body: bytes, said: str) -> None:
    with pytest.raises(BadInput, match=said):
        reply_from_bytes(signed_reply(kind, 0, 0, body), "f", MEMBERS)


def test_a_reason_is_one_printable_line() -> None:
    found = reply_from_bytes(reply_to_bytes(NORTH, "f", DECLINE), "f", MEMBERS)
    assert isinstance(found, Decline) and found.reason == "no way"


@pytest.mark.parametrize("reply", [ANSWER, CONSENT, STARTED, DECLINE, TAKEN, PARTED, PART])
def test_every_flipped_byte_of_a_reply_is_noticed(reply: Reply) -> None:
    data = reply_to_bytes(NORTH, "f", reply)
    for place in range(len(data)):
        for bit in (1, 128):
            changed = data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :]
            with pytest.raises(FedloraError):
                reply_from_bytes(changed, "f", MEMBERS)


@given(st.sampled_from([request_to_bytes(each) for each in (OFFER, START, TASK, PIECE)]), st.data())
def test_malformed_requests_are_bad_input(data: bytes, draw: st.DataObject) -> None:
    cut = draw.draw(st.integers(0, len(data) - 1))
    with pytest.raises(BadInput):
        request_from_bytes(data[:cut])
    with pytest.raises(BadInput):
        request_from_bytes(data + draw.draw(st.binary(min_size=1, max_size=20)))


@given(st.binary(max_size=200))
def test_noise_is_bad_input(noise: bytes) -> None:
    for data in (noise, b"fedlora\x00\x03" + noise):
        with pytest.raises(BadInput):
            request_from_bytes(data)


@pytest.mark.parametrize("name", ["south", "east"])
def test_a_reply_in_another_name_is_refused(name: str) -> None:  # msg-wrong-sender
    data = reply_to_bytes(NORTH, "f", Answer(name, DIGEST, 1, 1, b""))
    with pytest.raises(Refused, match=r"signature|not a member"):
        reply_from_bytes(data, "f", MEMBERS)


def test_a_reply_to_another_federation_is_refused() -> None:
    with pytest.raises(Refused, match="signature"):
        reply_from_bytes(reply_to_bytes(NORTH, "g", ANSWER), "f", MEMBERS)


@pytest.mark.parametrize("id_", ["msg-oversize", "wire-version"])
def test_sizes_and_versions_are_checked_first(id_: str) -> None:
    data = request_to_bytes(TASK)
    if id_ == "msg-oversize":
        with pytest.raises(BadInput, match="at most 10"):
            request_from_bytes(data, limit=10)
    else:
        with pytest.raises(BadInput, match="version: found 9, expected 3"):
            request_from_bytes(data[:8] + b"\x09" + data[9:])


@pytest.mark.parametrize("size", [1, 3], ids=["vec-short", "vec-long"])
def test_vectors_have_the_length_of_the_adapter(size: int) -> None:
    data = vector_to_bytes(np.arange(2, dtype=np.float32))
    assert vector_from_bytes(data, 2, "task").tolist() == [0, 1]
    with pytest.raises(BadInput, match=f"expected {4 * size}"):
        vector_from_bytes(data, size, "task")


def test_vectors_are_finite() -> None:
    with pytest.raises(BadInput, match="not finite"):
        vector_from_bytes(np.array([np.nan], dtype="<f4").tobytes(), 1, "task")
