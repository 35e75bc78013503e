"""A `Cohort` that learns sums only: the round loop's seam over `server.secagg`.

    an epoch      offer -> deal                 when the last one is used up, or an attempt was lost
    an attempt    input -> confirm -> open      the three exchanges of a steady round

An `Exchange` carries bytes to institutions and back: in one process, through Flower's grid, or
between machines. Whoever does not answer, or answers what does not count, is a drop-out of that
stage.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from fedlora.common.errors import BadInput, QuorumLost, Refused
from fedlora.common.manifest.manifest import RunManifest, SecureTerms
from fedlora.common.manifest.plan import RoundPlan
from fedlora.common.model.state import AdapterState
from fedlora.common.privacy.modes import guarantee_of
from fedlora.common.protocol import stages
from fedlora.common.protocol.stages import Stage
from fedlora.common.secagg.ring import Encoding
from fedlora.common.secagg.wire import Epoch
from fedlora.common.terminal import one_line
from fedlora.common.trust.identity import PublicIdentity
from fedlora.server.rounds.cohort import CohortSum, Failure, SecureRecord
from fedlora.server.secagg.attempt import Listed, SecureSum, ServerAttempt
from fedlora.server.secagg.epoch import ServerEpoch
from fedlora.server.secagg.seen_keys import SeenKeys

log = logging.getLogger(__name__)


class Exchange(Protocol):
    """Carries one request to each institution and brings its answer, or why there is none."""

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


class SecureCohort:
    """Asks `choose(plan)` and gives the sum of their updates; single updates it can't give.

    `members` are the identities that count, read anew for each attempt. `needed` says how many of
    those asked must be in a sum that counts: a smaller one is not unmasked. `note` keeps what is
    about to be learnt; `liars` and `seen` keys are known from before a restart.
    """

    def __init__(
        self,
        manifest: RunManifest,
        members: Callable[[], Mapping[str, PublicIdentity]],
        exchange: Exchange,
        choose: Callable[[RoundPlan], Sequence[str]],
        needed: Callable[[int], int] = lambda asked: 1,
        note: Callable[[SecureRecord], None] = lambda record: None,
        liars: Iterable[str] = (),
        seen: SeenKeys | None = None,
    ) -> None:
        if manifest.secure is None:
            raise BadInput("manifest secure: found none, expected the terms of secure aggregation")
        self._manifest, self._terms = manifest, manifest.secure
        self._members, self._exchange, self._choose = members, exchange, choose
        self._needed, self._note = needed, note
        self._epoch: _EpochInUse | None = None
        self._seen = SeenKeys() if seen is None else seen
        self._liars = set(liars)  # proven by their signatures: left out of later epochs
        self._suspected: set[str] = set()  # left out of later epochs where enough others are there

    def total(self, plan: RoundPlan, state: AdapterState) -> CohortSum:
        """The sum of one attempt; without replies where too few stayed: nothing was unmasked."""
        started = time.monotonic()
        asked, failures = list(self._choose(plan)), _Failures()
        total, record, replies = np.zeros(state.spec.size, dtype=np.float64), None, 0
        if asked:
            try:
                epoch = self._epoch_for(plan, state, asked, failures)
                result, record = self._attempt(epoch, plan, state, len(asked), failures)
                total = self._decoded(result, plan, state.spec.size)
                replies = len(result.members)
            except (QuorumLost, BadInput) as error:
                self._epoch = None  # whoever is left meets in a new one
                failures.add(Failure("cohort", one_line(str(error))), counts=False)
        seconds = time.monotonic() - started
        return CohortSum(total, replies, len(asked), failures.found(), seconds, record)

    def _epoch_for(
        self, plan: RoundPlan, state: AdapterState, asked: Sequence[str], failures: _Failures
    ) -> _EpochInUse:
        """The epoch that this attempt belongs to; a new one where there is none."""
        members, needed = self._members(), self._needed(len(asked))
        if self._epoch is not None and self._goes_on(self._epoch.listed, plan, members, needed):
            return self._epoch
        manifest = self._manifest
        last = sum(phase.attempts for phase in manifest.phases)
        count = max(1, min(self._terms.epoch_attempts, last - plan.attempt + 1))
        # Numbered by its first attempt: above all epochs that nodes remember, whatever restarted.
        epoch = Epoch(manifest.federation, manifest.digest, plan.attempt, plan.attempt, count)
        smallest = max(manifest.minimum_cohort, needed)
        server = ServerEpoch(epoch, members, smallest, self._seen, self._terms.max_colluders)
        request = epoch.to_bytes()
        liars = self._liars | self._seen.liars
        for liar in sorted(liars & set(asked)):
            failures.add(
                Failure(liar, "left out: it signed a lie in an earlier attempt of this run")
            )
        others = self._heard([name for name in asked if name not in liars], smallest, failures)
        here = self._collect(
            Stage.OFFER, dict.fromkeys(others, request), plan, state, server.add_offer, failures
        )
        cohort_list = server.close_offers()
        for name in sorted(set(here) - set(server.members)):
            failures.add(
                Failure(name, f"left out: no cohort of {len(here)} bears the colluders assumed")
            )
        self._collect(
            Stage.DEAL,
            dict.fromkeys(server.members, cohort_list),
            plan,
            state,
            server.add_deal,
            failures,
        )
        listed = server.close_deals()
        self._epoch = _EpochInUse(listed, server.delivery, set(listed.deals))
        return self._epoch

    def _heard(self, names: list[str], smallest: int, failures: _Failures) -> list[str]:
        """Without the suspected, while enough others are left; unproven, nobody ends a run."""
        others = [name for name in names if name not in self._suspected]
        if len(others) < smallest:
            return names
        for name in sorted(set(names) - set(others)):
            failures.add(
                Failure(
                    name, "left out: several say that its shares do not open, which is no proof"
                )
            )
        return others

    @staticmethod
    def _goes_on(
        listed: Listed, plan: RoundPlan, members: Mapping[str, PublicIdentity], needed: int
    ) -> bool:
        """Not beyond the epoch, nor where too few dealt, nor after a revocation or new key."""
        same = all(members.get(name) == listed.identities[name] for name in listed.offers)
        return same and len(listed.deals) >= needed and plan.attempt in listed.epoch.attempts

    def _attempt(
        self,
        epoch: _EpochInUse,
        plan: RoundPlan,
        state: AdapterState,
        asked: int,
        failures: _Failures,
    ) -> tuple[SecureSum, SecureRecord]:
        """Stages 3 to 6, over all of U2: who drops out of one attempt may be back in the next."""
        slot = stages.slot_of(plan, self._manifest.base_digest)
        encoding = self._encoding(plan, state.spec.size)
        server = ServerAttempt(epoch.listed, slot, encoding, self._needed(asked))
        messages = {
            name: epoch.deliver(name) if name in epoch.undelivered else b""
            for name in epoch.listed.deals
        }

        def add_input(data: bytes) -> str:
            name = server.add_input(data)
            epoch.undelivered.discard(name)
            return name

        inside = self._collect(Stage.INPUT, messages, plan, state, add_input, failures)
        survivors = server.close_inputs()
        here = self._collect(
            Stage.CONFIRM,
            dict.fromkeys(inside, survivors),
            plan,
            state,
            server.add_confirmation,
            failures,
        )
        agreement = server.agreement()
        record = SecureRecord(
            plan.round,
            plan.attempt,
            asked,
            len(epoch.listed.offers),
            len(epoch.listed.deals),
            len(inside),
            len(here),
            opened=None,
            threshold=epoch.listed.threshold,
            colluders=self._terms.max_colluders,
        )
        self._note(record)  # from here on it may be learnt
        opened = self._collect(
            Stage.OPEN, dict.fromkeys(here, agreement), plan, state, server.add_opening, failures
        )
        try:
            result = server.result()
        finally:
            record = replace(
                record, opened=len(opened), liars=server.liars, suspected=tuple(server.suspected)
            )
            self._note(record)
            self._leave_out(server, plan.round)
        return result, record

    def _leave_out(self, server: ServerAttempt, round_number: int) -> None:
        """From the next epoch on: proven liars, and whose shares too many say do not open."""
        for liar in server.liars:
            log.warning(
                "round %d: %s signed a share that is not what was dealt", round_number, liar
            )
            self._liars.add(liar)
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
        plan: RoundPlan,
        state: AdapterState,
        take: Callable[[bytes], str],
        failures: _Failures,
    ) -> list[str]:
        """Ask, check and take each answer; who counted, in the order of the answers."""
        counted = []
        for name, answer in self._exchange.ask(stage, messages, plan, state):
            if isinstance(answer, Failure):
                failures.add(answer)
                continue
            try:
                signer = take(answer)
            except (BadInput, Refused) as error:
                failures.add(Failure(name, one_line(f"{stage}: {error}")))
                continue
            if signer != name:
                log.warning("%s: %s carried what %s had signed", stage, name, signer)
            counted.append(signer)
        return counted

    def _encoding(self, plan: RoundPlan, size: int) -> Encoding:
        noise = guarantee_of(self._manifest).member_noise(plan.phase)
        return stages.encoding_of(self._terms, plan.phase, size, noise)

    def _decoded(
        self, result: SecureSum, plan: RoundPlan, size: int
    ) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        """The sum in the adapter's units; BadInput if its mean is longer than any honest one."""
        total = self._encoding(plan, size).decode(result.levels)
        bound = guarantee_of(self._manifest).update_bound(plan.phase, size)
        norm = float(np.linalg.norm(total)) / len(result.members)
        if not norm <= bound * (1 + 1e-6):
            raise BadInput(
                f"sum: found a mean update of norm {norm:.4g}, expected at most {bound:.4g}"
            )
        return total


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


__all__ = ["Exchange", "SecureCohort", "SecureTerms"]
