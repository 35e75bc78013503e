"""Who speaks: Ed25519 identities, and what they sign: `Signed`, as bytes or as a text.

Everything signed is framed (`common.codec.framing`): a tag that names the protocol and the stage,
then each field. So a signature made for one stage is worth nothing in another.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.exceptions import InternalError, InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes

from fedlora.common.codec.framing import KEY_BYTES, SIGNATURE_BYTES, framed
from fedlora.common.codec.strict import canonical, json_table
from fedlora.common.disk.files import write_atomically
from fedlora.common.errors import BadInput, Refused

MAX_TEXT_BYTES = 64 << 20  # of a signed text
# Of edwards25519: the field, and y of the points of order 1, 2, 4 and 8, whose signatures anybody
# can make for most messages.
FIELD = (1 << 255) - 19
_OF_ORDER_8 = 0x7A03AC9277FDC74EC6CC392CFA53202A0F67100D760B3CBA4FD84D3D706A17C7
SMALL_ORDER = frozenset({0, 1, FIELD - 1, _OF_ORDER_8, FIELD - _OF_ORDER_8})


@dataclass(frozen=True)
class PublicIdentity:
    """An Ed25519 public key, 32 bytes in its one spelling; BadInput for a point of small order."""

    key: bytes

    def __post_init__(self) -> None:
        if len(self.key) != KEY_BYTES:
            raise BadInput(f"public key: found {len(self.key)} bytes, expected {KEY_BYTES}")
        y = int.from_bytes(self.key, "little") & ((1 << 255) - 1)
        if y >= FIELD or y in SMALL_ORDER:
            raise BadInput("public key: found a point of small order, or none, expected a key")

    @classmethod
    def from_text(cls, text: str, where: str) -> PublicIdentity:
        """From `ed25519:` and base64, in the one spelling of `text`; quoted nowhere: it may be
        private.
        """
        kind, _, rest = text.partition(":")
        expected = f"expected a public key: ed25519: and {KEY_BYTES} bytes in base64"
        if kind != "ed25519":
            raise BadInput(f"{where}: found {_kind_of(text)}, {expected}")
        try:
            raw = base64.b64decode(rest, validate=True)
        except ValueError as error:
            raise BadInput(f"{where}: found no base64 after ed25519:, {expected}") from error
        if len(raw) != KEY_BYTES:
            raise BadInput(f"{where}: found {len(raw)} bytes, {expected}")
        found = cls(raw)
        if found.text != text:
            raise BadInput(f"{where}: found another spelling of it, {expected}")
        return found

    @property
    def text(self) -> str:
        """`ed25519:` and the key in base64."""
        return "ed25519:" + base64.b64encode(self.key).decode()

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the key in eight groups of eight hexadecimal digits, for the telephone."""
        found = hashlib.sha256(self.key).hexdigest()
        return " ".join(found[at : at + 8] for at in range(0, 64, 8))

    def verify(self, signature: bytes, tag: str, *fields: bytes) -> None:
        """Refused unless this identity signed these fields under this tag."""
        try:
            Ed25519PublicKey.from_public_bytes(self.key).verify(signature, framed(tag, *fields))
        except (InvalidSignature, ValueError) as error:
            raise Refused(
                f"{tag}: found a signature that {self.fingerprint[:17]}… did not make"
            ) from error


def _kind_of(text: str) -> str:
    """What a text is that is no public key of ours, by its first line alone."""
    first = text.strip().partition("\n")[0]
    if not first.startswith("-----BEGIN"):
        return "another text"
    return "a private key" if "PRIVATE KEY" in first else "a PEM file"


class Identity:
    """An Ed25519 private key in a file that nobody else can read."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        raw = key.public_key().public_bytes(
            serialization.Encoding.Raw, serialization.PublicFormat.Raw
        )
        self.public = PublicIdentity(raw)

    @classmethod
    def generate(cls) -> Identity:
        """A new key, in memory only."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def create(cls, path: Path) -> Identity:
        """A new identity at `path` (PEM, mode 0600); BadInput where one lies there."""
        if path.exists():
            raise BadInput(
                f"{path}: found a key, expected none: a new identity would orphan the old one"
            )
        identity = cls.generate()
        identity.write(path)
        return identity

    @classmethod
    def load(cls, path: Path) -> Identity:
        """Refused where others can read the file; BadInput where it holds no Ed25519 key."""
        data = read_private(path)
        try:
            key = private_key_in(data)
        except ValueError as error:
            raise BadInput(
                f"{path}: found no private key, expected an Ed25519 key in PEM"
            ) from error
        if not isinstance(key, Ed25519PrivateKey):
            raise BadInput(f"{path}: found a {type(key).__name__}, expected an Ed25519 key")
        return cls(key)

    def write(self, path: Path) -> None:
        """The key as PEM (PKCS 8) in a file of mode 0600."""
        pem = self._key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, pem, mode=0o600)

    def sign(self, tag: str, *fields: bytes) -> bytes:
        """A signature of 64 bytes over `framed(tag, *fields)`."""
        return self._key.sign(framed(tag, *fields))


def read_private(path: Path) -> bytes:
    """The bytes of a file that only its owner may read; Refused or BadInput where it is not."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise BadInput(
            f"{path}: found no readable file ({error.strerror}), expected a private key"
        ) from error
    with os.fdopen(descriptor, "rb") as stream:
        if os.fstat(descriptor).st_mode & 0o077:
            raise Refused(f"{path}: found a key that others can read, expected mode 0600")
        return stream.read(1 << 16)


def private_key_in(pem: bytes) -> PrivateKeyTypes:
    """The key of a PEM, of any kind; ValueError where there is none, or it needs a password.

    What OpenSSL thinks of a damaged one is one kind of fault here.
    """
    try:
        return serialization.load_pem_private_key(pem, password=None)
    except (TypeError, UnsupportedAlgorithm, InternalError) as error:
        # InternalError: a length that the kind of key does not have
        raise ValueError(type(error).__name__) from error


@dataclass(frozen=True)
class Signed:
    """A body that one identity signed for one purpose; `tag` is the reader's, and not sent.

    It travels as bytes, or, where the body is canonical JSON, as a text that a person can read
    (`seal`, `unseal`): body, signer and signature as JSON, in one spelling, so that any change to
    a file is noticed.
    """

    body: bytes
    signer: PublicIdentity
    signature: bytes

    @classmethod
    def by(cls, identity: Identity, tag: str, body: bytes) -> Signed:
        """`body`, signed by `identity` under `tag`."""
        return cls(body, identity.public, identity.sign(tag, body))

    def opened(self, tag: str, expected: PublicIdentity) -> bytes:
        """The body; Refused unless `expected` signed it under `tag`."""
        if self.signer != expected:
            raise Refused(f"{tag}: found the key {self.signer.text}, expected {expected.text}")
        expected.verify(self.signature, tag, self.body)
        return self.body

    def to_bytes(self) -> bytes:
        """Key, signature, body: no lengths, for the first two have one each."""
        return self.signer.key + self.signature + self.body

    @classmethod
    def from_bytes(cls, data: bytes, where: str = "signed message") -> Signed:
        """BadInput where there is no room for key and signature; who signed is not asked."""
        start = KEY_BYTES + SIGNATURE_BYTES
        if len(data) < start:
            raise BadInput(f"{where}: found {len(data)} bytes, expected at least {start}")
        return cls(data[start:], PublicIdentity(data[:KEY_BYTES]), data[KEY_BYTES:start])

    @property
    def table(self) -> dict[str, Any]:
        """The body as a table; BadInput where it is none."""
        return json_table(self.body, "signed text", MAX_TEXT_BYTES)

    @property
    def text(self) -> str:
        """Body, signer and signature as JSON, for a body that is a table in canonical bytes."""
        encoded = base64.b64encode(self.signature).decode()
        table = {"body": self.table, "signature": encoded, "signer": self.signer.text}
        made = json.dumps(table, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
        return made + "\n"

    @classmethod
    def from_text(cls, text: str, where: str) -> Signed:
        """From a text of any spelling; BadInput for another thing; who signed is not asked."""
        expected = "expected body, signer and signature"
        try:
            if len(text) > MAX_TEXT_BYTES:
                raise ValueError("too long")
            table = json.loads(text)
            body, signer, encoded = table["body"], table["signer"], table["signature"]
            signature, spelled = base64.b64decode(encoded, validate=True), canonical(body)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise BadInput(f"{where}: found no signed text, {expected}") from error
        if not isinstance(body, dict) or not isinstance(signer, str):
            raise BadInput(f"{where}: found no signed text, expected a table that somebody signed")
        return cls(spelled, PublicIdentity.from_text(signer, f"{where} signer"), signature)


def seal(identity: Identity, tag: str, table: Mapping[str, Any]) -> str:
    """`table` as text, signed under `tag`."""
    return Signed.by(identity, tag, canonical(table)).text


def unseal(text: str, tag: str, where: str, expected: PublicIdentity | None = None) -> Signed:
    """What was sealed; Refused unless its signer signed it, and is `expected` where that is given.

    Without `expected` this shows integrity only: that the text is as its signer wrote it, whoever
    that is. BadInput where it is no such text.
    """
    signed = Signed.from_text(text, where)
    if expected is not None and signed.signer != expected:
        raise Refused(f"{where}: found the key {signed.signer.text}, expected {expected.text}")
    signed.opened(tag, signed.signer)
    if signed.text != text:
        raise Refused(f"{where}: found another spelling than was signed: it was changed")
    return signed
