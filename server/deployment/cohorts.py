"""Cohorts of institutions on machines of their own: in clear, and under masks."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np

from fedlora.common.disk.files import write_atomically
from fedlora.common.errors import BadInput, Refused
from fedlora.common.manifest.plan import RoundPlan, Update
from fedlora.common.model.state import AdapterSpec, AdapterState
from fedlora.common.privacy.modes import guarantee_of
from fedlora.common.privacy.norm_bound import check_norm
from fedlora.common.protocol.messages import (
    PLAN_TAG,
    STAGE_TAG,
    Answer,
    Decline,
    SignedStage,
    Staged,
    Task,
    request_to_bytes,
    vector_from_bytes,
    vector_to_bytes,
)
from fedlora.common.protocol.stages import Request, Stage
from fedlora.common.terminal import one_line
from fedlora.common.trust.identity import PublicIdentity, Signed
from fedlora.server.deployment.participants import Lazy, Participants
from fedlora.server.rounds.cohort import Cohort, CohortSum, Failure
from fedlora.server.secagg.log import liars_in, note_in
from fedlora.server.secagg.seen_keys import SeenKeys
from fedlora.server.secagg.sums import SecureCohort

QUICK = 30.0  # seconds at most for a stage in which nobody trains, and
# of what is left of the attempt's deadline
PARTS: dict[str, float] = {Stage.OFFER: 0.25, Stage.DEAL: 0.25, Stage.CONFIRM: 0.5, Stage.OPEN: 1.0}


class ClearCohort:
    """A `Cohort` of institutions that sign what they say and send noised updates in clear."""

    def __init__(self, who: Participants) -> None:
        self._who = who

    def total(self, plan: RoundPlan, state: AdapterState) -> CohortSum:
        """The sum of the updates that count, added as they come.

        Within the deadline, waiting for members included.
        """
        started = time.monotonic()
        members = self._who.gather()
        asked, failures = self._who.asked(members)
        total, replies = np.zeros(state.spec.size, dtype=np.float64), 0
        for name, answer in self._answers(plan, state, asked):
            found = (
                answer
                if isinstance(answer, Failure)
                else self._judged(name, answer, plan, state, members)
            )
            if isinstance(found, Failure):
                failures.append(found)
            else:
                total += found.delta
                replies += 1
        count = max(len(asked), replies + len(failures))
        return CohortSum(total, replies, count, tuple(failures), time.monotonic() - started)

    def _answers(
        self, plan: RoundPlan, state: AdapterState, asked: list[str]
    ) -> Iterator[tuple[str, bytes | Failure]]:
        request = request_to_bytes(
            Task(plan.manifest, self._signed(plan), vector_to_bytes(state.vector))
        )
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
                raise BadInput(
                    f"{name}: found a {type(reply).__name__.lower()}, expected an update"
                )
            vector = vector_from_bytes(reply.vector, state.spec.size, f"update of {name}")
            update = Update(name, reply.manifest, reply.round, reply.attempt, vector)
            update.check(plan, state.spec.size)
            _check_moved(update, self._who.manifest.phases[plan.phase].name, state.spec)
            guarantee = guarantee_of(self._who.manifest)
            check_norm(update, guarantee.update_bound(plan.phase, state.spec.size))
        except (BadInput, Refused) as error:
            return Failure(name, one_line(str(error)))
        return update


def _check_moved(update: Update, phase: str, spec: AdapterSpec) -> None:
    """BadInput where it moves what its phase leaves alone: neither clipped nor noised by anyone."""
    if update.delta[~spec.moved_by(phase)].any():
        raise BadInput(
            f"update of {update.client}: found a coordinate moved that phase {phase} leaves alone,"
            " expected 0"
        )


class SignedStages:
    """An `Exchange` of secure aggregation between machines: requests and answers are signed."""

    def __init__(self, who: Participants) -> None:
        self._who = who

    def ask(
        self, stage: str, messages: Mapping[str, bytes], plan: RoundPlan, state: AdapterState
    ) -> Iterator[tuple[str, bytes | Failure]]:
        """Each name once, as the answers come in."""
        members = self._who.coordinator.members()
        vector = vector_to_bytes(state.vector) if stage == Stage.INPUT else b""
        key = self._who.coordinator.identity

        def signed(name: str) -> bytes:
            body = Request(stage, name, plan, messages[name], vector).to_bytes()
            return request_to_bytes(SignedStage(Signed.by(key, STAGE_TAG, body)))

        for name, answer in self._who.take(Lazy(messages, signed), self._seconds(stage)):
            yield (
                name,
                (
                    answer
                    if isinstance(answer, Failure)
                    else self._message(name, answer, plan, members)
                ),
            )

    def _seconds(self, stage: str) -> float:
        """Training may use all that the two stages after it need not."""
        left = self._who.left
        return (
            left - 2 * min(QUICK, left / 5)
            if stage == Stage.INPUT
            else min(QUICK, PARTS[stage] * left)
        )

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
        if not isinstance(reply, Staged) or (reply.round, reply.attempt) != (
            plan.round,
            plan.attempt,
        ):
            return Failure(
                name, f"found a {type(reply).__name__.lower()} of another attempt or kind"
            )
        return reply.message


class MaskedCohort:
    """A `Cohort` of institutions whose updates leave under masks; nobody knows single ones."""

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
        """The sum of one attempt; without replies where too few stayed: nothing was unmasked."""
        self._asked, failures = self._who.asked(self._who.gather())
        self._declined = len(failures)
        found = self._sums.total(plan, state)
        count = max(found.asked, found.replies + len(failures) + len(found.failures))
        # Whose update moves what its phase leaves alone is hidden in the sum; what it moved there
        # is left out.
        moved = state.spec.moved_by(self._who.manifest.phases[plan.phase].name)
        total = np.where(moved, found.total, 0.0)
        return replace(found, total=total, asked=count, failures=(*failures, *found.failures))


def cohort_of(who: Participants) -> Cohort:
    """What the manifest promised to the institutions, and nothing less."""
    return ClearCohort(who) if who.manifest.secure is None else MaskedCohort(who)
