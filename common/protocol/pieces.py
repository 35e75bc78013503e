"""What coordinator and institutions send each other of a vector that travels in parts.

    piece    coordinator -> node   a part of the adapter that a later task starts from
    taken    node -> coordinator   how many of them are kept there
    parted   node -> coordinator   in place of an answer: the list of its parts
    fetch    coordinator -> node   which part of it to send
    part     node -> coordinator   that one

They are messages among others (`common.protocol.messages`), and signed as those are.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from fedlora.common.codec.framing import Framed, Whole
from fedlora.common.codec.strict import from_canonical, to_canonical
from fedlora.common.config.toml import Bounds
from fedlora.common.protocol.vector_parts import Parts
from fedlora.common.trust.identity import Signed

PARTS_TAG = "fedlora-parts-1"
MAX_COMING_BYTES = 1 << 16
MAX_PARTS = 1 << 16

Number = Annotated[int, Whole(MAX_PARTS)]


@dataclass(frozen=True)
class Piece(Framed):
    """Part `number` of an adapter, as float32; `coming`, signed under PARTS_TAG, lists them all."""

    TAG = "piece"

    coming: Signed
    number: Number
    data: bytes


@dataclass(frozen=True)
class Coming:
    """Which adapter comes to a run in parts; `manifest` and `adapter` are digests."""

    manifest: str
    adapter: str
    parts: Parts

    def to_bytes(self) -> bytes:
        """Canonical JSON."""
        return to_canonical(self)

    @classmethod
    def from_bytes(cls, body: bytes) -> Coming:
        """BadInput unless these are its canonical bytes."""
        return from_canonical(cls, body, "piece coming", MAX_COMING_BYTES)


@dataclass(frozen=True)
class Fetch(Framed):
    """Asks for part `number` of what answered a plan, signed under PLAN_TAG."""

    TAG = "fetch"

    plan: Signed
    number: Number


@dataclass(frozen=True)
class Taken:
    """Of the adapter that comes to a run, the first `count` parts are kept."""

    institution: str
    manifest: str
    count: int


@dataclass(frozen=True)
class Parted:
    """In place of an `Answer` or a `Staged` that is too large: `parts` lists its bytes."""

    institution: str
    manifest: str
    round: int
    attempt: int
    parts: Parts


@dataclass(frozen=True)
class Part:
    """One of them, as it was asked for; which one, its digest says."""

    institution: str
    manifest: str
    round: int
    attempt: int
    data: bytes


@dataclass(frozen=True)
class Count:
    """How many parts of an adapter have come."""

    parts: int = field(metadata={"rule": Bounds(0, MAX_PARTS)})
