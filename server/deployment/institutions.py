"""The institutions of one run: whom an attempt asks, in signed bytes that any carrier may take.

What is asked is signed by the coordinator; what comes back counts where its institution signed it,
for this run. Who takes part, and how long an attempt waits for whom, is its subclass's to say:
`Participants` for machines that come and go, the simulator's for those that are all there.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

from fedlora.common.errors import BadInput, Refused
from fedlora.common.manifest.manifest import RunManifest
from fedlora.common.manifest.plan import RoundPlan
from fedlora.common.model.state import AdapterState
from fedlora.common.protocol.messages import (
    STAGE_TAG,
    Decline,
    Reply,
    SignedStage,
    Staged,
    reply_from_bytes,
    request_to_bytes,
)
from fedlora.common.protocol.pieces import Parted
from fedlora.common.protocol.stages import Request, Stage
from fedlora.common.protocol.vectors import BYTES, vector_to_bytes
from fedlora.common.trust.identity import PublicIdentity, Signed
from fedlora.server.coordinator.coordinator import Coordinator
from fedlora.server.deployment.talks import Talk
from fedlora.server.deployment.transfers import Transfer, is_unfinished
from fedlora.server.rounds.cohort import Failure

ROOM = 1 << 16  # bytes of a masked input beside its coordinates


class Carrier(Protocol):
    """Takes a request to each member named, and brings the answer, or why there is none."""

    def online(self) -> set[str]:
        """Names of the members whose node is connected."""

    def ask(
        self, requests: Mapping[str, bytes], deadline: float
    ) -> Iterator[tuple[str, bytes | Failure]]:
        """Each name once, as the answers come in, within `deadline` seconds."""

    def converse(
        self, with_each: Mapping[str, Talk], deadline: float
    ) -> Iterator[tuple[str, bytes | Failure]]:
        """Each name once, as its talk ends, within `deadline` seconds."""


class Lazy(Mapping[str, bytes]):
    """Requests made when looked at, not kept: each may hold the model, and there are many."""

    def __init__(self, names: Iterable[str], make: Callable[[str], bytes]) -> None:
        self._names, self._make = tuple(names), make

    def __getitem__(self, name: str) -> bytes:
        return self._make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Institutions(ABC):
    """Who can be asked in a run whose folder is `folder`; for masked sums, an `Exchange`.

    An attempt has `deadline` seconds, and counts with a share of `quorum` of those asked.
    `by_parts`: they take and send in parts what is too large for a message.
    """

    by_parts = True

    def __init__(
        self,
        manifest: RunManifest,
        coordinator: Coordinator,
        carrier: Carrier,
        folder: Path,
        deadline: float,
        quorum: float,
    ) -> None:
        self.manifest, self.coordinator, self.carrier = manifest, coordinator, carrier
        self.folder, self.deadline, self._quorum = folder, deadline, quorum
        self._run = manifest.digest  # once: every reply is compared with it
        self._began = 0.0
        self._doubtful: set[str] = set()  # gave no answer to the last attempt that asked them

    @abstractmethod
    def gather(self) -> Mapping[str, PublicIdentity]:
        """Begin an attempt: whose signatures count in it, once they are here."""

    @abstractmethod
    def asked(
        self, members: Mapping[str, PublicIdentity], plan: RoundPlan
    ) -> tuple[list[str], list[Failure]]:
        """Whom to ask for an attempt, and who is none of them."""

    @property
    def left(self) -> float:
        """Seconds until the attempt at hand ends."""
        return max(0.0, self.deadline - (time.monotonic() - self._began))

    def seconds_for(self, stage: str) -> float:
        """How long a stage of secure aggregation may take."""
        return self.left

    def needed(self, of: int) -> int:
        """Replies without which an attempt at `of` institutions does not count."""
        return max(self.manifest.minimum_cohort, math.ceil(self._quorum * of - 1e-9))

    def unfinished(self, plan: RoundPlan) -> bool:
        """Whether a kill cut off the attempt of this plan, and it can go on; under masks none can,
        for their secrets are in no file.
        """
        return self.manifest.secure is None and is_unfinished(self.folder, plan)

    def transfer(
        self, plan: RoundPlan, state: AdapterState, members: Mapping[str, PublicIdentity]
    ) -> Transfer | None:
        """What of an attempt travels in parts; None where nothing does."""
        if not (self.by_parts and self.manifest.vector_size):
            return None
        secure, size, key = self.manifest.secure, state.spec.size, self.coordinator.identity
        # of a masked input, its words, and what is around them
        most = BYTES[self.manifest.wire] if secure is None else secure.bits // 8
        room = 0 if secure is None else ROOM

        def opened(name: str, data: bytes) -> Reply:
            return self.opened(name, data, members)

        return Transfer(self.folder, key, plan, state, opened, most * size + room)

    def take(
        self, requests: Mapping[str, bytes], deadline: float, transfer: Transfer | None = None
    ) -> Iterator[tuple[str, bytes | Failure]]:
        """Carry a request to each who is connected, with what travels in parts before and after
        it; each name once.
        """
        online = self.carrier.online()
        for name in requests:
            if name not in online:
                yield name, Failure(name, "not connected")
        here = Lazy([name for name in requests if name in online], requests.__getitem__)
        carried = (
            self.carrier.ask(here, deadline)
            if transfer is None
            else self.carrier.converse(transfer.talks(here), deadline)
        )
        for name, answer in carried:
            (self._doubtful.add if isinstance(answer, Failure) else self._doubtful.discard)(name)
            yield name, answer

    def ask(
        self, stage: str, messages: Mapping[str, bytes], plan: RoundPlan, state: AdapterState
    ) -> Iterator[tuple[str, bytes | Failure]]:
        """What each node says to a stage, as the answers come in; each name once.

        Whom and what it binds is checked by `server.secagg`.
        """
        members, key = self.coordinator.members(), self.coordinator.identity
        transfer = self.transfer(plan, state, members) if stage == Stage.INPUT else None
        whole = stage == Stage.INPUT and transfer is None
        vector = vector_to_bytes(state.vector) if whole else b""

        def signed(name: str) -> bytes:
            body = Request(stage, name, plan, messages[name], vector).to_bytes()
            return request_to_bytes(SignedStage(Signed.by(key, STAGE_TAG, body)))

        if transfer:
            transfer.begin()
        for name, data in self.take(Lazy(messages, signed), self.seconds_for(stage), transfer):
            if isinstance(data, Failure):
                yield name, data
            else:
                yield name, self._told(name, data, plan, members, transfer)
        if transfer:
            transfer.end()

    def _told(
        self,
        name: str,
        data: bytes,
        plan: RoundPlan,
        members: Mapping[str, PublicIdentity],
        transfer: Transfer | None,
    ) -> bytes | Failure:
        reply = self.heard(name, data, members)
        if isinstance(reply, Failure):
            return reply
        place = (plan.round, plan.attempt)
        if isinstance(reply, Staged) and (reply.round, reply.attempt) == place:
            return reply.message
        if transfer and isinstance(reply, Parted) and (reply.round, reply.attempt) == place:
            try:
                return transfer.whole(name, reply.parts).read_bytes()
            except BadInput as error:
                return Failure(name, str(error))
        kind = type(reply).__name__.lower()
        return Failure(name, f"found a {kind} of another attempt or kind")

    def heard(
        self, name: str, data: bytes, members: Mapping[str, PublicIdentity]
    ) -> Reply | Failure:
        """What this member signed for this run, or why it does not count."""
        try:
            reply = self.opened(name, data, members)
        except (BadInput, Refused) as error:
            return Failure(name, str(error))
        return Failure(name, reply.reason, reply.refused) if isinstance(reply, Decline) else reply

    def opened(self, name: str, data: bytes, members: Mapping[str, PublicIdentity]) -> Reply:
        """What this member signed for this run; Refused or BadInput where it is anything else."""
        if name not in members:
            raise Refused(f"{name}: is no member any more")
        reply = reply_from_bytes(data, self.coordinator.federation, {name: members[name]})
        if reply.manifest not in ("", self._run):
            raise BadInput(f"{name}: found an answer for another run")
        return reply
