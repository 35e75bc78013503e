"""What the stages of secure aggregation are called, and how a plan and a manifest become its values."""

from __future__ import annotations

from fedlora.common.errors import BadInput
from fedlora.common.identity import framed
from fedlora.common.messages import RoundPlan, SecureTerms
from fedlora.common.secagg.ring import Encoding
from fedlora.common.secagg.wire import PROTOCOL, Epoch, Slot, fields_of, number, sized

OFFER, DEAL, INPUT, CONFIRM, OPEN = "offer", "deal", "input", "confirm", "open"
STAGES = (OFFER, DEAL, INPUT, CONFIRM, OPEN)
_EPOCH = f"{PROTOCOL} epoch"


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


def encoding_of(terms: SecureTerms, phase: int, size: int) -> Encoding:
    """The fixed point of a phase; BadInput where the terms have no such phase."""
    if not 0 <= phase < len(terms.update_bounds):
        raise BadInput(
            f"secure aggregation phase: found {phase}, expected 0 to {len(terms.update_bounds) - 1}"
        )
    return Encoding(size, terms.bits, terms.update_bounds[phase], terms.levels)
