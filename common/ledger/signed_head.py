"""The signed head of a chain: how many entries there are, and the hash of the last one.

It lies beside the chain, and once more, where one is named, in an anchor: a place that no copy of
the ledger's folder holds (another machine's share, say). A head is restored with the ledger where a
backup has both. The anchor is written after every entry too, and may be behind the chain, but never
ahead of it, nor of another chain. So a ledger that was put back to an older day refuses service,
also where it has gone on since.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fedlora.common.codec.strict import build
from fedlora.common.disk.files import write_atomically
from fedlora.common.errors import BadInput, Refused
from fedlora.common.trust.identity import Identity, PublicIdentity, seal, unseal

HEAD_TAG = "fedlora-ledger-head-2"
EARLIER_HEAD_TAG = "fedlora-ledger-head-1"  # of a head that is written anew with the next entry


@dataclass(frozen=True)
class Head:
    """`count` is the chain's height, `hash` its last entry's; 0 and "" where there is none."""

    count: int = 0
    hash: str = ""


class HeadFile:
    """The newest head of the ledger whose key this is, in the file at `path`."""

    name, signer = "head", "this key"  # as a refusal says

    def __init__(self, path: Path, key: Identity) -> None:
        self.path, self._key = path, key
        # what was verified or written here before
        self._seen: tuple[bytes | None, Head] = (None, Head())

    @property
    def missing(self) -> bool:
        """Whether there is none, or its disk is not there."""
        return not self.path.is_file()

    def read(self) -> Head:
        """What it holds; Refused unless this key signed it."""
        data = b"" if self.missing else self.path.read_bytes()
        if data != self._seen[0]:
            try:
                self._seen = (data, opened_head(data, self._key.public))
            except (BadInput, Refused) as error:
                raise Refused(
                    f"ledger {self.name} {self.path}: found none that {self.signer} signed"
                ) from error
        return self._seen[1]

    def write(self, head: Head) -> None:
        """Sign and keep it, durably; OSError where that can't be."""
        data = signed_head(self._key, head)
        write_atomically(self.path, data)
        self._seen = (data, head)


class Anchor(HeadFile):
    """The same, in the place outside."""

    name, signer = "anchor", "this ledger's key"

    def check(self, at: Head, hash_of: Callable[[int], str]) -> None:
        """Refused where the chain, which ends `at`, is not the one that was anchored, or an older
        copy of it; `hash_of` gives the hash of an entry by its number. A missing anchor passes.
        """
        if self.missing:
            return
        found = self.read()
        if found.count > at.count:
            raise Refused(
                f"ledger anchor {self.path}: found height {found.count}, expected at most"
                f" {at.count}, the ledger's: it was restored from an older copy"
            )
        if found.count and hash_of(found.count) != found.hash:
            raise Refused(
                f"ledger anchor {self.path}: found another entry {found.count} than the ledger's:"
                " it was restored from an older copy and went on, or is another one"
            )


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
