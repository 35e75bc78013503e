"""A run between real machines: the round loop of the simulator over institutions that answer for themselves.

    1. who takes part: active members whose node is connected get the signed manifest, and consent or decline
    2. one signed plan an attempt; its exact bytes are on disk before they are sent
    3. a reply counts where its institution signed it, for this run, round and attempt, and it is finite,
       of the right shape, and within the public bound on its norm
    4. all else is the simulator's: the loop, the checkpoint, the strategies, the summary

A `Carrier` takes bytes to members and brings bytes back; Flower's grid is one, the tests have another. Who is a
member is read anew for each attempt, so that a revocation counts from the next one on.
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeGuard

import numpy as np

from fedlora.common.config import Config, load_config
from fedlora.common.errors import BadInput, FedloraError, Refused
from fedlora.common.files import write_atomically
from fedlora.common.identity import Identity, PublicIdentity, Signed
from fedlora.common.messages import RoundPlan, RunManifest, Update
from fedlora.common.privacy import default_cache, stated_epsilon
from fedlora.common.protocol import (
    MANIFEST_TAG,
    PLAN_TAG,
    Answer,
    Consent,
    Decline,
    Offer,
    Reply,
    Task,
    one_line,
    reply_from_bytes,
    request_to_bytes,
    vector_from_bytes,
    vector_to_bytes,
)
from fedlora.common.randomness import OsRandom
from fedlora.common.state import AdapterState
from fedlora.server.bound import check_norm, update_bound
from fedlora.server.checkpoint import Checkpoint
from fedlora.server.conduct import Conducted, conclude, conduct, write_summary
from fedlora.server.manifest import make_manifest
from fedlora.server.public import PROJECTION, PublicSide, read_public
from fedlora.server.rounds import CohortSum, Failure, participants

log = logging.getLogger(__name__)

LOOK = 1.0  # seconds between two looks at who is connected
LOCK_TRIES = 60  # looks at a run that another process still holds
SAME = 1e-6  # relative: the last bits of an ε differ between machines
OUTCOME = "outcome.json"  # how a run's process ended, for who started it

Members = Callable[[], Mapping[str, PublicIdentity]]


class Carrier(Protocol):
    """Takes a request to each member named, and brings the answer, or why there is none."""

    def online(self) -> set[str]:
        """Names of the members whose node is connected."""

    def ask(self, requests: Mapping[str, bytes], deadline: float) -> Iterator[tuple[str, bytes | Failure]]:
        """Each name once, as the answers come in, within `deadline` seconds."""


@dataclass(frozen=True)
class Coordinator:
    """Who speaks for a federation, and to whom."""

    federation: str
    identity: Identity
    members: Members  # the active ones, at this moment
    former: Callable[[str], Sequence[PublicIdentity]] = lambda name: ()  # keys that a member had before


class DeploymentCohort:
    """A `Cohort` of institutions that sign what they say. `folder` is the run's."""

    def __init__(
        self,
        manifest: RunManifest,
        coordinator: Coordinator,
        carrier: Carrier,
        folder: Path,
        expected: int,
        deadline: float,
        quorum: float = 1.0,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._manifest, self._coordinator, self._carrier = manifest, coordinator, carrier
        self._folder, self._expected, self._deadline, self._sleep = folder, expected, deadline, sleep
        self._needed = max(manifest.minimum_cohort, math.ceil(quorum * expected))
        self._cost = stated_epsilon(manifest) if manifest.mode == "record" else 0.0
        self._consents: dict[str, Consent] = {}
        self._declined: dict[str, Failure] = {}
        self._read_consents()

    @property
    def consents(self) -> Mapping[str, Consent]:
        """By institution: what each reserved for this run, under which policy."""
        return dict(self._consents)

    def total(self, plan: RoundPlan, state: AdapterState) -> CohortSum:
        """The sum of the updates that count, added as they come; within the deadline, waiting for members included."""
        started = time.monotonic()
        members = self._gather()
        left = max(self._deadline - (time.monotonic() - started), self._deadline / 2)
        failures = [failure for name, failure in self._declined.items() if name in members]
        asked = participants(
            sorted(set(self._consents) & set(members)), self._manifest.participation, OsRandom()
        )
        total, replies = np.zeros(state.spec.size, dtype=np.float64), 0
        online = self._carrier.online()
        failures += [Failure(name, "not connected") for name in asked if name not in online]
        asked = [name for name in asked if name in online]
        if len(asked) < self._manifest.minimum_cohort:
            reason = f"{len(asked)} take part, expected at least {self._manifest.minimum_cohort}"
            failures.append(Failure("cohort", reason))
            asked = []  # nobody trains for a sum that may not be made
        for name, answer in self._answers(plan, state, asked, left):
            found = (
                answer if isinstance(answer, Failure) else self._judged(name, answer, plan, state, members)
            )
            if isinstance(found, Failure):
                failures.append(found)
            else:
                total += found.delta
                replies += 1
        count = max(len(asked), replies + len(failures))
        return CohortSum(total, replies, count, tuple(failures), time.monotonic() - started)

    def each(self, plan: RoundPlan, state: AdapterState) -> Iterator[Update]:
        """The updates that count, one by one."""
        members = self._gather()
        asked = sorted(set(self._consents) & set(members) & self._carrier.online())
        for name, answer in self._answers(plan, state, asked, self._deadline):
            if isinstance(answer, bytes):
                found = self._judged(name, answer, plan, state, members)
                if isinstance(found, Update):
                    yield found

    def _answers(
        self, plan: RoundPlan, state: AdapterState, asked: list[str], seconds: float
    ) -> Iterator[tuple[str, bytes | Failure]]:
        request = request_to_bytes(Task(plan.manifest, self._signed(plan), vector_to_bytes(state.vector)))
        yield from self._carrier.ask(dict.fromkeys(asked, request), seconds)

    def _signed(self, plan: RoundPlan) -> Signed:
        """The plan as it leaves: signed once, durable first, and the same bytes ever after."""
        path = self._folder / "outbox" / f"plan-{plan.attempt}.signed"
        signed = Signed.by(self._coordinator.identity, PLAN_TAG, plan.to_bytes())
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, signed.to_bytes())
        return signed

    def _judged(
        self,
        name: str,
        data: bytes,
        plan: RoundPlan,
        state: AdapterState,
        members: Mapping[str, PublicIdentity],
    ) -> Update | Failure:
        """The update, if it is this member's own answer to this plan, or why it does not count."""
        try:
            reply = self._opened(name, data, members)
            if isinstance(reply, Decline):
                return Failure(name, reply.reason, reply.refused)
            if not isinstance(reply, Answer):
                raise BadInput(f"{name}: found a {type(reply).__name__.lower()}, expected an update")
            vector = vector_from_bytes(reply.vector, state.spec.size, f"update of {name}")
            update = Update(name, reply.manifest, reply.round, reply.attempt, vector)
            update.check(plan, state.spec.size)
            check_norm(update, update_bound(self._manifest, plan.phase, state.spec.size))
        except (BadInput, Refused) as error:
            return Failure(name, one_line(str(error)))
        return update

    def _opened(self, name: str, data: bytes, members: Mapping[str, PublicIdentity]) -> Reply:
        reply = reply_from_bytes(data, self._coordinator.federation, {name: members[name]})
        if reply.manifest not in ("", self._manifest.digest):
            raise BadInput(f"{name}: found an answer for another run")
        return reply

    def _gather(self) -> Mapping[str, PublicIdentity]:
        """Members, once as many as are expected have consented and are connected, or the deadline has passed.

        Where enough for a quorum are there, the others are waited for until half of it: who is there needs the rest.
        """
        end = time.monotonic() + self._deadline
        while True:
            members, online = self._coordinator.members(), self._carrier.online()
            self._offer({name: key for name, key in members.items() if name in online})
            here = set(self._consents) & set(members) & online
            settled, now = set(self._declined) | here >= set(members), time.monotonic()
            half = now >= end - self._deadline / 2 and len(here) >= self._needed
            if len(here) >= self._expected or settled or half or now >= end:
                return members
            self._sleep(LOOK)

    def _offer(self, members: Mapping[str, PublicIdentity]) -> None:
        """Offer the run to who has not answered yet; a consent is kept as the bytes that its institution signed."""
        unasked = [name for name in members if name not in self._consents and name not in self._declined]
        if not unasked:
            return
        offer = Signed.by(self._coordinator.identity, MANIFEST_TAG, self._manifest.to_bytes())
        path = self._folder / PROJECTION
        request = request_to_bytes(Offer(offer, path.read_bytes() if path.is_file() else b""))
        enough = len(set(self._consents) & set(members)) >= self._needed
        seconds = self._deadline / 2 if enough else self._deadline
        for name, answer in self._carrier.ask(dict.fromkeys(unasked, request), seconds):
            if isinstance(answer, Failure):
                log.warning("%s: %s", name, answer.reason)
                continue
            try:
                reply = self._opened(name, answer, members)
            except (BadInput, Refused) as error:
                self._declined[name] = Failure(name, one_line(str(error)))
                continue
            if self._is_consent(reply):
                self._keep(name, answer, reply)
            else:
                reason = (
                    reply.reason if isinstance(reply, Decline) else "consents to another run or another ε"
                )
                self._declined[name] = Failure(name, reason, refused=True)
                log.warning("%s declines: %s", name, reason)

    def _keep(self, name: str, data: bytes, consent: Consent) -> None:
        folder = self._folder / "consents"
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / f"{name}.reply", data)
        self._consents[name] = consent

    def _read_consents(self) -> None:
        """Of a run that is resumed. What a former key signed is asked for anew; what nobody signed is refused."""
        members = self._coordinator.members()
        for path in sorted((self._folder / "consents").glob("*.reply")):
            if path.stem in members:
                data = path.read_bytes()
                try:
                    reply = self._opened(path.stem, data, members)
                except Refused:
                    if not self._by_former(path.stem, data):
                        raise
                    continue
                if self._is_consent(reply):
                    self._consents[path.stem] = reply

    def _by_former(self, name: str, data: bytes) -> bool:
        """Whether a key signed it that `name` had before it rotated."""
        for key in self._coordinator.former(name):
            with suppress(Refused):
                self._opened(name, data, {name: key})
                return True
        return False

    def _is_consent(self, reply: Reply) -> TypeGuard[Consent]:
        """To this run, and at no less than its schedule costs: what is released states the largest of them."""
        if not isinstance(reply, Consent) or reply.manifest != self._manifest.digest:
            return False
        return reply.epsilon >= self._cost * (1 - SAME) and reply.delta >= self._manifest.delta * (1 - SAME)


def serve(folder: Path, coordinator: Coordinator, carrier: Carrier) -> dict[str, Any]:
    """Begin the run in `folder`, or go on with it, to its summary; raises what the round loop raises."""
    config = load_config(folder / "config.toml")
    if config.aggregation.secure:
        raise BadInput("[aggregation] secure = true: not built yet between machines; expected false")
    if config.federation.clients < config.aggregation.minimum_cohort:
        raise BadInput(
            f"[federation] clients = {config.federation.clients}: expected at least the "
            f"[aggregation] minimum_cohort = {config.aggregation.minimum_cohort}"
        )
    path = folder / "checkpoint"
    if not (path / "manifest.json").exists():
        if (folder / "manifest.signed").exists():  # offered to institutions: a new one would be charged anew
            raise BadInput(f"{path / 'manifest.json'}: missing, expected that of the run that was begun")
        (folder / PROJECTION).unlink(missing_ok=True)  # of a beginning that was killed
    public = PublicSide.build(config, read_public(config), folder)
    if (path / "manifest.json").exists():
        checkpoint = Checkpoint.open(path, public.model.spec)
    else:
        checkpoint = Checkpoint.create(path, _manifest(config, public, coordinator), public.initial)
    signed = Signed.by(coordinator.identity, MANIFEST_TAG, checkpoint.manifest.to_bytes())
    write_atomically(folder / "manifest.signed", signed.to_bytes())
    federation = config.federation
    cohort = DeploymentCohort(
        checkpoint.manifest,
        coordinator,
        carrier,
        folder,
        federation.clients,
        federation.deadline,
        federation.quorum,
    )
    run = Conducted(config, folder, public, checkpoint, "flower")
    progress = conduct(run, cohort)
    stated = {name: consent.epsilon for name, consent in cohort.consents.items()}
    summary = conclude(run, progress, stated) | {"institutions": sorted(stated)}
    write_summary(folder, summary)
    return summary


def outcome_of(work: Callable[[], object], folder: Path, token: str) -> None:
    """Run `work` and leave in `folder` how it ended: the exit code, and one line to a fault.

    One process works on a run at a time; `token` says which one, for one whose SuperLink was killed may end late.
    """
    try:
        with _only_process(folder):
            work()
        found = {"code": 0, "message": ""}
    except FedloraError as error:
        found = {"code": error.exit_code, "message": str(error)}
    except BaseException as error:
        log.exception("the run ended unexpectedly")
        found = {"code": 1, "message": f"{type(error).__name__}: {error}"}
    write_atomically(folder / f"outcome-{token}.json", json.dumps(found).encode())


@contextmanager
def _only_process(folder: Path) -> Iterator[None]:
    """The run's own lock; FedloraError where another process does not give it up."""
    with (folder / "lock").open("a") as lock:
        for _ in range(LOCK_TRIES):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(LOOK)
        else:
            raise FedloraError(f"{folder}: found another process that carries this run out, expected none")
        yield


def _manifest(config: Config, public: PublicSide, coordinator: Coordinator) -> RunManifest:
    model = public.model
    projection = "" if model.projection is None else model.projection.digest
    return make_manifest(
        config,
        model.task.labels,
        model.base_digest,
        model.spec.digest,
        projection,
        default_cache(),
        coordinator.federation,
        config.aggregation.minimum_cohort,
    )
