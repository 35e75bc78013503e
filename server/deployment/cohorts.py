"""Cohorts of institutions on machines of their own: in clear, and under masks."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping

from fedlora.common.disk.files import write_atomically
from fedlora.common.disk.mapped import mapped
from fedlora.common.errors import BadInput
from fedlora.common.manifest.counts import answer_spec
from fedlora.common.manifest.plan import RoundPlan, Update
from fedlora.common.manifest.turns import placed
from fedlora.common.model.state import AdapterSpec, AdapterState, Vector
from fedlora.common.privacy.modes import guarantee_of
from fedlora.common.privacy.norm_bound import check_norm
from fedlora.common.protocol.messages import PLAN_TAG, Answer, Task, request_to_bytes
from fedlora.common.protocol.pieces import Parted
from fedlora.common.protocol.vectors import vector_from_bytes, vector_to_bytes
from fedlora.common.trust.identity import PublicIdentity, Signed
from fedlora.server.deployment.institutions import Institutions
from fedlora.server.deployment.transfers import Transfer
from fedlora.server.rounds.cohort import Cohort, CohortSum, Failure
from fedlora.server.secagg.log import SumLog
from fedlora.server.secagg.sums import SecureCohort
from fedlora.server.strategies.gathered import Gather, Summed, gathering_of


class ClearCohort:
    """A `Cohort` of institutions that sign what they say and send noised updates in clear."""

    def __init__(self, who: Institutions, gather: Gather = Summed) -> None:
        self._who, self._gather = who, gather

    def total(self, plan: RoundPlan, state: AdapterState) -> CohortSum:
        """The sum of the updates that count, or what a robust mean makes of them.

        Within the deadline, waiting for members included.
        """
        started = time.monotonic()
        members = self._who.gather()
        asked, failures = self._who.asked(members, plan)
        declined = len(failures)
        answers = answer_spec(self._who.manifest, plan.phase, state.spec)
        gathered = gathering_of(self._gather, answers, state)
        transfer = self._who.transfer(plan, state, members) if asked else None
        if transfer:
            transfer.begin()
        for name, answer in self._answers(plan, state, asked, transfer):
            found = (
                answer
                if isinstance(answer, Failure)
                else self._judged(name, answer, plan, answers, members, transfer)
            )
            if isinstance(found, Failure):
                failures.append(found)
            else:
                gathered.add(found.delta, name)
        if transfer:
            transfer.end()
        count = len(asked) + declined if asked else 0
        seconds = time.monotonic() - started
        found_in_all = (gathered.total(), gathered.count, count, tuple(failures), seconds)
        return CohortSum(*found_in_all, each=gathered.each)

    def _answers(
        self, plan: RoundPlan, state: AdapterState, asked: list[str], transfer: Transfer | None
    ) -> Iterator[tuple[str, bytes | Failure]]:
        vector = b"" if transfer else vector_to_bytes(state.vector)
        request = request_to_bytes(Task(plan.manifest, self._signed(plan), vector))
        yield from self._who.take(dict.fromkeys(asked, request), self._who.left, transfer)

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
        spec: AdapterSpec,
        members: Mapping[str, PublicIdentity],
        transfer: Transfer | None,
    ) -> Update | Failure:
        """The update, if it is this member's own answer to this plan, or why it does not count."""
        reply = self._who.heard(name, data, members)
        if isinstance(reply, Failure):
            return reply
        try:
            if not isinstance(reply, Answer | Parted):
                kind = type(reply).__name__.lower()
                raise BadInput(f"{name}: found a {kind}, expected an update")
            manifest = self._who.manifest
            vector, count = self._placed(name, _carried(name, reply, transfer), plan, spec)
            update = Update(name, reply.manifest, reply.round, reply.attempt, vector)
            update.check(plan, spec.size)
            _check_moved(update, manifest.recipe_of(plan.round).name, spec)
            check_norm(update, guarantee_of(manifest).update_bound(plan.phase, count))
        except BadInput as error:
            return Failure(name, str(error))
        return update

    def _placed(
        self, name: str, data: bytes | memoryview, plan: RoundPlan, spec: AdapterSpec
    ) -> tuple[Vector, int]:
        """The (size,) update, and how many coordinates of it left."""
        leaving = self._who.manifest.leaving(spec, plan.round)
        count, wire = int(leaving.sum()), self._who.manifest.wire
        return placed(vector_from_bytes(data, count, f"update of {name}", wire), leaving), count


def _carried(name: str, reply: Answer | Parted, transfer: Transfer | None) -> bytes | memoryview:
    """The update's bytes: in the reply, or as they came in parts, each of which was checked."""
    if isinstance(reply, Answer):
        return reply.vector
    if transfer is None:
        raise BadInput(f"{name}: found an update in parts, expected it whole")
    return mapped(transfer.whole(name, reply.parts))


def _check_moved(update: Update, moves: str, spec: AdapterSpec) -> None:
    """BadInput where it moves what its phase leaves alone: neither clipped nor noised by anyone."""
    moved = spec.moved_by(moves)
    if not moved.all() and update.delta[~moved].any():
        raise BadInput(
            f"update of {update.client}: found a coordinate moved that phase {moves} leaves alone,"
            " expected 0"
        )


def cohort_of(who: Institutions, gather: Gather = Summed) -> Cohort:
    """What the manifest promised to the institutions, and nothing less."""
    if who.manifest.secure is None:
        return ClearCohort(who, gather)
    return SecureCohort(who.manifest, who, SumLog(who.folder))
