"""Whoever can be asked for updates, and what came of asking: the one seam of the round loop."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fedlora.common.manifest.plan import RoundPlan
from fedlora.common.model.state import AdapterState, Vector
from fedlora.common.terminal import one_line, without_places


@dataclass(frozen=True)
class Failure:
    """A client that was asked and whose answer does not count; `refused`: by policy or budget.

    Its reason is one printable line without absolute paths, whoever wrote it.
    """

    client: str
    reason: str
    refused: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "reason", one_line(without_places(self.reason)))


@dataclass(frozen=True)
class SecureRecord:
    """An attempt that was or may have been unmasked: who was in it, by stage; all of it public."""

    round: int
    attempt: int
    asked: int
    cohort: int  # |U1|: gave keys
    dealt: int  # |U2|: gave shares
    members: int  # |U3|: the inputs in the sum
    confirmed: int
    opened: int | None  # None: it is not known how many
    threshold: int
    colluders: int  # assumed, beside the coordinator
    liars: tuple[str, ...] = ()  # proven by what they signed
    # dealers of whom more than `colluders` say that their share does not open
    suspected: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class CohortSum:
    """What an attempt brought in: `total` is the float64 (size,) sum of `replies` updates.

    `asked` counts members: those asked, and those who had declined. None with failures: nobody was
    asked, for no sum could have counted.
    """

    total: npt.NDArray[np.float64]
    replies: int
    asked: int
    failures: tuple[Failure, ...]
    seconds: float
    secure: SecureRecord | None = None  # None: the coordinator saw every update
    each: Mapping[str, Vector] = field(default_factory=dict)  # of an evaluation's answers in clear

    def counts(self, quorum: float, minimum: int) -> bool:
        """Whether its replies make a quorum; an attempt that drew nobody has one."""
        if not self.asked:
            return not self.failures
        return self.replies >= replies_needed(self.asked, quorum, minimum)


@dataclass(frozen=True)
class Attempted:
    """What is known of an attempt that was begun; all of it public."""

    round: int
    phase: str
    attempt: int
    seconds: float
    asked: int
    replies: int
    failures: tuple[Failure, ...]


@dataclass(frozen=True)
class Lost(Attempted):
    """It brought no round."""

    reason: str


class Cohort(Protocol):
    """Whoever can be asked for updates."""

    def total(self, plan: RoundPlan, state: AdapterState) -> CohortSum:
        """The checked updates' sum; a client that fails is listed, and does not raise."""


def replies_needed(asked: int, quorum: float, minimum: int = 1) -> int:
    """Replies that make a quorum: somebody where anybody was asked, and nobody where nobody was."""
    return max(minimum, math.ceil(quorum * asked - 1e-9)) if asked else 0
