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
from fedlora.common.protocol.stages import Request, Stage
from fedlora.common.protocol.vectors import vector_to_bytes
from fedlora.common.terminal import one_line
from fedlora.common.trust.identity import PublicIdentity, Signed
from fedlora.server.coordinator.coordinator import Coordinator
from fedlora.server.rounds.cohort import Failure


class Carrier(Protocol):
    """Takes a request to each member named, and brings the answer, or why there is none."""

    def online(self) -> set[str]:
        """Names of the members whose node is connected."""

    def ask(
        self, requests: Mapping[str, bytes], deadline: float
    ) -> Iterator[tuple[str, bytes | Failure]]:
        """Each name once, as the answers come in, within `deadline` seconds."""


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
    """

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

    def take(
        self, requests: Mapping[str, bytes], deadline: float
    ) -> Iterator[tuple[str, bytes | Failure]]:
        """Carry a request to each who is connected; each name once."""
        online = self.carrier.online()
        for name in requests:
            if name not in online:
                yield name, Failure(name, "not connected")
        here = [name for name in requests if name in online]
        for name, answer in self.carrier.ask(Lazy(here, requests.__getitem__), deadline):
            (self._doubtful.add if isinstance(answer, Failure) else self._doubtful.discard)(name)
            yield name, answer

    def ask(
        self, stage: str, messages: Mapping[str, bytes], plan: RoundPlan, state: AdapterState
    ) -> Iterator[tuple[str, bytes | Failure]]:
        """What each node says to a stage, as the answers come in; each name once.

        Whom and what it binds is checked by `server.secagg`.
        """
        members, key = self.coordinator.members(), self.coordinator.identity
        vector = vector_to_bytes(state.vector) if stage == Stage.INPUT else b""

        def signed(name: str) -> bytes:
            body = Request(stage, name, plan, messages[name], vector).to_bytes()
            return request_to_bytes(SignedStage(Signed.by(key, STAGE_TAG, body)))

        for name, data in self.take(Lazy(messages, signed), self.seconds_for(stage)):
            told = data if isinstance(data, Failure) else self._told(name, data, plan, members)
            yield name, told

    def _told(
        self, name: str, data: bytes, plan: RoundPlan, members: Mapping[str, PublicIdentity]
    ) -> bytes | Failure:
        reply = self.heard(name, data, members)
        if isinstance(reply, Failure):
            return reply
        place = (plan.round, plan.attempt)
        if isinstance(reply, Staged) and (reply.round, reply.attempt) == place:
            return reply.message
        kind = type(reply).__name__.lower()
        return Failure(name, f"found a {kind} of another attempt or kind")

    def heard(
        self, name: str, data: bytes, members: Mapping[str, PublicIdentity]
    ) -> Reply | Failure:
        """What this member signed for this run, or why it does not count."""
        try:
            reply = self.opened(name, data, members)
        except (BadInput, Refused) as error:
            return Failure(name, one_line(str(error)))
        return Failure(name, reply.reason, reply.refused) if isinstance(reply, Decline) else reply

    def opened(self, name: str, data: bytes, members: Mapping[str, PublicIdentity]) -> Reply:
        """What this member signed for this run; Refused or BadInput where it is anything else."""
        if name not in members:
            raise Refused(f"{name}: is no member any more")
        reply = reply_from_bytes(data, self.coordinator.federation, {name: members[name]})
        if reply.manifest not in ("", self._run):
            raise BadInput(f"{name}: found an answer for another run")
        return reply
