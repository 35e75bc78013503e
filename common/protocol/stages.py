"""Secure aggregation's stages: their names, how plan and manifest give values, what travels.

A `Request` is what any carrier takes to a node: opaque to relay, SuperNode and SuperLink. The
answer that comes back is the node's own signed message, as it is. Neither a carrier nor the
coordinator is trusted by the node.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

from fedlora.common.codec.framing import Framed, OneOf
from fedlora.common.errors import BadInput
from fedlora.common.manifest.manifest import SecureTerms
from fedlora.common.manifest.plan import RoundPlan
from fedlora.common.secagg.ring import Encoding
from fedlora.common.secagg.wire import PROTOCOL, Name, Slot


class Stage(StrEnum):
    """A step of an attempt, in their order."""

    OFFER = "offer"
    DEAL = "deal"
    INPUT = "input"
    CONFIRM = "confirm"
    OPEN = "open"


def slot_of(plan: RoundPlan, base: str) -> Slot:
    """`base` is the digest of the model that the reader itself holds."""
    return Slot(plan.round, plan.attempt, plan.adapter, base)


def encoding_of(terms: SecureTerms, phase: int, size: int, noise: float = 0.0) -> Encoding:
    """A phase's fixed point; BadInput where there is none. `noise`: of a member, in levels."""
    if not 0 <= phase < len(terms.update_bounds):
        raise BadInput(
            f"secure aggregation phase: found {phase}, expected 0 to {len(terms.update_bounds) - 1}"
        )
    return Encoding(size, terms.bits, terms.update_bounds[phase], terms.levels, noise)


@dataclass(frozen=True)
class Request(Framed):
    """One stage asked of one institution.

    `vector` is the global adapter (float32, little-endian), at the input only; empty where it came
    in parts.
    """

    TAG = f"{PROTOCOL} request"

    stage: Annotated[str, OneOf(Stage)]  # a Stage, once it was read
    institution: Name
    plan: RoundPlan
    message: bytes
    vector: bytes = b""

    @classmethod
    def from_bytes(cls, data: bytes) -> Request:
        """BadInput for another kind of message or stage, or a vector where none belongs."""
        found = super().from_bytes(data)
        if found.vector and found.stage is not Stage.INPUT:
            raise BadInput(
                f"{cls.TAG} vector: found {len(found.vector)} bytes at the stage {found.stage}"
            )
        return found
