"""A `Cohort` that learns sums only: the round loop's seam over `server.secagg`.

    an epoch      offer -> deal                 when the last one is used up, or an attempt was lost
    an attempt    input -> confirm -> open      the three exchanges of a steady round

An `Exchange` knows who may be asked, and carries bytes to institutions and back: in one process, or
signed between machines. Whoever does not answer, or answers what does not count, is a drop-out of
that stage.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from fedlora.common.errors import BadInput, QuorumLost, Refused
from fedlora.common.manifest.counts import answer_spec
from fedlora.common.manifest.manifest import RunManifest
from fedlora.common.manifest.plan import RoundPlan
from fedlora.common.manifest.turns import placed
from fedlora.common.model.state import AdapterSpec, AdapterState
from fedlora.common.privacy.modes import guarantee_of
from fedlora.common.protocol import stages
from fedlora.common.protocol.stages import Stage
from fedlora.common.secagg.ring import Encoding
from fedlora.common.secagg.wire import Epoch
from fedlora.common.trust.identity import PublicIdentity
from fedlora.server.rounds.cohort import CohortSum, Failure, SecureRecord
from fedlora.server.secagg.attempt import Listed, SecureSum, ServerAttempt
from fedlora.server.secagg.epoch import ServerEpoch
from fedlora.server.secagg.log import SumLog

log = logging.getLogger(__name__)


class Exchange(Protocol):
    """Whoever can be asked: who they are, and one request carried to each."""

    def gather(self) -> Mapping[str, PublicIdentity]:
        """Whose signatures count in the attempt that begins now."""

    def asked(
        self, members: Mapping[str, PublicIdentity], plan: RoundPlan
    ) -> tuple[list[str], list[Failure]]:
        """Whom to ask for this attempt, and who is none of them."""

    def needed(self, of: int) -> int:
        """Updates without which a sum that `of` institutions were asked for does not count."""

    def ask(
        self, stage: str, messages: Mapping[str, bytes], plan: RoundPlan, state: AdapterState
    ) -> Iterator[tuple[str, bytes | Failure]]:
        """Each name once, as answers come in; the stage `input` carries plan and state too."""


@dataclass(eq=False)
class _EpochInUse:
    """An epoch whose U2 is fixed, and to whom it still has to be delivered."""

    listed: Listed
    deliver: Callable[[str], bytes]
    undelivered: set[str]


@dataclass(frozen=True, eq=False)
class _Attempt:
    """What an attempt asks, of whom, how many must be in its sum, and who failed so far."""

    plan: RoundPlan
    state: AdapterState
    answers: AdapterSpec
    members: Mapping[str, PublicIdentity]
    asked: Sequence[str]
    needed: int
    failures: _Failures


class SecureCohort:
    """Gives the sum of the updates of whom `exchange` names; single updates it can't give.

    A sum of fewer than are needed is not unmasked. `kept` holds what is about to be learnt, and
    knows liars and keys from before a restart.
    """

    def __init__(
        self, manifest: RunManifest, exchange: Exchange, kept: SumLog | None = None
    ) -> None:
        if manifest.secure is None:
            raise BadInput("manifest secure: found none, expected the terms of secure aggregation")
        self._manifest, self._terms = manifest, manifest.secure
        self._exchange = exchange
        self._kept = SumLog() if kept is None else kept
        self._epoch: _EpochInUse | None = None
        self._suspected: set[str] = set()  # left out of later epochs where enough others are there

    def total(self, plan: RoundPlan, state: AdapterState) -> CohortSum:
        """The sum of one attempt; without replies where too few stayed: nothing was unmasked."""
        started = time.monotonic()
        members = self._exchange.gather()
        asked, declined = self._exchange.asked(members, plan)
        needed = self._exchange.needed(len(asked) + len(declined))
        answers = answer_spec(self._manifest, plan.phase, state.spec)
        attempt = _Attempt(plan, state, answers, members, asked, needed, _Failures())
        total, record, replies = np.zeros(answers.size, dtype=np.float64), None, 0
        if asked:
            try:
                result, record = self._sum(self._epoch_for(attempt), attempt)
                total, replies = self._decoded(result, plan, answers), len(result.members)
            except (QuorumLost, BadInput) as error:
                self._epoch = None  # whoever is left meets in a new one
                attempt.failures.add(Failure("cohort", str(error)), counts=False)
        failures = (*declined, *attempt.failures.found())
        count = len(asked) + len(declined) if asked else 0
        return CohortSum(total, replies, count, failures, time.monotonic() - started, record)

    def _epoch_for(self, attempt: _Attempt) -> _EpochInUse:
        """The epoch that this attempt belongs to; a new one where there is none."""
        if self._epoch is None or not self._goes_on(self._epoch.listed, attempt):
            self._epoch = self._begun(attempt)
        return self._epoch

    @staticmethod
    def _goes_on(listed: Listed, attempt: _Attempt) -> bool:
        """Not beyond the epoch, nor where too few dealt, nor after a revocation or new key."""
        members, number = attempt.members, attempt.plan.attempt
        same = all(members.get(name) == listed.identities[name] for name in listed.offers)
        return same and len(listed.deals) >= attempt.needed and number in listed.epoch.attempts

    def _begun(self, attempt: _Attempt) -> _EpochInUse:
        """Stages 1 and 2: keys and shares of a new epoch."""
        manifest, number = self._manifest, attempt.plan.attempt
        last = sum(phase.attempts for phase in manifest.accounted)
        count = max(1, min(self._terms.epoch_attempts, last - number + 1))
        # Numbered by its first attempt: above all epochs that nodes remember, whatever restarted.
        epoch = Epoch(manifest.federation, manifest.digest, number, number, count)
        smallest = max(manifest.minimum_cohort, attempt.needed)
        colluders = self._terms.max_colluders
        server = ServerEpoch(epoch, attempt.members, smallest, self._kept, colluders)
        heard = self._within(attempt, self._heard(attempt, smallest))
        offers = dict.fromkeys(heard, epoch.to_bytes())
        here = self._collect(Stage.OFFER, offers, attempt, server.add_offer)
        cohort_list = server.close_offers()
        for name in sorted(set(here) - set(server.members)):
            reason = f"left out: no cohort of {len(here)} bears the colluders assumed"
            attempt.failures.add(Failure(name, reason))
        deals = dict.fromkeys(server.members, cohort_list)
        self._collect(Stage.DEAL, deals, attempt, server.add_deal)
        listed = server.close_deals()
        return _EpochInUse(listed, server.delivery, set(listed.deals))

    def _heard(self, attempt: _Attempt, smallest: int) -> list[str]:
        """Who may be in a new epoch: not who is proven to lie.

        Nor the suspected, while enough others are left; unproven, nobody ends a run.
        """
        liars = self._kept.liars
        for liar in sorted(liars & set(attempt.asked)):
            reason = "left out: it signed a lie in an earlier attempt of this run"
            attempt.failures.add(Failure(liar, reason))
        names = [name for name in attempt.asked if name not in liars]
        others = [name for name in names if name not in self._suspected]
        if len(others) < smallest:
            return names
        for name in sorted(set(names) - set(others)):
            reason = "left out: several say that its shares do not open, which is no proof"
            attempt.failures.add(Failure(name, reason))
        return others

    def _within(self, attempt: _Attempt, names: list[str]) -> list[str]:
        """As many as the manifest allows a cohort, where parts of a noise follow from that."""
        most = self._manifest.largest_cohort or len(names)
        for name in names[most:]:
            reason = f"left out: the manifest has cohorts of {most} at most"
            attempt.failures.add(Failure(name, reason))
        return names[:most]

    def _sum(self, epoch: _EpochInUse, attempt: _Attempt) -> tuple[SecureSum, SecureRecord]:
        """Stages 3 to 6, over all of U2: who drops out of one attempt may be back in the next."""
        plan, listed = attempt.plan, epoch.listed
        slot = stages.slot_of(plan, self._manifest.base_digest)
        encoding = self._encoding(plan, attempt.answers)
        server = ServerAttempt(listed, slot, encoding, attempt.needed)
        messages = {
            name: epoch.deliver(name) if name in epoch.undelivered else b"" for name in listed.deals
        }

        def add_input(data: bytes) -> str:
            name = server.add_input(data)
            epoch.undelivered.discard(name)
            return name

        inside = self._collect(Stage.INPUT, messages, attempt, add_input)
        survivors = dict.fromkeys(inside, server.close_inputs())
        here = self._collect(Stage.CONFIRM, survivors, attempt, server.add_confirmation)
        agreement = dict.fromkeys(here, server.agreement())
        record = SecureRecord(
            plan.round,
            plan.attempt,
            len(attempt.asked),
            len(listed.offers),
            len(listed.deals),
            len(inside),
            len(here),
            opened=None,
            threshold=listed.threshold,
            colluders=self._terms.max_colluders,
        )
        self._kept.note(record)  # from here on it may be learnt
        opened = self._collect(Stage.OPEN, agreement, attempt, server.add_opening)
        try:
            result = server.result()
        finally:
            liars, suspected = server.liars, tuple(server.suspected)
            record = replace(record, opened=len(opened), liars=liars, suspected=suspected)
            self._kept.note(record)
            self._suspect(server, plan.round)
        return result, record

    def _suspect(self, server: ServerAttempt, round_number: int) -> None:
        """Say who lied, and whose shares too many say do not open: not heard in later epochs."""
        for liar in server.liars:
            log.warning(
                "round %d: %s signed a share that is not what was dealt", round_number, liar
            )
        for dealer, without in server.suspected.items():
            names = ", ".join(without)
            log.warning(
                "round %d: %s say that the shares of %s do not open; no proof",
                round_number,
                names,
                dealer,
            )
            self._suspected.add(dealer)

    def _collect(
        self,
        stage: str,
        messages: Mapping[str, bytes],
        attempt: _Attempt,
        take: Callable[[bytes], str],
    ) -> list[str]:
        """Ask, check and take each answer; who counted, in the order of the answers."""
        counted = []
        for name, answer in self._exchange.ask(stage, messages, attempt.plan, attempt.state):
            if isinstance(answer, Failure):
                attempt.failures.add(answer)
                continue
            try:
                signer = take(answer)
            except (BadInput, Refused) as error:
                attempt.failures.add(Failure(name, f"{stage}: {error}"))
                continue
            if signer != name:
                log.warning("%s: %s carried what %s had signed", stage, name, signer)
            counted.append(signer)
        return counted

    def _encoding(self, plan: RoundPlan, spec: AdapterSpec) -> Encoding:
        size = int(self._manifest.leaving(spec, plan.round).sum())
        noise = guarantee_of(self._manifest).member_noise(plan.phase)
        return stages.encoding_of(self._terms, plan.phase, size, noise)

    def _decoded(
        self, result: SecureSum, plan: RoundPlan, spec: AdapterSpec
    ) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        """The sum in the adapter's units; BadInput if its mean is longer than any honest one.

        Whose update moves what its phase leaves alone is hidden in the sum; what it moved there is
        left out.
        """
        total = self._encoding(plan, spec).decode(result.levels)
        bound = guarantee_of(self._manifest).update_bound(plan.phase, len(total))
        norm = float(np.linalg.norm(total)) / len(result.members)
        if not norm <= bound * (1 + 1e-6):
            raise BadInput(
                f"sum: found a mean update of norm {norm:.4g}, expected at most {bound:.4g}"
            )
        moved = spec.moved_by(self._manifest.recipe_of(plan.round).name)
        return np.where(moved, placed(total, self._manifest.leaving(spec, plan.round)), 0.0)


class _Failures:
    """The first failure of each institution in an attempt."""

    def __init__(self) -> None:
        self._by_name: dict[str, Failure] = {}
        self._others: list[Failure] = []

    def add(self, failure: Failure, counts: bool = True) -> None:
        if counts:
            self._by_name.setdefault(failure.client, failure)
        else:
            self._others.append(failure)

    def found(self) -> tuple[Failure, ...]:
        """Refusals alone where nothing else is in the way: the round loop ends refused."""
        first = list(self._by_name.values())
        if first and all(failure.refused for failure in first):
            return tuple(first)
        return (*self._others, *first)
