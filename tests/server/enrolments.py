"""Institutions as a registry meets them: an identity and the text of a request."""

from __future__ import annotations

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from fedlora.common.trust.enrolment import EnrolmentRequest, request_to_text
from fedlora.common.trust.identity import Identity


def flower_key() -> str:
    key = ec.generate_private_key(ec.SECP384R1()).public_key()
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def request(identity: Identity, name: str, organisation: str = "", key: str = "") -> str:
    return request_to_text(
        identity,
        EnrolmentRequest(
            name,
            organisation or f"{name} clinic",
            identity.public,
            key or flower_key(),
            "2026-11-23T10:00:00+00:00",
        ),
    )
