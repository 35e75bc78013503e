"""Who takes part: active, connected members get the signed manifest, and consent or decline.

    offer    to who has not answered yet; a consent costs nobody anything
    start    once enough have consented and are connected: to each of them, once, who is in the
             cohort; who acknowledges it has reserved the run's cost, and can be asked

What an institution signed is kept as it came, so a resumed run knows who was started. Who is a
member is read anew for each attempt: a revocation or a new key counts from the next one on.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from fedlora.common.codec.strict import digest_of
from fedlora.common.disk.files import write_atomically
from fedlora.common.errors import BadInput, Refused
from fedlora.common.manifest.manifest import RunManifest
from fedlora.common.manifest.plan import RoundPlan
from fedlora.common.model.projection import PROJECTION
from fedlora.common.privacy.randomness import OsRandom, participants
from fedlora.common.protocol.consent import LONGEST_OFFER, Party, Start
from fedlora.common.protocol.messages import (
    MANIFEST_TAG,
    OFFER_TAG,
    START_TAG,
    Address,
    Consent,
    Decline,
    Offer,
    Reply,
    SignedStart,
    Started,
    request_to_bytes,
)
from fedlora.common.protocol.stages import Stage
from fedlora.common.trust.identity import PublicIdentity, Signed
from fedlora.server.coordinator.coordinator import Coordinator
from fedlora.server.coordinator.heights import Height, put_back
from fedlora.server.deployment.consents import Consents
from fedlora.server.deployment.institutions import Carrier, Institutions
from fedlora.server.release.signed_consents import consent_faults, schedule_cost
from fedlora.server.rounds.cohort import Failure

log = logging.getLogger(__name__)
LOOK = 1.0  # seconds between two looks at who is connected
DOUBT = 30.0  # seconds at most for who failed in the last attempt to show that it is there again
QUICK = 30.0  # seconds at most for a stage in which nobody trains, and
# of what is left of the attempt's deadline
PARTS: dict[str, float] = {Stage.OFFER: 0.25, Stage.DEAL: 0.25, Stage.CONFIRM: 0.5, Stage.OPEN: 1.0}
# of the deadline, for who is away while a quorum is here: who is here needs the rest
PATIENCE = 0.25
SHORTEST_OFFER = 600.0  # seconds that a consent is good for, or two deadlines
WAITING = "waiting"  # in the run's folder: whom it waits for; empty where it does not


class Participants(Institutions):
    """The institutions of a run between machines; `expected` is how many are waited for.

    An attempt ends `deadline` seconds after its `gather`, waiting included.
    """

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
        super().__init__(manifest, coordinator, carrier, folder, deadline, quorum)
        self._expected, self._sleep = expected, sleep
        self._said = ""
        # whom the next attempt asks, and who is left out, where they have met for it
        self._met: tuple[list[str], list[Failure]] | None = None
        self._said_of = Consents(folder)
        self._until: dict[str, float] = {}  # seconds of UTC: how long a consent is good
        schedule_cost(manifest)  # now: it takes seconds, which an attempt would lose
        self._read_consents()

    @property
    def reserved(self) -> Mapping[str, Started]:
        """By institution: what each reserved for this run, under which policy."""
        return dict(self._said_of.started)

    def gather(self) -> Mapping[str, PublicIdentity]:
        """Members, once the expected have consented and are connected, or waiting is vain.

        Where a quorum is here, the others are waited for until a part of the deadline has passed,
        otherwise until all of it has. Who failed in the last attempt is offered the run again,
        which its node answers with the consent that it gave: an attempt costs all others a part of
        their budget, and is not begun while one of them starts anew.
        """
        self._began = time.monotonic()
        if self._met is not None:  # a moment ago
            return self.coordinator.members()
        while True:
            members, online = self.coordinator.members(), self.carrier.online()
            connected = {name: key for name, key in members.items() if name in online}
            self._offer(connected, self._patience(connected, len(members)) - self._waited)
            here = set(self._said_of.given) & set(connected)
            answered = set(self._said_of.declined) | here
            complete = len(here) >= self._expected or answered >= set(members)
            patience = self._patience(connected, len(members))
            doubt = min(patience, DOUBT) if patience < self.deadline else patience
            sure = not self._doubtful & here or self._waited >= doubt
            if (complete and sure) or self._waited >= patience:
                self._say("")
                self._start(connected, members)
                return members
            self._say(self._missing(members, connected))
            self._sleep(LOOK)

    def ready(self) -> tuple[Failure, ...]:
        """Meet for an attempt before it is begun, for it would be spent on too few.

        Nothing where it may find a quorum, else who and what is in the way.
        """
        asked, failures = self._drawn(self.gather())
        self._met = (asked, failures) if asked else None
        return () if asked else tuple(failures)

    def _missing(self, members: Iterable[str], connected: Iterable[str]) -> str:
        """Whom an attempt waits for, in words that change only when somebody comes or goes."""
        here = set(connected)
        silent = sorted(
            name for name in here if name in self._doubtful or not self._said_of.answered(name)
        )
        parts = [f"waiting for {self._expected} members: {len(here)} connected"]
        if away := sorted(set(members) - here):
            parts.append(f"missing {', '.join(away)}")
        if silent:
            parts.append(f"without an answer {', '.join(silent)}")
        return "; ".join(parts)

    def _say(self, text: str) -> None:
        """To who started the run: one line of a file, written when it changes."""
        if text != self._said:
            self._said = text
            write_atomically(self.folder / WAITING, text.encode())

    def seconds_for(self, stage: str) -> float:
        """Training may use all that the two stages after it need not."""
        left = self.left
        if stage == Stage.INPUT:
            return left - 2 * min(QUICK, left / 5)
        return min(QUICK, PARTS[stage] * left)

    def asked(
        self, members: Mapping[str, PublicIdentity], plan: RoundPlan
    ) -> tuple[list[str], list[Failure]]:
        """Whom to ask for an attempt, and who is left out; nobody where no sum could count."""
        met, self._met = self._met, None
        return met or self._drawn(members)

    def _drawn(self, members: Mapping[str, PublicIdentity]) -> tuple[list[str], list[Failure]]:
        given, started = set(self._said_of.given) & set(members), self._said_of.started
        failures = [each for name, each in self._said_of.declined.items() if name in members]
        declined = len(failures)
        failures += [
            Failure(name, "did not acknowledge the start")
            for name in sorted(given - set(started))
            if self._said_of.start_of(name) is not None
        ]
        begun = sorted(given & set(started))
        asked = participants(begun, self.manifest.participation, OsRandom())
        online = self.carrier.online()
        away = [Failure(name, "not connected") for name in asked if name not in online]
        here, needed = len(asked) - len(away), self.needed(len(asked) + len(failures))
        if begun and here >= needed and self.left:
            return asked, failures
        if not begun:  # too few for a start: nobody was charged
            here, needed = len(given & online), self.needed(len(given) + declined)
        # a revocation leaves nobody to wait for: each further attempt would be spent on nobody
        few = len(given) < self.needed(len(given))
        answered = given | set(self._said_of.declined)
        final = (bool(failures) or few) and not away and set(members) <= answered
        found = "no time is left" if begun else "none was started"
        found = f"{here} take part" if here < needed else found
        failure = Failure(
            "cohort", f"{found}, expected at least {needed}", refused=final and here < needed
        )
        return [], [*failures, *away, failure]

    @property
    def _waited(self) -> float:
        return time.monotonic() - self._began

    def _patience(self, connected: Iterable[str], members: int) -> float:
        """Seconds that others are waited for: all, where those who surely answer are too few."""
        sure = (set(self._said_of.given) & set(connected)) - self._doubtful
        quorum = len(sure) >= self.needed(min(self._expected, members))
        return self.deadline * (PATIENCE if quorum else 1.0)

    def _offer(self, members: Mapping[str, PublicIdentity], seconds: float) -> None:
        """Offer the run to who has not answered yet, to who may be gone, and before a consent ends.

        A node answers a second offer with what it said to the first.
        """
        unasked = [name for name in members if self._is_open(name)]
        if not unasked:
            return
        requests = dict(self._offers(unasked))
        if self._doubtful & set(unasked):
            seconds = min(seconds, DOUBT)
        for name, answer in self.carrier.ask(requests, max(seconds, LOOK)):
            if isinstance(answer, Failure):
                log.warning("%s: %s", name, answer.reason)
                continue
            self._doubtful.discard(name)
            if name in self._said_of.declined or self._said_of.start_of(name) is not None:
                continue
            try:
                reply = self.opened(name, answer, members)
            except (BadInput, Refused) as error:
                self._said_of.decline(Failure(name, str(error)))
                continue
            if reason := self._refusal(reply, Consent) or self._fallen(reply):
                self._said_of.decline(Failure(name, reason, refused=True))
            else:
                self._said_of.consent(name, answer)
                self._note_height(reply)

    def _is_open(self, name: str) -> bool:
        """Whether to offer the run to it, or once more."""
        if name in self._doubtful or not self._said_of.answered(name):
            return True
        settled = name in self._said_of.declined or self._said_of.start_of(name) is not None
        return not settled and self._until.get(name, 0.0) - time.time() < self.deadline

    def _offers(self, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        """An offer to each, good until the start of an attempt after this one."""
        signer, path = self.coordinator.identity, self.folder / PROJECTION
        manifest = Signed.by(signer, MANIFEST_TAG, self.manifest.to_bytes())
        projection = path.read_bytes() if path.is_file() else b""
        digest, good = self.manifest.digest, max(2 * self.deadline, SHORTEST_OFFER)
        until = math.ceil(time.time() + min(good, LONGEST_OFFER))
        for name in names:
            self._until[name] = until
            address = Signed.by(signer, OFFER_TAG, Address(digest, name, until).to_bytes())
            yield name, request_to_bytes(Offer(manifest, projection, address))

    def _start(
        self, connected: Mapping[str, PublicIdentity], members: Mapping[str, PublicIdentity]
    ) -> None:
        """Start each that consented and is connected, where with those started before they suffice.

        What is signed for one is on disk before it leaves, and goes to it again as it is.
        """
        given, started = self._said_of.given, self._said_of.started
        cohort = sorted((set(started) | (set(given) & set(connected))) & set(members))
        waiting = [name for name in cohort if name in connected and name not in started]
        declined = set(self._said_of.declined) & set(members)
        enough = len(cohort) >= self.needed(len(cohort) + len(declined))
        if not (waiting and enough and self.left):
            return
        parties = tuple(Party(name, digest_of(given[name])) for name in cohort)
        body = Start(self.manifest.digest, parties).to_bytes()
        for name in waiting:
            if self._said_of.start_of(name) is None:
                start = Signed.by(self.coordinator.identity, START_TAG, body)
                self._said_of.keep_start(name, start)
        kept = {name: self._said_of.start_of(name) for name in waiting}
        requests = {
            name: request_to_bytes(SignedStart(each)) for name, each in kept.items() if each
        }
        for name, answer in self.take(requests, self.left / 2):
            if not isinstance(answer, Failure):
                self._acknowledged(name, answer, members)

    def _acknowledged(self, name: str, data: bytes, members: Mapping[str, PublicIdentity]) -> None:
        """What `name` says to its start; where that is no refusal for good, it is offered anew."""
        try:
            reply = self.opened(name, data, members)
            reason = self._refusal(reply, Started) or self._put_back(name, reply, members)
        except (BadInput, Refused) as error:
            self._said_of.decline(Failure(name, str(error)))
            return
        if isinstance(reply, Started) and not reason:
            self._said_of.acknowledge(name, data, reply)
            self._note_height(reply)
        elif isinstance(reply, Decline) and not reply.refused:
            log.warning("%s does not start: %s", name, reason)
            self._said_of.withdraw(name)
        else:
            self._said_of.decline(Failure(name, reason, refused=True))

    def _fallen(self, reply: Reply) -> str:
        """Why a fresh consent comes from a ledger that was put back to an older day, or ""."""
        heights = self.coordinator.heights
        if heights is None or not isinstance(reply, Consent):
            return ""
        return heights.fault(reply.institution, Height(reply.height, reply.head))

    def _put_back(self, name: str, reply: Reply, members: Mapping[str, PublicIdentity]) -> str:
        """Why a start was charged to an older copy of the ledger that consented to it, or ""."""
        with suppress(Refused):  # signed by a former key: nothing to hold it against
            said = (self.opened(name, self._said_of.given[name], members), reply)
            return put_back(*(Height(r.height, r.head) for r in said if isinstance(r, Consent)))
        return ""

    def _note_height(self, reply: Reply) -> None:
        if self.coordinator.heights is not None and isinstance(reply, Consent):
            self.coordinator.heights.note(reply.institution, Height(reply.height, reply.head))

    def _read_consents(self) -> None:
        """Of a run that is resumed; Refused for what nobody signed.

        What a former key signed, or is at another ε than the schedule's, is asked for anew.
        """
        members = self.coordinator.members()
        for name, (consent, started) in self._said_of.on_disk().items():
            if name not in members or consent is None:
                continue
            self._said_of.given[name] = consent
            if started is None:
                continue
            try:
                reply = self.opened(name, started, members)
            except Refused:
                if not self._by_former(name, started):
                    raise
                continue
            if isinstance(reply, Started) and not self._refusal(reply, Started):
                self._said_of.started[name] = reply

    def _by_former(self, name: str, data: bytes) -> bool:
        """Whether a key signed it that `name` had before it rotated."""
        for key in self.coordinator.former(name):
            with suppress(Refused):
                self.opened(name, data, {name: key})
                return True
        return False

    def _refusal(self, reply: Reply, expected: type[Consent]) -> str:
        """Why it is no consent, or no acknowledgement, at what the schedule costs; "" if it is."""
        if isinstance(reply, Decline):
            return reply.reason
        if type(reply) is not expected or reply.manifest != self.manifest.digest:
            kind = "consent to" if expected is Consent else "start of"
            return f"found a {type(reply).__name__.lower()}, expected a {kind} this run"
        return "; ".join(f"consent {fault}" for fault in consent_faults(reply, self.manifest))
