"""Who the coordinator is, and who its members are at this moment."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fedlora.common.trust.identity import Identity, PublicIdentity
from fedlora.server.coordinator.heights import Heights

Members = Callable[[], Mapping[str, PublicIdentity]]


@dataclass(frozen=True)
class Coordinator:
    """Who speaks for a federation, and to whom."""

    federation: str
    identity: Identity
    members: Members  # the active ones, at this moment
    # keys that a member had before
    former: Callable[[str], Sequence[PublicIdentity]] = lambda name: ()
    heights: Heights | None = None  # of the members' ledgers; None: nobody keeps them
