"""Signed tables as text: what a person can read, a signature covers, and no flipped byte survives.

A sealed text is JSON with a body, the key of who signed it and the signature. It has one spelling
only: a text that reads the same but is written in another way is refused, so that any change to the
file is noticed.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedlora.common.errors import BadInput, Refused
from fedlora.common.trust.identity import Identity, PublicIdentity

MAX_TEXT_BYTES = 64 << 20


@dataclass(frozen=True)
class Sealed:
    """A table, and who signed it."""

    body: Mapping[str, Any]
    signer: PublicIdentity


def seal(identity: Identity, tag: str, body: Mapping[str, Any]) -> str:
    """`body` as text, signed under `tag`."""
    signature = identity.sign(tag, _canonical(body))
    return _text(body, identity.public, signature)


def unseal(text: str, tag: str, where: str, expected: PublicIdentity | None = None) -> Sealed:
    """The table; Refused unless who is named signed it, and is `expected` where that is given.

    Without `expected` this shows integrity only: that the text is as its signer wrote it, whoever
    that is.
    """
    try:
        if len(text) > MAX_TEXT_BYTES:
            raise ValueError("too long")
        table = json.loads(text)
        body, signer, encoded = table["body"], table["signer"], table["signature"]
        signature = base64.b64decode(encoded, validate=True)
        canonical = _canonical(body)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise BadInput(
            f"{where}: found no signed text, expected body, signer and signature"
        ) from error
    if not isinstance(body, dict) or not isinstance(signer, str):
        raise BadInput(f"{where}: found no signed text, expected a table that somebody signed")
    found = PublicIdentity.from_text(signer, f"{where} signer")
    if expected is not None and found != expected:
        raise Refused(f"{where}: found the key {found.text}, expected {expected.text}")
    found.verify(signature, tag, canonical)
    if _text(body, found, signature) != text:
        raise Refused(f"{where}: found another spelling than was signed: it was changed")
    return Sealed(body, found)


def _text(body: Mapping[str, Any], signer: PublicIdentity, signature: bytes) -> str:
    table = {"body": body, "signature": base64.b64encode(signature).decode(), "signer": signer.text}
    return json.dumps(table, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _canonical(body: Mapping[str, Any]) -> bytes:
    return json.dumps(
        body, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()
