"""Key agreement, key derivation and sealing.

X25519 (RFC 7748), HKDF-SHA256 (RFC 5869), ChaCha20-Poly1305 (RFC 8439). A public key counts only in
its canonical encoding and outside the small subgroups: so a u-coordinate has one encoding, and
nobody can force a shared secret that others know. Two keys may still give one secret: u and 1/u
differ by a point of order 2, which every secret multiplies away. So a key that is derived from a
secret is bound to the names of both and to H(U1), which holds the keys as they are. A sealing key
serves one message, so its nonce is 0.
"""

from __future__ import annotations

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedlora.common.errors import BadInput, Refused
from fedlora.common.secagg import shamir

KEY_BYTES, TAG_BYTES = 32, 16
_FIELD = 2**255 - 19
_ORDER_8 = (
    39382357235489614581723060781553021112529911719440698176882885853963445705823,
    325606250916557431795983626356110631294008115727848805560023387167927233504,
)
# u-coordinates whose order divides 8, here or on the twist
LOW_ORDER = frozenset((0, 1, _FIELD - 1, *_ORDER_8))
_NONCE = bytes(12)


class KeyPair:
    """An X25519 pair whose secret can be shared over Shamir's field. Lives in memory only."""

    def __init__(self, secret: bytes) -> None:
        self._key = X25519PrivateKey.from_private_bytes(secret)
        self.secret = secret
        self.public = self._key.public_key().public_bytes(
            serialization.Encoding.Raw, serialization.PublicFormat.Raw
        )

    @classmethod
    def generate(cls, draw: shamir.RandomBytes) -> KeyPair:
        """A new pair, its secret below Shamir's P."""
        return cls(shamir.to_bytes(shamir.below_p(draw)))

    def agree(self, public: bytes) -> bytes:
        """The shared secret of 32 bytes; Refused for a key of low order."""
        check_public(public, "key agreement")
        try:
            return self._key.exchange(X25519PublicKey.from_public_bytes(public))
        except ValueError as error:
            raise Refused("key agreement: found a public key of low order") from error


def check_public(public: bytes, where: str) -> None:
    """BadInput or Refused unless `public` is a canonical X25519 key outside the small subgroups."""
    if len(public) != KEY_BYTES:
        raise BadInput(f"{where}: found a key of {len(public)} bytes, expected {KEY_BYTES}")
    value = int.from_bytes(public, "little")
    if value >= _FIELD:
        raise Refused(f"{where}: found a public key that is not canonical")
    if value in LOW_ORDER:
        raise Refused(f"{where}: found a public key of low order")


def hkdf(secret: bytes, salt: bytes, info: bytes) -> bytes:
    """HKDF-SHA256 with 32 bytes of output."""
    return HKDF(hashes.SHA256(), KEY_BYTES, salt, info).derive(secret)


def seal(key: bytes, text: bytes, bound_to: bytes) -> bytes:
    """Ciphertext and tag; `bound_to` must be the same when it is opened."""
    return ChaCha20Poly1305(key).encrypt(_NONCE, text, bound_to)


def unseal(key: bytes, sealed: bytes, bound_to: bytes, where: str) -> bytes:
    """The text; Refused where key, context or ciphertext is another one."""
    try:
        return ChaCha20Poly1305(key).decrypt(_NONCE, sealed, bound_to)
    except InvalidTag as error:
        raise Refused(f"{where}: found a sealed share that does not open") from error
