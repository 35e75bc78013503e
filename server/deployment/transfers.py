"""The large vectors of one attempt: the adapter to each institution, and its update back.

    piece 0, 1, …   until the node has them all; one that has some already says so
    task or stage   without the adapter; answered by the list of the answer's parts
    fetch 0, 1, …   each held against that list and added to a file of this attempt, `incoming/`

Whichever process is killed meanwhile, both sides keep what has come, and a run that is resumed goes
on with the same attempt: its plan is the same to the byte, and so are all answers to it.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from fedlora.common.disk.files import write_atomically
from fedlora.common.errors import BadInput
from fedlora.common.manifest.plan import RoundPlan
from fedlora.common.model.state import AdapterState
from fedlora.common.protocol.messages import PLAN_TAG, Reply, request_to_bytes
from fedlora.common.protocol.pieces import PARTS_TAG, Coming, Fetch, Part, Parted, Piece, Taken
from fedlora.common.protocol.vector_parts import Arrival, Parts, cut, listed, part_of
from fedlora.common.trust.identity import Identity, Signed
from fedlora.server.deployment.talks import Asking, Talk

UNHEARD = 300.0  # seconds after which a part that nothing was heard of is sent again
PLAN = "plan.json"
Opened = Callable[[str, bytes], Reply]  # what a member signed; Refused or BadInput else


def incoming(folder: Path, plan: RoundPlan) -> Path:
    """Where the answers to an attempt come together."""
    return folder / "incoming" / f"{plan.attempt}"


def is_unfinished(folder: Path, plan: RoundPlan) -> bool:
    """Whether the transfers of this very plan were begun, and not ended."""
    path = incoming(folder, plan) / PLAN
    return path.is_file() and path.read_bytes() == plan.to_bytes()


@dataclass(frozen=True)
class Transfer:
    """What travels in parts for `plan`, which starts from `state`; `folder` is the run's."""

    folder: Path
    identity: Identity  # the coordinator's
    plan: RoundPlan
    state: AdapterState
    opened: Opened
    most: int  # bytes of an answer

    @property
    def place(self) -> Path:
        """The attempt's folder; it is there from before anything is sent until all is over."""
        return incoming(self.folder, self.plan)

    def begin(self) -> None:
        """From now on a run that is resumed goes on with this attempt."""
        self.place.mkdir(parents=True, exist_ok=True)
        write_atomically(self.place / PLAN, self.plan.to_bytes())

    def end(self) -> None:
        """What came is used, or of no use."""
        shutil.rmtree(self.place.parent, ignore_errors=True)

    def arrival(self, name: str, parts: Parts) -> Arrival:
        """What has come of the answer of `name`."""
        listed_ = hashlib.sha256(repr((name, parts)).encode()).hexdigest()
        return Arrival(self.place / f"{listed_}.part", parts)

    def whole(self, name: str, parts: Parts) -> Path:
        """All of the answer of `name`; BadInput where a list is signed that was not fetched."""
        arrival = self.arrival(name, parts)
        if not (parts.digests and arrival.whole):
            raise BadInput(f"update of {name}: found a list of parts, expected the parts before it")
        return arrival.path

    def talks(self, requests: Mapping[str, bytes]) -> dict[str, Talk]:
        """A talk with each institution; a request is looked at when it is sent."""
        return {name: self._talk(name, requests) for name in requests}

    def _talk(self, name: str, requests: Mapping[str, bytes]) -> Talk:
        stopped = yield from self._delivered(name)
        if stopped:
            return stopped
        answer = yield Asking(lambda: requests[name])
        reply = self.opened(name, answer)
        if isinstance(reply, Parted):
            stopped = yield from self._fetched(name, reply)
        return stopped or answer

    def _delivered(self, name: str) -> Generator[Asking, bytes, bytes]:
        """b"" once the node has the adapter, else what it said in place of taking it."""
        count, number = len(self._coming[0].digests), 0
        for _ in range(2 * count + 1):
            answer = yield Asking(partial(self._piece, number), UNHEARD)
            reply = self.opened(name, answer)
            if not isinstance(reply, Taken):
                return answer
            number = reply.count
            if number == count:
                return b""
            if number > count:
                break
        raise BadInput(f"{name} adapter: found {number} parts taken, expected {count}")

    def _fetched(self, name: str, reply: Parted) -> Generator[Asking, bytes, bytes]:
        """b"" once all parts are here, else what the node said in place of one."""
        where = f"update of {name}"
        reply.parts.check(1, self.most, where)
        arrival = self.arrival(name, reply.parts)
        while not arrival.whole:
            number = arrival.count
            answer = yield Asking(partial(self._fetch, number), UNHEARD)
            part = self.opened(name, answer)
            if not isinstance(part, Part):
                return answer
            arrival.add(number, part.data, where)
        return b""

    @cached_property
    def _coming(self) -> tuple[Parts, Signed]:
        """The list of the adapter's parts, and the same signed."""
        parts = listed(cut(self.state.vector))
        coming = Coming(self.plan.manifest, self.plan.adapter, parts)
        return parts, Signed.by(self.identity, PARTS_TAG, coming.to_bytes())

    def _piece(self, number: int) -> bytes:
        data = part_of(self.state.vector, number)
        return request_to_bytes(Piece(self._coming[1], number, data))

    def _fetch(self, number: int) -> bytes:
        plan = Signed.by(self.identity, PLAN_TAG, self.plan.to_bytes())
        return request_to_bytes(Fetch(plan, number))
