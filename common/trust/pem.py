"""A private key in PEM: what OpenSSL thinks of a damaged one is one kind of fault here."""

from __future__ import annotations

from cryptography.exceptions import InternalError, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import load_pem_private_key


def private_key_in(pem: bytes) -> PrivateKeyTypes:
    """The key, of any kind; ValueError where there is none, or it needs a password."""
    try:
        return load_pem_private_key(pem, password=None)
    except (TypeError, UnsupportedAlgorithm, InternalError) as error:
        # InternalError: a length that the kind of key does not have
        raise ValueError(type(error).__name__) from error
