"""Secure aggregation's stages: their names, how plan and manifest give values, what travels.

A `Request` is what any carrier takes to a node: opaque to relay, SuperNode and SuperLink. The
answer that comes back is the node's own signed message, as it is. Neither a carrier nor the
coordinator is trusted by the node.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedlora.common.errors import BadInput
from fedlora.common.manifest.manifest import SecureTerms
from fedlora.common.manifest.plan import RoundPlan
from fedlora.common.secagg.ring import Encoding
from fedlora.common.secagg.wire import PROTOCOL, Epoch, Slot, fields_of, name_of, number, sized
from fedlora.common.trust.identity import framed

OFFER, DEAL, INPUT, CONFIRM, OPEN = "offer", "deal", "input", "confirm", "open"
STAGES = (OFFER, DEAL, INPUT, CONFIRM, OPEN)
_EPOCH, _REQUEST = f"{PROTOCOL} epoch", f"{PROTOCOL} request"


def epoch_to_bytes(epoch: Epoch) -> bytes:
    """Stage 1, coordinator to node."""
    numbers = (number(epoch.number), number(epoch.first), number(epoch.count))
    return framed(_EPOCH, epoch.federation.encode(), epoch.run.encode(), *numbers)


def epoch_from_bytes(data: bytes) -> Epoch:
    federation, run, *numbers = fields_of(data, _EPOCH, 5)
    found = [int.from_bytes(sized(each, 8), "big") for each in numbers]
    try:
        return Epoch(federation.decode(), run.decode(), *found)
    except UnicodeDecodeError as error:
        raise BadInput(f"{_EPOCH}: found bytes that are not UTF-8") from error


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
class Request:
    """One stage asked of one institution.

    `vector` is the global adapter (float32, little-endian), at the input only.
    """

    stage: str
    institution: str
    plan: RoundPlan
    message: bytes
    vector: bytes = b""

    def to_bytes(self) -> bytes:
        fields = (self.stage.encode(), self.institution.encode(), self.plan.to_bytes())
        return framed(_REQUEST, *fields, self.message, self.vector)

    @classmethod
    def from_bytes(cls, data: bytes) -> Request:
        """BadInput for another kind, an unknown stage, or a vector where none belongs."""
        stage, institution, plan, message, vector = fields_of(data, _REQUEST, 5)
        found = stage.decode(errors="replace")
        if found not in STAGES:
            raise BadInput(
                f"{_REQUEST} stage: found {found[:40]!r}, expected one of {', '.join(STAGES)}"
            )
        if bool(vector) != (found == INPUT):
            raise BadInput(f"{_REQUEST} vector: found {len(vector)} bytes at the stage {found}")
        return cls(found, name_of(institution), RoundPlan.from_bytes(plan), message, vector)
