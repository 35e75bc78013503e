"""One attempt at one round, and an institution's answer to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedlora.common.codec.strict import from_canonical, to_canonical
from fedlora.common.errors import BadInput
from fedlora.common.model.state import is_finite

Delta = npt.NDArray[np.floating[Any]]  # float32; float64 where it is masked before it leaves


@dataclass(frozen=True)
class RoundPlan:
    """One attempt at one round. Attempts count from 1 over the whole run, and are used once."""

    manifest: str  # digest
    phase: int
    round: int
    attempt: int
    adapter: str  # digest of the state that the round starts from

    def to_bytes(self) -> bytes:
        """Canonical JSON."""
        return to_canonical(self)

    @classmethod
    def from_bytes(cls, data: bytes) -> RoundPlan:
        """BadInput unless these are the canonical bytes of a plan."""
        return from_canonical(cls, data, "plan")


@dataclass(frozen=True, eq=False)
class Update:
    """An institution's answer to a plan: new adapter minus old one, float32 (spec.size,).

    Already noised, but where noise is shared: there it is clipped, and noised as whole numbers
    before it is masked. A sum of clipped units is float64, for its rounding is accounted for.
    """

    client: str
    manifest: str
    round: int
    attempt: int
    delta: Delta

    def check(self, plan: RoundPlan, size: int, masked: bool = False) -> None:
        """BadInput unless this answers `plan` with `size` finite coordinates, in float32 where they
        are not `masked` before they leave.
        """
        where = f"update of {self.client}"
        found = (self.manifest, self.round, self.attempt)
        if found != (plan.manifest, plan.round, plan.attempt):
            raise BadInput(
                f"{where}: found round {self.round} attempt {self.attempt} of {self.manifest[:14]},"
                f" expected round {plan.round} attempt {plan.attempt} of {plan.manifest[:14]}"
            )
        kinds = (np.float32, np.float64) if masked else (np.float32,)
        if self.delta.shape != (size,) or self.delta.dtype not in kinds:
            raise BadInput(
                f"{where}: found {self.delta.dtype} {self.delta.shape}, expected float32 ({size},)"
            )
        if not is_finite(self.delta):
            raise BadInput(f"{where}: found a value that is not finite")
