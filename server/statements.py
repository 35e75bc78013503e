"""An institution's signed statement as a file: what it says in words, and the very bytes that say so.

The words are made from the bytes; a file whose words say something else is refused by who reads it.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass

from fedlora.common.errors import BadInput
from fedlora.common.protocol import Consent


@dataclass(frozen=True)
class Statement:
    """`signed` is a reply of common.protocol, unopened; `text` the file that it was found in."""

    signed: bytes
    text: str


def statement_text(consent: Consent, signed: bytes) -> str:
    """The one spelling of a statement."""
    table = {
        "institution": consent.institution,
        "manifest": consent.manifest,
        "policy": consent.policy_digest,
        "epsilon": consent.epsilon,
        "delta": consent.delta,
        "signed": base64.b64encode(signed).decode(),
    }
    return json.dumps(table, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def read_statement(text: str, where: str) -> Statement:
    """BadInput where there are no signed bytes in it."""
    try:
        signed = base64.b64decode(json.loads(text)["signed"], validate=True)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise BadInput(f"{where}: found no signed statement") from error
    return Statement(signed, text)
