"""LoRA's halves by turns (RoLoRA, Chen et al. 2024): what a round moves, and so what leaves in it.

A phase that moves LoRA begins with B, for A begins drawn and B at 0; the next round moves A, with B
as it is everywhere, and so on. With one half the same at all institutions ΔW = B·A is linear in the
other, and the mean of the halves is exact for any number of local steps. By the number of a round,
never by that of its attempt: a round that is tried again moves the same half.
"""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from fedlora.common.errors import BadInput
from fedlora.common.model.state import COUNTED, HALVES, AdapterSpec, everywhere

BY_TURNS = "rolora"
Mask = npt.NDArray[np.bool_]
Number = TypeVar("Number", bound=np.generic)


def turns(phase: str, variant: str) -> tuple[str, ...]:
    """What the rounds of a phase of that name move, in turn, as `AdapterSpec.moved_by` reads it;
    what names a half already is all of it.
    """
    if variant != BY_TURNS or phase in ("head", COUNTED) or "." in phase:
        return (phase,)
    return tuple(f"{phase}.{half}" for half in HALVES)


def most_moved(spec: AdapterSpec, phase: str, variant: str) -> int:
    """Coordinates that a round of such a phase moves, at most."""
    return max(int(spec.moved_by(moves).sum()) for moves in turns(phase, variant))


def leaving(spec: AdapterSpec, moves: str, variant: str) -> Mask:
    """(size,) true where a coordinate of an update leaves: by turns, where the round moves it."""
    return spec.moved_by(moves) if variant == BY_TURNS else everywhere(spec.size)


def taken(values: npt.NDArray[Number], mask: Mask) -> npt.NDArray[Number]:
    """(mask.sum(),) of (size,): what leaves. BadInput where anything else is not 0."""
    if mask.all():
        return values
    if values[~mask].any():
        raise BadInput("update: found a change outside of what its round moves, expected 0")
    return values[mask]


def placed(values: npt.NDArray[Any], mask: Mask) -> npt.NDArray[Any]:
    """(size,) of (mask.sum(),): what came, where it belongs, and 0 elsewhere."""
    if mask.all():
        return values
    whole = np.zeros(len(mask), dtype=values.dtype)
    whole[mask] = values
    return whole
