"""What a consent says, the start that binds it, and what answers a start or declines.

An offer and a consent cost nobody anything. Once enough have consented the coordinator signs a
start, and each institution that finds its own consent in it reserves the run's whole cost. The
consent is named by the digest of its bytes, so that a start is of what was offered and no other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise

from fedlora.common.codec.strict import from_canonical, to_canonical
from fedlora.common.config.toml import Bounds, Pattern
from fedlora.common.errors import BadInput
from fedlora.common.terminal import OneLine, one_line

MAX_START_BYTES = 4 << 20
MAX_HEIGHT = 1 << 53
HEAD = Pattern(r"|keyed:[0-9a-f]{64}", '"keyed:" and 64 hexadecimal digits')
DIGEST = Pattern(r"sha256:[0-9a-f]{64}", '"sha256:" and 64 hexadecimal digits')
LONGEST_OFFER = 7 * 86_400  # seconds for which an offer, and the consent to it, may be good


@dataclass(frozen=True)
class Terms:
    """The body of a consent."""

    policy: str = field(metadata={"rule": OneLine()})
    epsilon: float = field(metadata={"rule": Bounds(0, math.inf)})
    delta: float = field(metadata={"rule": Bounds(0, math.inf)})
    height: int = field(
        default=0, kw_only=True, metadata={"unwritten": 0, "rule": Bounds(0, MAX_HEIGHT)}
    )
    head: str = field(default="", kw_only=True, metadata={"unwritten": "", "rule": HEAD})


@dataclass(frozen=True)
class Begun(Terms):
    """The body of what answers a start."""

    start: str = field(metadata={"rule": OneLine()})


@dataclass(frozen=True)
class Reason:
    """The body of a decline."""

    reason: str = field(metadata={"rule": OneLine()})
    refused: bool


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
