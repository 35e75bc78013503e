"""The federation's own certificate authority.

One key, one certificate for the address that institutions dial. Institutions pin the authority's
certificate when they join, so the server's certificate can be renewed at any time without asking
them. Everything is ECDSA on P-384. Keys are PEM of mode 0600. A renewal keeps the key and replaces
one file, so that a kill never leaves a key beside another key's certificate.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ec import (
    SECP384R1,
    EllipticCurvePrivateKey,
    EllipticCurvePublicKey,
    generate_private_key,
)
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedlora.common.disk.files import read_bytes, write_atomically
from fedlora.common.errors import BadInput
from fedlora.common.trust.enrolment import certificate_in
from fedlora.common.trust.identity import private_key_in, read_private

CA_KEY, CA_CERTIFICATE = "ca.key", "ca.crt"
SERVER_KEY, SERVER_CERTIFICATE = "server.key", "server.crt"
CA_DAYS, SERVER_DAYS = 3650, 397
SKEW = timedelta(minutes=5)  # a node's clock may run behind
HOST = re.compile(r"(?=.{1,253}$)[A-Za-z0-9](?:[A-Za-z0-9-]{0,62})(?:\.[A-Za-z0-9-]{1,63})*")


@dataclass(frozen=True)
class Authority:
    """Who signs the server's certificate."""

    key: EllipticCurvePrivateKey
    certificate: x509.Certificate

    @classmethod
    def create(cls, folder: Path, federation: str, now: datetime | None = None) -> Authority:
        """A new authority in `folder`; BadInput where one is: institutions have pinned it."""
        for name in (CA_KEY, CA_CERTIFICATE):
            if (folder / name).exists():
                raise BadInput(
                    f"{folder / name}: found one, expected none: institutions have pinned it"
                )
        key = generate_private_key(SECP384R1())
        certificate = _authority_certificate(key, federation, now or datetime.now(UTC))
        folder.mkdir(parents=True, exist_ok=True)
        _write_key(folder / CA_KEY, key)
        write_atomically(folder / CA_CERTIFICATE, certificate.public_bytes(Encoding.PEM))
        return cls(key, certificate)

    @classmethod
    def load(cls, folder: Path) -> Authority:
        """BadInput where key and certificate don't match, Refused where others read the key."""
        key = read_key(folder / CA_KEY)
        certificate = read_certificate(folder / CA_CERTIFICATE)
        _check_pair(key, certificate, folder / CA_KEY, folder / CA_CERTIFICATE)
        return cls(key, certificate)

    @property
    def pem(self) -> str:
        """The certificate, for who must trust it."""
        return self.certificate.public_bytes(Encoding.PEM).decode()


def issue_server(
    authority: Authority,
    folder: Path,
    hosts: Sequence[str],
    *,
    days: int = SERVER_DAYS,
    new_key: bool = False,
    now: datetime | None = None,
) -> x509.Certificate:
    """A certificate for `hosts` (names, IP addresses) in `folder`; a key there is kept."""
    faults = [
        f"host: found {host[:80]!r}, expected a host name or an IP address"
        for host in hosts
        if not _is_host(host)
    ]
    if faults or not hosts:
        raise BadInput(faults or "host: found none, expected a host name or an IP address")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / SERVER_KEY
    if path.exists() and not new_key:
        key = read_key(path)
    else:
        key = generate_private_key(SECP384R1())
        _write_key(path, key)
    certificate = _server_certificate(authority, key, hosts, now or datetime.now(UTC), days)
    write_atomically(folder / SERVER_CERTIFICATE, certificate.public_bytes(Encoding.PEM))
    return certificate


def check_server(
    folder: Path, authority: x509.Certificate, host: str, now: datetime | None = None
) -> x509.Certificate:
    """The server's certificate; BadInput where key, authority, time or host would fail."""
    path, now = folder / SERVER_CERTIFICATE, now or datetime.now(UTC)
    certificate = read_certificate(path)
    _check_pair(read_key(folder / SERVER_KEY), certificate, folder / SERVER_KEY, path)
    try:
        certificate.verify_directly_issued_by(authority)
    except (InvalidSignature, ValueError, TypeError) as error:
        raise BadInput(
            f"{path}: found a certificate of another authority, expected one of"
            f" {_name(authority)!r}"
        ) from error
    _check_time(authority, "certificate authority", now)
    _check_time(certificate, str(path), now)
    if host not in hosts_of(certificate):
        raise BadInput(
            f"{path}: found the hosts {', '.join(hosts_of(certificate))}, expected {host}"
        )
    return certificate


def days_left(certificate: x509.Certificate, now: datetime | None = None) -> float:
    """Days until it expires; negative where it has."""
    return (certificate.not_valid_after_utc - (now or datetime.now(UTC))) / timedelta(days=1)


def hosts_of(certificate: x509.Certificate) -> list[str]:
    """The names and addresses that a certificate is for."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return []
    dns: list[str] = names.get_values_for_type(x509.DNSName)
    return dns + [str(each) for each in names.get_values_for_type(x509.IPAddress)]


def read_certificate(path: Path) -> x509.Certificate:
    """BadInput where there is none in PEM."""
    return certificate_in(
        read_bytes(path, expected="a certificate in PEM", where=str(path)), str(path)
    )


def read_key(path: Path) -> EllipticCurvePrivateKey:
    """Refused where others can read it; BadInput where it is no ECDSA key."""
    data = read_private(path)
    try:
        key = private_key_in(data)
    except ValueError as error:
        raise BadInput(f"{path}: found no private key, expected an ECDSA key in PEM") from error
    if not isinstance(key, EllipticCurvePrivateKey):
        raise BadInput(f"{path}: found a {type(key).__name__}, expected an ECDSA key")
    return key


def _authority_certificate(
    key: EllipticCurvePrivateKey, federation: str, now: datetime
) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{federation[:40]} federation")])
    usage = _usage(sign_certificates=True)
    return (
        _builder(name, name, key.public_key(), now, CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, SHA384())
    )


def _server_certificate(
    authority: Authority,
    key: EllipticCurvePrivateKey,
    hosts: Sequence[str],
    now: datetime,
    days: int,
) -> x509.Certificate:
    public, issuer = key.public_key(), authority.key.public_key()
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hosts[0][:64])])
    names = x509.SubjectAlternativeName([_general_name(host) for host in dict.fromkeys(hosts)])
    return (
        _builder(subject, authority.certificate.subject, public, now, days)
        .add_extension(names, critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(sign_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer), critical=False)
        .sign(authority.key, SHA384())
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, key: EllipticCurvePublicKey, now: datetime, days: int
) -> x509.CertificateBuilder:
    return x509.CertificateBuilder(
        issuer, subject, key, x509.random_serial_number(), now - SKEW, now + timedelta(days=days)
    )


def _usage(sign_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign_certificates,
        key_cert_sign=sign_certificates,
        crl_sign=sign_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _is_host(host: str) -> bool:
    return (
        isinstance(_general_name(host), x509.IPAddress)
        if ":" in host
        else bool(HOST.fullmatch(host))
    )


def _check_pair(
    key: EllipticCurvePrivateKey, certificate: x509.Certificate, at: Path, path: Path
) -> None:
    if certificate.public_key() != key.public_key():
        raise BadInput(f"{path}: found a certificate of another key, expected one of {at}")


def _check_time(certificate: x509.Certificate, where: str, now: datetime) -> None:
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now > end:
        raise BadInput(
            f"{where}: expired on {end:%Y-%m-%d}, expected a valid certificate; renew it"
        )
    if now < start:
        raise BadInput(f"{where}: valid from {start:%Y-%m-%d} only; is this machine's clock right?")


def _name(certificate: x509.Certificate) -> str:
    return certificate.subject.rfc4514_string()


def _write_key(path: Path, key: EllipticCurvePrivateKey) -> None:
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    write_atomically(path, pem, mode=0o600)
