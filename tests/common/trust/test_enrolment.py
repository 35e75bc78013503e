"""Requests and invitations: one spelling, one signer, and every fault in words."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID

from fedlora.common.errors import BadInput, FedloraError, Refused
from fedlora.common.trust.enrolment import (
    EnrolmentRequest,
    Invitation,
    certificate_fingerprint,
    invitation_from_text,
    invitation_to_text,
    request_from_text,
    request_to_text,
)
from fedlora.common.trust.identity import Identity, seal, unseal

KEY = Identity.generate()


def flower_key(curve: ec.EllipticCurve | None = None) -> str:
    key = ec.generate_private_key(curve or ec.SECP384R1()).public_key()
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def certificate() -> str:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "ca")])
    now = datetime.now(UTC)
    built = x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + timedelta(days=1))
    return built.sign(key, SHA256()).public_bytes(Encoding.PEM).decode()


REQUEST = EnrolmentRequest(
    "north", "Nord Klinik", KEY.public, flower_key(), "2026-11-23T10:00:00+00:00"
)
INVITATION = Invitation("f", "server.example:9092", certificate(), KEY.public)


def test_requests_and_invitations_come_back_as_they_were_written() -> None:
    assert request_from_text(request_to_text(KEY, REQUEST), "r") == REQUEST
    assert invitation_from_text(invitation_to_text(KEY, INVITATION), "i") == INVITATION


def test_every_flipped_byte_is_noticed() -> None:
    data = request_to_text(KEY, REQUEST).encode()
    for place in range(len(data)):
        for bit in (1, 7, 32):
            changed = data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :]
            with pytest.raises(FedloraError):
                request_from_text(changed.decode(), "r")


def test_another_spelling_of_the_same_table_is_refused() -> None:
    text = seal(KEY, "tag", {"a": 1})
    assert unseal(text, "tag", "t").table == {"a": 1}
    with pytest.raises(Refused, match="another spelling"):
        unseal(json.dumps(json.loads(text)), "tag", "t")
    with pytest.raises(Refused, match="expected"):
        unseal(text, "tag", "t", Identity.generate().public)
    with pytest.raises(Refused):
        unseal(text, "other", "t")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "../etc"),
        ("name", "North"),
        ("organisation", "two\nlines"),
        ("organisation", ""),
        ("organisation", "Nord Klinik\u3164"),
        ("organisation", "N\u043erd Klinik"),
        ("flower_key", flower_key(ec.SECP256R1())),
        ("flower_key", "ecdsa-sha2-nistp384 AAAA"),
        ("created", "yesterday"),
    ],
)
def test_faulty_requests_are_bad_input(field: str, value: str) -> None:
    with pytest.raises(BadInput, match=field):
        request_to_text(KEY, replace(REQUEST, **{field: value}))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("address", "server"),
        ("address", "server:99999"),
        ("address", "a b:1"),
        ("ca_certificate", "-----BEGIN"),
        ("federation", "\x1b[2J"),
    ],
)
def test_faulty_invitations_are_bad_input(field: str, value: str) -> None:
    with pytest.raises(BadInput, match=field):
        invitation_to_text(KEY, replace(INVITATION, **{field: value}))  # type: ignore[arg-type]


def test_nobody_signs_for_another_key() -> None:
    with pytest.raises(BadInput, match="another key"):
        request_to_text(Identity.generate(), REQUEST)
    with pytest.raises(BadInput, match="version"):
        request_from_text(seal(KEY, "fedlora-enrolment-1", {"version": 2}), "r")


@pytest.mark.parametrize(
    "named", [KEY.public.text, Identity.generate().public.text], ids=["own", "other"]
)
def test_who_signed_is_not_said_a_second_time(named: str) -> None:
    """A body that names an identity itself could name another one than signed."""
    for text, tag, field, read in (
        (request_to_text(KEY, REQUEST), "fedlora-enrolment-1", "identity", request_from_text),
        (
            invitation_to_text(KEY, INVITATION),
            "fedlora-invitation-1",
            "coordinator",
            invitation_from_text,
        ),
    ):
        body = json.loads(text)["body"]
        assert read(seal(KEY, tag, body), "r")
        with pytest.raises(BadInput, match=f"r {field}: unknown field"):
            read(seal(KEY, tag, body | {field: named}), "r")
        with pytest.raises(BadInput, match="missing"):
            read(seal(KEY, tag, {"version": 1}), "r")
        with pytest.raises(BadInput, match="r more: unknown field"):
            read(seal(KEY, tag, body | {"more": 1}), "r")


def test_a_certificate_of_no_known_version_is_refused() -> None:
    """The library raises a type of its own for it, which is no ValueError."""
    key = ec.generate_private_key(ec.SECP256R1())
    name, now = x509.Name([]), datetime.now(UTC)
    made = x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + timedelta(1))
    der = made.sign(key, SHA256()).public_bytes(Encoding.DER)
    strange = der.replace(b"\xa0\x03\x02\x01\x02", b"\xa0\x03\x02\x01\x07", 1)
    assert strange != der
    text = base64.encodebytes(strange).decode()
    pem = f"-----BEGIN CERTIFICATE-----\n{text}-----END CERTIFICATE-----\n"
    with pytest.raises(x509.InvalidVersion):
        x509.load_pem_x509_certificate(pem.encode()).version  # noqa: B018
    for wrong in (pem, "\ud800", ""):
        with pytest.raises(BadInput, match="invitation ca_certificate"):
            certificate_fingerprint(wrong, "invitation ca_certificate")
