"""A run between real machines: the round loop of the simulator over institutions that answer for themselves.

    1. who takes part                                                                (server.participants)
    2. in clear: one signed plan an attempt; its exact bytes are on disk before they are sent. A reply counts
       where its institution signed it, for this run, round and attempt, and it is finite, of the right shape,
       and within the public bound on its norm
    3. under masks: one signed request a stage; what comes back is for the state machines of server.secagg
    4. all else is the simulator's: the loop, the checkpoint, the strategies, the summary

A `Carrier` takes bytes to members and brings bytes back; Flower's grid is one, the tests have another.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fedlora.common.config import Config, load_config
from fedlora.common.errors import BadInput, Refused
from fedlora.common.files import write_atomically
from fedlora.common.identity import PublicIdentity, Signed
from fedlora.common.messages import RoundPlan, RunManifest, Update
from fedlora.common.privacy import default_cache, stated_epsilon
from fedlora.common.projection import PROJECTION
from fedlora.common.protocol import (
    MANIFEST_TAG,
    PLAN_TAG,
    STAGE_TAG,
    Answer,
    Consent,
    Decline,
    Stage,
    Staged,
    Task,
    one_line,
    request_to_bytes,
    vector_from_bytes,
    vector_to_bytes,
)
from fedlora.common.secagg.requests import CONFIRM, DEAL, INPUT, OFFER, OPEN, Request
from fedlora.common.state import AdapterSpec, AdapterState
from fedlora.server.bound import check_norm, update_bound
from fedlora.server.checkpoint import Checkpoint
from fedlora.server.conduct import Conducted, conclude, conduct, has_result, to_its_end, write_summary
from fedlora.server.manifest import make_manifest
from fedlora.server.participants import Carrier, Coordinator, Lazy, Participants
from fedlora.server.public import PublicSide, read_public
from fedlora.server.rounds import Cohort, CohortSum, Failure
from fedlora.server.secure_cohort import SecureCohort
from fedlora.server.secure_log import liars_in, note_in
from fedlora.server.seen_keys import SeenKeys

QUICK = 30.0  # seconds at most for a stage in which nobody trains, and
PARTS = {OFFER: 0.25, DEAL: 0.25, CONFIRM: 0.5, OPEN: 1.0}  # of what is left of the attempt's deadline


class ClearCohort:
    """A `Cohort` of institutions that sign what they say, and send their noised updates as they are."""

    def __init__(self, who: Participants) -> None:
        self._who = who

    def total(self, plan: RoundPlan, state: AdapterState) -> CohortSum:
        """The sum of the updates that count, added as they come; within the deadline, waiting for members included."""
        started = time.monotonic()
        members = self._who.gather()
        asked, failures = self._who.asked(members)
        total, replies = np.zeros(state.spec.size, dtype=np.float64), 0
        for name, answer in self._answers(plan, state, asked):
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
        members = self._who.gather()
        for name, answer in self._answers(plan, state, self._who.asked(members)[0]):
            if isinstance(answer, bytes):
                found = self._judged(name, answer, plan, state, members)
                if isinstance(found, Update):
                    yield found

    def _answers(
        self, plan: RoundPlan, state: AdapterState, asked: list[str]
    ) -> Iterator[tuple[str, bytes | Failure]]:
        request = request_to_bytes(Task(plan.manifest, self._signed(plan), vector_to_bytes(state.vector)))
        yield from self._who.take(dict.fromkeys(asked, request), self._who.left)

    def _signed(self, plan: RoundPlan) -> Signed:
        """The plan as it leaves: signed once, durable first, and the same bytes ever after."""
        path = self._who.folder / "outbox" / f"plan-{plan.attempt}.signed"
        signed = Signed.by(self._who.coordinator.identity, PLAN_TAG, plan.to_bytes())
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
            reply = self._who.opened(name, data, members)
            if isinstance(reply, Decline):
                return Failure(name, reply.reason, reply.refused)
            if not isinstance(reply, Answer):
                raise BadInput(f"{name}: found a {type(reply).__name__.lower()}, expected an update")
            vector = vector_from_bytes(reply.vector, state.spec.size, f"update of {name}")
            update = Update(name, reply.manifest, reply.round, reply.attempt, vector)
            update.check(plan, state.spec.size)
            _check_moved(update, self._who.manifest.phases[plan.phase].name, state.spec)
            check_norm(update, update_bound(self._who.manifest, plan.phase, state.spec.size))
        except (BadInput, Refused) as error:
            return Failure(name, one_line(str(error)))
        return update


def _check_moved(update: Update, phase: str, spec: AdapterSpec) -> None:
    """BadInput where it moves what its phase leaves alone: such a coordinate is neither clipped nor noised by anybody."""
    if update.delta[~spec.moved_by(phase)].any():
        raise BadInput(
            f"update of {update.client}: found a coordinate moved that phase {phase} leaves alone, expected 0"
        )


class SignedStages:
    """An `Exchange` of secure aggregation between machines: each request signed, each answer its member's own."""

    def __init__(self, who: Participants) -> None:
        self._who = who

    def ask(
        self, stage: str, messages: Mapping[str, bytes], plan: RoundPlan, state: AdapterState
    ) -> Iterator[tuple[str, bytes | Failure]]:
        """Each name once, as the answers come in."""
        members = self._who.coordinator.members()
        vector = vector_to_bytes(state.vector) if stage == INPUT else b""
        key = self._who.coordinator.identity

        def signed(name: str) -> bytes:
            body = Request(stage, name, plan, messages[name], vector).to_bytes()
            return request_to_bytes(Stage(Signed.by(key, STAGE_TAG, body)))

        for name, answer in self._who.take(Lazy(messages, signed), self._seconds(stage)):
            yield (
                name,
                answer if isinstance(answer, Failure) else self._message(name, answer, plan, members),
            )

    def _seconds(self, stage: str) -> float:
        """Training may use all that the two stages after it need not."""
        left = self._who.left
        return left - 2 * min(QUICK, left / 5) if stage == INPUT else min(QUICK, PARTS[stage] * left)

    def _message(
        self, name: str, data: bytes, plan: RoundPlan, members: Mapping[str, PublicIdentity]
    ) -> bytes | Failure:
        """What the node says to the stage; whom and what it binds is checked by `server.secagg`."""
        try:
            reply = self._who.opened(name, data, members)
        except (BadInput, Refused) as error:
            return Failure(name, one_line(str(error)))
        if isinstance(reply, Decline):
            return Failure(name, reply.reason, reply.refused)
        if not isinstance(reply, Staged) or (reply.round, reply.attempt) != (plan.round, plan.attempt):
            return Failure(name, f"found a {type(reply).__name__.lower()} of another attempt or kind")
        return reply.message


class MaskedCohort:
    """A `Cohort` of institutions whose updates leave them under masks; single ones are known to nobody."""

    def __init__(self, who: Participants) -> None:
        self._who = who
        self._asked: list[str] = []
        self._declined = 0
        self._sums = SecureCohort(
            who.manifest,
            who.coordinator.members,
            SignedStages(who),
            lambda plan: self._asked,
            lambda asked: who.needed(asked + self._declined),
            note_in(who.folder),
            liars_in(who.folder),
            SeenKeys(who.folder),
        )

    def total(self, plan: RoundPlan, state: AdapterState) -> CohortSum:
        """The sum of one attempt; without replies where too few stayed, and then nothing was unmasked."""
        self._asked, failures = self._who.asked(self._who.gather())
        self._declined = len(failures)
        found = self._sums.total(plan, state)
        count = max(found.asked, found.replies + len(failures) + len(found.failures))
        # Whose update moves what its phase leaves alone is hidden in the sum; what it moved there is left out.
        moved = state.spec.moved_by(self._who.manifest.phases[plan.phase].name)
        total = np.where(moved, found.total, 0.0)
        return replace(found, total=total, asked=count, failures=(*failures, *found.failures))

    def each(self, plan: RoundPlan, state: AdapterState) -> Iterator[Update]:
        """Refused: nobody has them."""
        return self._sums.each(plan, state)


def cohort_of(who: Participants) -> Cohort:
    """What the manifest promised to the institutions, and nothing less."""
    return ClearCohort(who) if who.manifest.secure is None else MaskedCohort(who)


def serve(folder: Path, coordinator: Coordinator, carrier: Carrier) -> dict[str, Any]:
    """Begin the run in `folder`, or go on with it, to its summary; raises what the round loop raises.

    A run that ends early leaves its last adapter and its summary all the same: an export tells what became of it.
    """
    config = load_config(folder / "config.toml")
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
    who = Participants(
        checkpoint.manifest,
        coordinator,
        carrier,
        folder,
        federation.clients,
        federation.deadline,
        federation.quorum,
    )
    run = Conducted(config, folder, public, checkpoint, "flower")
    progress, ended = to_its_end(checkpoint, lambda: conduct(run, cohort_of(who)))
    if has_result(progress, ended):
        stated = {name: _stated(checkpoint.manifest, consent) for name, consent in who.consents.items()}
        summary = conclude(run, progress, stated) | {
            "institutions": sorted(stated),
            "ended": str(ended or ""),
        }
        write_summary(folder, summary)
    if ended is not None:
        raise ended
    return summary


def _stated(manifest: RunManifest, consent: Consent) -> float:
    """ε for the unit of this run's mode: for an institution it is less than what a consent charges for records."""
    return stated_epsilon(manifest) if manifest.mode == "client" else consent.epsilon


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
        moved=model.spec.moved,
    )
