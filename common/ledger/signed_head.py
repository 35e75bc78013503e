"""The signed head of a chain: how many entries there are, and the hash of the last one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fedlora.common.codec.strict import build
from fedlora.common.errors import BadInput, Refused
from fedlora.common.trust.identity import Identity, PublicIdentity, seal, unseal

HEAD_TAG = "fedlora-ledger-head-2"
EARLIER_HEAD_TAG = "fedlora-ledger-head-1"  # of a head that is written anew with the next entry


@dataclass(frozen=True)
class Head:
    """`count` is the chain's height, `hash` its last entry's; 0 and "" where there is none."""

    count: int = 0
    hash: str = ""


def signed_head(key: Identity, head: Head) -> bytes:
    """The head as a sealed text of the ledger's own key."""
    return seal(key, HEAD_TAG, {"count": head.count, "hash": head.hash}).encode()


def opened_head(data: bytes, key: PublicIdentity) -> Head:
    """The head that `key` signed, of this version or the one before; BadInput or Refused else."""
    try:
        text, table = data.decode(), json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadInput("head: found no JSON") from error
    if isinstance(table, dict) and "body" not in table:
        return _opened_earlier(table, key)
    return build(Head, unseal(text, HEAD_TAG, "head", key).table, "head")


def _opened_earlier(table: dict[str, Any], key: PublicIdentity) -> Head:
    """A head of version 1: a table with its signature, over lines that were not framed."""
    head = build(Head, {name: table.get(name) for name in ("count", "hash")}, "head")
    signed = f"{EARLIER_HEAD_TAG}\n{head.count}\n{head.hash}".encode()
    try:
        signature = bytes.fromhex(str(table.get("signature")))
        Ed25519PublicKey.from_public_bytes(key.key).verify(signature, signed)
    except (ValueError, InvalidSignature) as error:
        raise Refused("head: found no signature of this key") from error
    return head
