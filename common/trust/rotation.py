"""A member's new identity: its new enrolment request, under the signature of the old key.

So whoever holds the old key names its successor, and the new key shows in the request that it
agrees. Where the old key is lost, there is no rotation: the member is revoked and enrols anew, with
fingerprints on the telephone.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from fedlora.common.codec.strict import build
from fedlora.common.errors import BadInput
from fedlora.common.trust.enrolment import (
    MAX_TEXT,
    ROTATION,
    EnrolmentRequest,
    check_kind,
    request_from_text,
)
from fedlora.common.trust.identity import Identity, PublicIdentity, seal, unseal

ROTATION_TAG = "fedlora-rotation-1"


@dataclass(frozen=True)
class Rotation:
    """Who hands over, and the request of who takes over."""

    old: PublicIdentity
    request: EnrolmentRequest
    text: str  # of the request, as its own key signed it


@dataclass(frozen=True)
class _Body:
    """What the old key signs."""

    request: str


def rotation_to_text(old: Identity, request: str) -> str:
    """`request` (its signed text) handed over by the key that it replaces."""
    text = seal(old, ROTATION_TAG, {"request": request})
    rotation_from_text(text, "rotation")
    return text


def is_rotation(text: str) -> bool:
    """Whether a signed text is meant as a rotation, not a request; its signer is not asked."""
    try:
        return bool(json.loads(text[: 2 * MAX_TEXT])["body"].keys() == {"request"})
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return False


def rotation_from_text(text: str, where: str) -> Rotation:
    """BadInput where it is malformed, Refused where either key did not sign."""
    if len(text) > 2 * MAX_TEXT:
        raise BadInput(f"{where}: found {len(text)} characters, expected at most {2 * MAX_TEXT}")
    check_kind(text, ROTATION, where)
    sealed = unseal(text, ROTATION_TAG, where)
    request = build(_Body, sealed.table, where).request
    found = request_from_text(request, f"{where} request")
    if found.identity == sealed.signer:
        raise BadInput(f"{where}: found the old key as the new one, expected another")
    return Rotation(sealed.signer, found, request)
