"""The coordinator's certificates: a small authority of its own, and SuperLink's certificate from it.

Elliptic curve P-384 throughout; private keys are files of mode 0600. Renewal keeps the authority, which
institutions have pinned.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedlora.common.errors import BadInput
from fedlora.common.files import write_atomically
from fedlora.common.identity import read_private

AUTHORITY_DAYS, SERVER_DAYS = 3650, 397
EARLIER = timedelta(minutes=5)  # clocks differ


def make_authority(name: str, certificate: Path, key: Path) -> None:
    """A self-signed authority at two new files."""
    private = ec.generate_private_key(ec.SECP384R1())
    subject = _name(f"{name} authority")
    built = (
        _builder(subject, subject, private.public_key(), AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(authority=True), critical=True)
        .sign(private, SHA384())
    )
    _write(certificate, key, built, private)


def issue_server(hosts: Sequence[str], authority: tuple[Path, Path], certificate: Path, key: Path) -> None:
    """A server certificate for `hosts` (names or addresses), signed by the authority's (certificate, key)."""
    issuer, signing = read_pair(*authority)
    private = ec.generate_private_key(ec.SECP384R1())
    built = (
        _builder(_name(hosts[0]), issuer.subject, private.public_key(), SERVER_DAYS)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([_alternative(host) for host in hosts]), critical=False)
        .add_extension(_usage(authority=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(signing, SHA384())
    )
    _write(certificate, key, built, private)


def read_pair(certificate: Path, key: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """A certificate and its key; BadInput where they do not belong together."""
    found = _read_certificate(certificate)
    try:
        private = load_pem_private_key(read_private(key), password=None)
    except (ValueError, TypeError) as error:
        raise BadInput(f"{key}: found no private key in PEM") from error
    if not isinstance(private, ec.EllipticCurvePrivateKey) or _public(private.public_key()) != _public(
        found.public_key()
    ):
        raise BadInput(f"{key}: found a key that does not match {certificate.name}")
    return found, private


def check_server(certificate: Path, key: Path, authority: Path, now: datetime | None = None) -> None:
    """BadInput unless the certificate is the authority's, matches its key and has not expired."""
    found, _ = read_pair(certificate, key)
    issuer = _read_certificate(authority)
    try:
        found.verify_directly_issued_by(issuer)
    except Exception as error:  # the library raises several unrelated types
        raise BadInput(f"{certificate}: found a certificate that {authority.name} did not issue") from error
    moment = now or datetime.now(UTC)
    if not found.not_valid_before_utc <= moment < found.not_valid_after_utc:
        until = found.not_valid_after_utc.date().isoformat()
        raise BadInput(
            f"{certificate}: found a certificate valid until {until}; fedlora-server renew makes another"
        )


def _read_certificate(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: found no certificate in PEM") from error


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - EARLIER)
        .not_valid_after(now + timedelta(days=days))
    )


def _usage(authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=authority,
        crl_sign=authority,
        encipher_only=False,
        decipher_only=False,
    )


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text[:64])])


def _public(key: object) -> bytes:
    if not isinstance(key, ec.EllipticCurvePublicKey):
        return b""
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _write(
    certificate: Path, key: Path, built: x509.Certificate, private: ec.EllipticCurvePrivateKey
) -> None:
    for path in (certificate, key):
        path.parent.mkdir(parents=True, exist_ok=True)
    pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    write_atomically(key, pem, mode=0o600)
    write_atomically(certificate, built.public_bytes(Encoding.PEM))
