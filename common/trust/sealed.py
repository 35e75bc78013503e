"""Signed tables as text: what a person can read, a signature covers, and no flipped byte survives.

A sealed text is a `Signed` whose body is canonical JSON, spelled as JSON itself: body, signer and
signature. It has one spelling only: a text that reads the same but is written in another way is
refused, so that any change to the file is noticed.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedlora.common.codec.canonical import canonical
from fedlora.common.errors import BadInput, Refused
from fedlora.common.trust.identity import Identity, PublicIdentity, Signed

MAX_TEXT_BYTES = 64 << 20


@dataclass(frozen=True)
class Sealed:
    """A table, and who signed it."""

    body: Mapping[str, Any]
    signer: PublicIdentity


def seal(identity: Identity, tag: str, body: Mapping[str, Any]) -> str:
    """`body` as text, signed under `tag`."""
    return _text(body, Signed.by(identity, tag, canonical(body)))


def unseal(text: str, tag: str, where: str, expected: PublicIdentity | None = None) -> Sealed:
    """The table; Refused unless who is named signed it, and is `expected` where that is given.

    Without `expected` this shows integrity only: that the text is as its signer wrote it, whoever
    that is. BadInput where it is no such text.
    """
    try:
        if len(text) > MAX_TEXT_BYTES:
            raise ValueError("too long")
        table = json.loads(text)
        body, signer, encoded = table["body"], table["signer"], table["signature"]
        signature, spelled = base64.b64decode(encoded, validate=True), canonical(body)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise BadInput(
            f"{where}: found no signed text, expected body, signer and signature"
        ) from error
    if not isinstance(body, dict) or not isinstance(signer, str):
        raise BadInput(f"{where}: found no signed text, expected a table that somebody signed")
    found = PublicIdentity.from_text(signer, f"{where} signer")
    if expected is not None and found != expected:
        raise Refused(f"{where}: found the key {found.text}, expected {expected.text}")
    signed = Signed(spelled, found, signature)
    signed.opened(tag, found)
    if _text(body, signed) != text:
        raise Refused(f"{where}: found another spelling than was signed: it was changed")
    return Sealed(body, found)


def _text(body: Mapping[str, Any], signed: Signed) -> str:
    encoded = base64.b64encode(signed.signature).decode()
    table = {"body": body, "signature": encoded, "signer": signed.signer.text}
    return json.dumps(table, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
