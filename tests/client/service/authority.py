"""Certificates of a trainer and its relay, from an authority of the tests' own."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID


@dataclass(frozen=True)
class Authority:
    folder: Path
    key: ec.EllipticCurvePrivateKey
    name: str

    @classmethod
    def make(cls, folder: Path, name: str) -> Authority:
        made = cls(folder, ec.generate_private_key(ec.SECP256R1()), name)
        made._write(name, made.key, made, days=1, ca=True)
        return made

    def issue(self, name: str, days: int = 1) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        (self.folder / f"{name}.key").write_bytes(pem)
        (self.folder / f"{name}.key").chmod(0o600)
        self._write(name, key, self, days, ca=False)

    def _write(
        self, name: str, key: ec.EllipticCurvePrivateKey, by: Authority, days: int, ca: bool
    ) -> None:
        subject, issuer = (
            x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, n)]) for n in (name, by.name)
        )
        now = datetime.now(UTC)
        start, end = now - timedelta(days=3), now + timedelta(days=days)
        built = (
            x509.CertificateBuilder(
                issuer, subject, key.public_key(), x509.random_serial_number(), start, end
            )
            .add_extension(x509.BasicConstraints(ca, None), critical=True)
            .add_extension(
                x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]),
                critical=False,
            )
        )
        (self.folder / f"{name}.crt").write_bytes(
            built.sign(by.key, SHA256()).public_bytes(Encoding.PEM)
        )
