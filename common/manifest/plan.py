"""One attempt at one round, and an institution's answer to it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedlora.common.codec.strict import from_canonical, to_canonical
from fedlora.common.errors import BadInput
from fedlora.common.model.state import Vector


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

    Already noised, but for mode "client": there it is clipped, and noised as whole numbers before
    it is masked.
    """

    client: str
    manifest: str
    round: int
    attempt: int
    delta: Vector

    def check(self, plan: RoundPlan, size: int) -> None:
        """BadInput unless this answers `plan` with `size` finite coordinates."""
        where = f"update of {self.client}"
        found = (self.manifest, self.round, self.attempt)
        if found != (plan.manifest, plan.round, plan.attempt):
            raise BadInput(
                f"{where}: found round {self.round} attempt {self.attempt} of {self.manifest[:14]},"
                f" expected round {plan.round} attempt {plan.attempt} of {plan.manifest[:14]}"
            )
        if self.delta.shape != (size,) or self.delta.dtype != np.float32:
            raise BadInput(
                f"{where}: found {self.delta.dtype} {self.delta.shape}, expected float32 ({size},)"
            )
        if not np.isfinite(self.delta).all():
            raise BadInput(f"{where}: found a value that is not finite")
