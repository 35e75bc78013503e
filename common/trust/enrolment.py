"""How institution and federation get to know each other: a request, and an invitation back.

Both are signed by who wrote them, which shows that the writer holds the key, and nothing more: that
the key is the right one, two people settle by reading fingerprints to each other on the telephone.
Peers are admitted to an institution's roster by its own operator, from a peer's request; a
coordinator can remove one, never add one.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key
from cryptography.utils import CryptographyDeprecationWarning

from fedlora.common.codec.strict import build
from fedlora.common.errors import BadInput
from fedlora.common.trust.identity import Identity, PublicIdentity, seal, unseal
from fedlora.common.trust.organisations import check_organisation

VERSION = 1
# safe as a file name, in a log and on a line
NAME = re.compile(r"[a-z0-9](?:[a-z0-9.-]{0,62}[a-z0-9])?")
FEDERATION = re.compile(r"[a-z0-9][a-z0-9.-]{0,62}")
MAX_TEXT = 1 << 16

REQUEST, INVITATION, ROTATION = "an enrolment request", "an invitation", "a rotation"


@dataclass(frozen=True)
class EnrolmentRequest:
    """What an institution asks to be known as."""

    name: str  # lower case, as NAME
    organisation: str
    identity: PublicIdentity
    flower_key: str  # OpenSSH line of the node's ECDSA P-384 public key
    created: str  # ISO 8601, UTC


@dataclass(frozen=True)
class Invitation:
    """Where a federation is and by which keys it is known."""

    federation: str
    address: str  # host:port of its SuperLink
    ca_certificate: str  # PEM
    coordinator: PublicIdentity


@dataclass(frozen=True)
class Peer:
    """Another institution, as this institution's operator approved it."""

    name: str
    organisation: str
    identity: PublicIdentity


# By what a text is: the value, the tag, and which of the value's fields its signer is.
KINDS: Mapping[str, tuple[type[Any], str, str]] = {
    REQUEST: (EnrolmentRequest, "fedlora-enrolment-1", "identity"),
    INVITATION: (Invitation, "fedlora-invitation-1", "coordinator"),
}


def request_to_text(identity: Identity, request: EnrolmentRequest) -> str:
    """Signed text; BadInput where a field is not what it must be or `identity` is another one."""
    text = _signed(identity, REQUEST, request)
    request_from_text(text, "enrolment")  # nothing is written that nobody could read
    return text


def request_from_text(text: str, where: str, own: bool = False) -> EnrolmentRequest:
    """BadInput where it is malformed, Refused where its own key did not sign it.

    A node's `own` may have an organisation that only earlier versions allowed.
    """
    found: EnrolmentRequest = _opened(text, REQUEST, where)
    if not NAME.fullmatch(found.name):
        expected = "expected lower-case letters, digits, '.' and '-'"
        raise BadInput(f"{where} name: found {found.name[:80]!r}, {expected}")
    if not own:
        check_organisation(found.organisation, f"{where} organisation")
    check_flower_key(found.flower_key, f"{where} flower_key")
    try:
        datetime.fromisoformat(found.created)
    except ValueError as error:
        raise BadInput(f"{where} created: expected a date and time in ISO 8601") from error
    return found


def invitation_to_text(identity: Identity, invitation: Invitation) -> str:
    """Text signed by the coordinator; BadInput where a field is not what it must be."""
    text = _signed(identity, INVITATION, invitation)
    invitation_from_text(text, "invitation")
    return text


def invitation_from_text(text: str, where: str) -> Invitation:
    """BadInput where it is malformed, Refused where its own key did not sign it."""
    found: Invitation = _opened(text, INVITATION, where)
    check_organisation(found.federation, f"{where} federation")
    host, _, port = found.address.rpartition(":")
    if (
        not re.fullmatch(r"[A-Za-z0-9.-]{1,253}|\[[0-9a-fA-F:]{2,39}\]", host)
        or not port.isdecimal()
    ):
        raise BadInput(f"{where} address: found {found.address[:80]!r}, expected host:port")
    if not 0 < int(port[:6]) < 65536:
        raise BadInput(f"{where} address: found port {port[:6]}, expected 1 to 65535")
    certificate_fingerprint(found.ca_certificate, f"{where} ca_certificate")
    return found


def certificate_fingerprint(pem: str, where: str) -> str:
    """SHA-256 of a certificate, grouped as an identity's fingerprint; BadInput where it is none."""
    from cryptography.hazmat.primitives.hashes import SHA256

    try:
        found = certificate_in(pem.encode(), where).fingerprint(SHA256()).hex()
    except UnicodeEncodeError as error:
        raise BadInput(f"{where}: found half a surrogate pair, expected PEM") from error
    return " ".join(found[at : at + 8] for at in range(0, 64, 8))


def certificate_in(pem: bytes, where: str) -> x509.Certificate:
    """BadInput where it is none, or has a version or a serial number that X.509 does not have."""
    try:
        with warnings.catch_warnings(action="error", category=CryptographyDeprecationWarning):
            return x509.load_pem_x509_certificate(pem)
    except (
        ValueError,
        x509.InvalidVersion,
        UnsupportedAlgorithm,
        CryptographyDeprecationWarning,
    ) as error:
        raise BadInput(f"{where}: found no certificate in PEM") from error


def check_flower_key(line: str, where: str) -> None:
    """BadInput unless `line` is the OpenSSH key that Flower's nodes use: ECDSA, P-384."""
    expected = "expected an OpenSSH line of an ECDSA P-384 public key"
    if not re.fullmatch(r"ecdsa-sha2-nistp384 [A-Za-z0-9+/=]{1,400}", line):
        raise BadInput(f"{where}: found {line[:60]!r}, {expected}")
    try:
        key = load_ssh_public_key(line.encode())
    except (ValueError, UnsupportedAlgorithm, NotImplementedError) as error:
        # NotImplementedError: a point that is not written out whole
        raise BadInput(f"{where}: found {line[:60]!r}, {expected}") from error
    if not isinstance(key, EllipticCurvePublicKey) or not isinstance(key.curve, SECP384R1):
        raise BadInput(f"{where}: found another kind of key, {expected}")
    if key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode() != line:
        # base64 leaves room for other spellings; keys are told apart by their text, and Flower's by
        # what it says
        raise BadInput(
            f"{where}: found another spelling of a key, expected the one that ssh-keygen writes"
        )


def check_kind(text: str, expected: str, where: str) -> None:
    """BadInput for a text plainly of another kind: its signature would be wrong under this tag."""
    try:
        keys = set(json.loads(text)["body"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return  # whoever opens it says what is wrong
    kinds = {
        frozenset({"version"} | {each.name for each in fields(cls)} - {signer}): kind
        for kind, (cls, _, signer) in KINDS.items()
    }
    found = (kinds | {frozenset({"request"}): ROTATION}).get(frozenset(keys))
    if found not in (None, expected):
        raise BadInput(f"{where}: found {found}, expected {expected}")


def _signed(identity: Identity, kind: str, value: Any) -> str:
    _, tag, signer = KINDS[kind]
    if identity.public != getattr(value, signer):
        raise BadInput(f"{kind}: found another key than the one that signs")
    body = {name: found for name, found in vars(value).items() if name != signer}
    return seal(identity, tag, {"version": VERSION, **body})


def _opened(text: str, kind: str, where: str) -> Any:
    if len(text) > MAX_TEXT:
        raise BadInput(f"{where}: found {len(text)} characters, expected at most {MAX_TEXT}")
    check_kind(text, kind, where)
    cls, tag, signer = KINDS[kind]
    sealed = unseal(text, tag, where)
    body = dict(sealed.table)
    version = body.pop("version", None)
    if type(version) is not int or version != VERSION:
        raise BadInput(f"{where} version: found {str(version)[:20]!r}, expected {VERSION}")
    if signer in body:
        raise BadInput(f"{where} {signer}: unknown field")
    return build(cls, {**body, signer: sealed.signer.text}, where)
