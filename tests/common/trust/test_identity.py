"""Identities: what is signed stays what it is, and keys that others can read are refused."""

from __future__ import annotations

import base64
import hashlib
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.common.codec.framing import digest, framed
from fedlora.common.errors import BadInput, Refused
from fedlora.common.trust.identity import SMALL_ORDER, Identity, PublicIdentity, Signed

FORM = "ed25519: and 32 bytes in base64"
FIELDS = st.lists(st.binary(max_size=12), max_size=4)


@given(st.text(max_size=6), FIELDS, st.text(max_size=6), FIELDS)
def test_different_fields_never_frame_to_the_same_bytes(
    tag: str, fields: list[bytes], other: str, others: list[bytes]
) -> None:
    same = framed(tag, *fields) == framed(other, *others)
    assert same == ((tag, fields) == (other, others))
    assert digest(tag, *fields) == hashlib.sha256(framed(tag, *fields)).digest()


def test_a_signature_counts_for_its_tag_fields_and_key_only() -> None:
    identity, stranger = Identity.generate(), Identity.generate()
    signature = identity.sign("plan", b"a", b"bc")
    identity.public.verify(signature, "plan", b"a", b"bc")
    flipped = bytes([signature[0] ^ 1]) + signature[1:]
    for key, value, tag, fields in (
        (stranger.public, signature, "plan", (b"a", b"bc")),
        (identity.public, flipped, "plan", (b"a", b"bc")),
        (identity.public, signature, "manifest", (b"a", b"bc")),
        (identity.public, signature, "plan", (b"ab", b"c")),
        (identity.public, signature[:63], "plan", (b"a", b"bc")),
    ):
        with pytest.raises(Refused):
            key.verify(value, tag, *fields)


def test_a_key_file_is_private_and_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "identity.pem"
    identity = Identity.create(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert Identity.load(path).public == identity.public
    with pytest.raises(BadInput, match="found a key, expected none"):
        Identity.create(path)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644])
def test_key_file_readable_by_others(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "identity.pem"
    Identity.create(path)
    path.chmod(mode)
    with pytest.raises(Refused, match="expected mode 0600"):
        Identity.load(path)


def test_a_file_that_is_no_key(tmp_path: Path) -> None:
    path = tmp_path / "identity.pem"
    with pytest.raises(BadInput, match="found no readable file"):
        Identity.load(path)
    path.write_bytes(b"hello")
    path.chmod(0o600)
    with pytest.raises(BadInput, match="found no private key"):
        Identity.load(path)


def test_signed_documents_are_opened_by_the_expected_key_alone() -> None:
    identity, stranger = Identity.generate(), Identity.generate()
    document = Signed.from_bytes(Signed.by(identity, "manifest", b"body").to_bytes(), "message")
    assert document.opened("manifest", identity.public) == b"body"
    with pytest.raises(Refused):
        document.opened("manifest", stranger.public)
    with pytest.raises(Refused):
        document.opened("plan", identity.public)
    with pytest.raises(Refused):
        Signed(b"other", document.signer, document.signature).opened("manifest", identity.public)
    with pytest.raises(BadInput, match="found 95 bytes"):
        Signed.from_bytes(bytes(95), "message")


def test_a_private_key_in_a_public_ones_place_is_not_shown(tmp_path: Path) -> None:
    path = tmp_path / "coordinator.pem"
    Identity.create(path)
    text = path.read_text()
    secret = text.splitlines()[1]
    for mistaken, found in (
        (text, "found a private key"),
        (text.replace(" PRIVATE", ""), "found a PEM file"),
        (secret, "found another text"),
        (f"ed25519:{text}", "found no base64 after ed25519:"),
        (f"ed25519:{secret}", "found 48 bytes"),
    ):
        with pytest.raises(BadInput) as caught:
            PublicIdentity.from_text(mistaken, "key")
        assert str(caught.value) == f"key: {found}, expected a public key: {FORM}"


@pytest.mark.parametrize("text", ["", "ed25519:", "rsa:AAAA", "ed25519:!!", "ed25519:AAAA"])
def test_a_public_key_in_text(text: str) -> None:
    identity = Identity.generate()
    assert PublicIdentity.from_text(identity.public.text, "peers.toml") == identity.public
    assert len(identity.public.fingerprint.split()) == 8
    with pytest.raises(BadInput, match=r"^peers\.toml"):
        PublicIdentity.from_text(text, "peers.toml")


def test_a_public_key_has_one_spelling() -> None:
    text = Identity.generate().public.text
    bits = text[:-2] + chr(ord(text[-2]) + 1) + "="  # of which base64 looks at the first four
    for spelled in (f" {text}", f"{text}\n", bits):
        with pytest.raises(BadInput, match=r"^key: found "):
            PublicIdentity.from_text(spelled, "key")


def test_a_key_that_openssl_gives_up_on_is_named(tmp_path: Path) -> None:
    path = tmp_path / "identity.pem"
    Identity.generate().write(path)
    path.write_text(path.read_text().replace("K2Vw", "K2Vv"))  # X448, which is longer
    with pytest.raises(BadInput, match=r"identity\.pem: found no private key, expected an Ed25519"):
        Identity.load(path)


P = (1 << 255) - 19
D = -121665 * pow(121666, -1, P) % P


def points_of_small_order() -> list[bytes]:
    """Every encoding of a point that 8 takes to the neutral one: sign bits and y + p included."""
    found = []
    for y in (*SMALL_ORDER, P, P + 1):
        for sign in (0, 1 << 255):
            found.append((y | sign).to_bytes(32, "little"))
    return found


def times_eight(y: int) -> tuple[int, int]:
    square = (y * y - 1) * pow(D * y * y + 1, -1, P) % P
    x = pow(square, (P + 3) // 8, P)
    if (x * x - square) % P:
        x = x * pow(2, (P - 1) // 4, P) % P
    assert (x * x - square) % P == 0
    for _ in range(3):
        both = D * x * x * y * y % P
        x, y = 2 * x * y * pow(1 + both, -1, P) % P, (y * y + x * x) * pow(1 - both, -1, P) % P
    return x, y


def test_a_key_of_small_order_is_none() -> None:
    """Whoever enrols with one can have signatures of it for what it never saw."""
    assert all(times_eight(y) == (0, 1) for y in SMALL_ORDER)
    for key in points_of_small_order():
        text = "ed25519:" + base64.b64encode(key).decode()
        with pytest.raises(BadInput, match="small order"):
            PublicIdentity.from_text(text, "a request")
        with pytest.raises(BadInput, match="small order"):
            Signed.from_bytes(key + bytes(64))
    assert PublicIdentity(Identity.generate().public.key)
