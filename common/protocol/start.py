"""The start of a run: who is in its cohort, each by the consent that it signed.

An offer and a consent cost nobody anything. Once enough have consented the coordinator signs a
start, and each institution that finds its own consent in it reserves the run's whole cost. The
consent is named by the digest of its bytes, so that a start is of what was offered and no other.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from itertools import pairwise

from fedlora.common.codec.strict import from_canonical, to_canonical
from fedlora.common.config.toml import Pattern
from fedlora.common.errors import BadInput
from fedlora.common.terminal import one_line

MAX_START_BYTES = 4 << 20
DIGEST = Pattern(r"sha256:[0-9a-f]{64}", '"sha256:" and 64 hexadecimal digits')
LONGEST_OFFER = 7 * 86_400  # seconds for which an offer, and the consent to it, may be good


@dataclass(frozen=True)
class Party:
    """An institution of a cohort; `consent` is `sha256:` and the hash of its signed consent."""

    institution: str
    consent: str = field(metadata={"rule": DIGEST})


@dataclass(frozen=True)
class Start:
    """The run of `manifest`, a digest, begins with `cohort`, by name, each once."""

    manifest: str = field(metadata={"rule": DIGEST})
    cohort: tuple[Party, ...]

    def to_bytes(self) -> bytes:
        """Canonical JSON."""
        return to_canonical(self)

    @classmethod
    def from_bytes(cls, body: bytes) -> Start:
        """BadInput unless these are the canonical bytes of a start, its names in order."""
        found = from_canonical(cls, body, "start", MAX_START_BYTES)
        for one, other in pairwise(found.cohort):
            if one.institution >= other.institution:
                name = one_line(other.institution)[:80]
                raise BadInput(f"start cohort: found {name} out of order, expected each name once")
        return found


def digest_of(data: bytes) -> str:
    """`sha256:` and the hash of what somebody signed."""
    return "sha256:" + hashlib.sha256(data).hexdigest()
