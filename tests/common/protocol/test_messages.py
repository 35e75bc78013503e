"""Messages survive the way there and back, and nothing that was changed on the way is believed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.common.errors import BadInput, FedloraError, Refused
from fedlora.common.protocol.messages import (
    MANIFEST_TAG,
    OFFER_TAG,
    PLAN_TAG,
    Address,
    Answer,
    Consent,
    Decline,
    Offer,
    Reply,
    Request,
    Task,
    reply_from_bytes,
    reply_to_bytes,
    request_from_bytes,
    request_to_bytes,
    vector_from_bytes,
    vector_to_bytes,
)
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
ANSWER = Answer("north", DIGEST, 3, 5, bytes(range(8)))
CONSENT = Consent("north", DIGEST, "sha256:p", 1.5, 1e-5)
DECLINE = Decline("north", "", 0, 0, "no\nway", True)

numbers = st.integers(0, 2**31)
replies: st.SearchStrategy[Reply] = st.one_of(
    st.builds(Answer, st.just("north"), st.just(DIGEST), numbers, numbers, st.binary(max_size=64)),
    st.builds(
        Consent, st.just("north"), st.just(DIGEST), st.just("p"), st.floats(0, 1e6), st.floats(0, 1)
    ),
    st.builds(
        Decline, st.just("north"), st.just(DIGEST), numbers, numbers, st.just("why"), st.booleans()
    ),
)


@pytest.mark.parametrize("request_", [OFFER, TASK])
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


@given(replies)
def test_replies_come_back_as_they_went(reply: Reply) -> None:
    data = reply_to_bytes(NORTH, "f", reply)
    assert data == reply_to_bytes(NORTH, "f", reply)
    assert reply_from_bytes(data, "f", MEMBERS) == reply


def test_a_reason_is_one_printable_line() -> None:
    found = reply_from_bytes(reply_to_bytes(NORTH, "f", DECLINE), "f", MEMBERS)
    assert isinstance(found, Decline) and found.reason == "no way"


@pytest.mark.parametrize("reply", [ANSWER, CONSENT, DECLINE])
def test_every_flipped_byte_of_a_reply_is_noticed(reply: Reply) -> None:
    data = reply_to_bytes(NORTH, "f", reply)
    for place in range(len(data)):
        for bit in (1, 128):
            changed = data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :]
            with pytest.raises(FedloraError):
                reply_from_bytes(changed, "f", MEMBERS)


@given(st.sampled_from([request_to_bytes(OFFER), request_to_bytes(TASK)]), st.data())
def test_malformed_requests_are_bad_input(data: bytes, draw: st.DataObject) -> None:
    cut = draw.draw(st.integers(0, len(data) - 1))
    with pytest.raises(BadInput):
        request_from_bytes(data[:cut])
    with pytest.raises(BadInput):
        request_from_bytes(data + draw.draw(st.binary(min_size=1, max_size=20)))


@given(st.binary(max_size=200))
def test_noise_is_bad_input(noise: bytes) -> None:
    for data in (noise, b"fedlora\x00\x02" + noise):
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
        with pytest.raises(BadInput, match="version: found 9, expected 2"):
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
