"""An institution's signed statement as a file.

What it says in words, and the very bytes that say so. The words are made from the bytes; a file
whose words say something else is refused by who reads it.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from functools import lru_cache

from fedlora.common.errors import BadInput
from fedlora.common.manifest.manifest import RunManifest
from fedlora.common.privacy.accountant import Spend
from fedlora.common.privacy.guarantee import SLACK
from fedlora.common.privacy.modes import guarantee_of
from fedlora.common.protocol.messages import Consent


@dataclass(frozen=True)
class Statement:
    """`signed` is a reply of common.protocol.messages, unopened; `text` the file it came in."""

    signed: bytes
    text: str


def consent_faults(consent: Consent, manifest: RunManifest) -> list[str]:
    """Why it states another ε or δ than the schedule costs, if it does.

    What is released states the largest ε: one that understates makes it promise too much, and one
    that overstates makes an institution's word the headline of all.
    """
    due = schedule_cost(manifest)
    return [
        f"{name}: found {found:g}, expected {cost:g}, what the schedule costs"
        for name, found, cost in (
            ("epsilon", consent.epsilon, due.epsilon),
            ("delta", consent.delta, due.delta),
        )
        if not cost / SLACK <= found <= cost * SLACK
    ]


@lru_cache(maxsize=8)
def schedule_cost(manifest: RunManifest) -> Spend:
    """What an institution reserves; BadInput where nothing bounds it."""
    return guarantee_of(manifest).charge()


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
