"""Who takes part: active, connected members get the signed manifest, and consent or decline.

A consent is kept as the bytes that its institution signed, so a resumed run knows who gave one. Who
is a member is read anew for each attempt: a revocation or a new key counts from the next one on.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from fedlora.common.disk.files import write_atomically
from fedlora.common.errors import BadInput, Refused
from fedlora.common.manifest.manifest import RunManifest
from fedlora.common.manifest.plan import RoundPlan
from fedlora.common.model.projection import PROJECTION
from fedlora.common.privacy.randomness import OsRandom
from fedlora.common.protocol.messages import (
    MANIFEST_TAG,
    OFFER_TAG,
    Address,
    Consent,
    Decline,
    Offer,
    Reply,
    request_to_bytes,
)
from fedlora.common.protocol.stages import Stage
from fedlora.common.terminal import one_line
from fedlora.common.trust.identity import PublicIdentity, Signed
from fedlora.server.coordinator.coordinator import Coordinator
from fedlora.server.deployment.institutions import Carrier, Institutions
from fedlora.server.release.statements import consent_faults, schedule_cost
from fedlora.server.rounds.cohort import Failure, participants

log = logging.getLogger(__name__)
LOOK = 1.0  # seconds between two looks at who is connected
DOUBT = 30.0  # seconds at most for who failed in the last attempt to show that it is there again
QUICK = 30.0  # seconds at most for a stage in which nobody trains, and
# of what is left of the attempt's deadline
PARTS: dict[str, float] = {Stage.OFFER: 0.25, Stage.DEAL: 0.25, Stage.CONFIRM: 0.5, Stage.OPEN: 1.0}
# of the deadline, for who is away while a quorum is here: who is here needs the rest
PATIENCE = 0.25
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
        self._consents: dict[str, Consent] = {}
        self._declined: dict[str, Failure] = {}
        schedule_cost(manifest)  # now: it takes seconds, which an attempt would lose
        self._read_consents()

    @property
    def consents(self) -> Mapping[str, Consent]:
        """By institution: what each reserved for this run, under which policy."""
        return dict(self._consents)

    def gather(self) -> Mapping[str, PublicIdentity]:
        """Members, once the expected have consented and are connected, or waiting is vain.

        Where a quorum is here, the others are waited for until a part of the deadline has passed,
        otherwise until all of it has. Who failed in the last attempt is offered the run again,
        which its node answers with the consent that it gave: an attempt costs all others a part of
        their budget, and is not begun while one of them starts anew.
        """
        self._began = time.monotonic()
        while True:
            members, online = self.coordinator.members(), self.carrier.online()
            connected = {name: key for name, key in members.items() if name in online}
            self._offer(connected, self._patience(connected, len(members)) - self._waited)
            here = set(self._consents) & set(connected)
            complete = len(here) >= self._expected or (set(self._declined) | here) >= set(members)
            patience = self._patience(connected, len(members))
            doubt = min(patience, DOUBT) if patience < self.deadline else patience
            sure = not self._doubtful & here or self._waited >= doubt
            if (complete and sure) or self._waited >= patience:
                self._say("")
                return members
            self._say(self._missing(members, connected))
            self._sleep(LOOK)

    def _missing(self, members: Iterable[str], connected: Iterable[str]) -> str:
        """Whom an attempt waits for, in words that change only when somebody comes or goes."""
        here = set(connected)
        silent = sorted(
            (here - set(self._consents) - set(self._declined)) | (here & self._doubtful)
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
        failures = [failure for name, failure in self._declined.items() if name in members]
        consented = sorted(set(self._consents) & set(members))
        asked = participants(consented, self.manifest.participation, OsRandom())
        online = self.carrier.online()
        away = [Failure(name, "not connected") for name in asked if name not in online]
        here, needed = len(asked) - len(away), self.needed(len(asked) + len(failures))
        if here >= needed and self.left:
            return asked, failures
        # a revocation leaves nobody to wait for: each further attempt would be spent on nobody
        few = len(consented) < self.needed(len(consented))
        final = (
            (bool(failures) or few)
            and not away
            and set(members) <= set(self._consents) | set(self._declined)
        )
        found = f"{here} take part" if here < needed else "no time is left"
        failure = Failure(
            "cohort", f"{found}, expected at least {needed}", refused=final and here < needed
        )
        return [], [*failures, *away, failure]

    @property
    def _waited(self) -> float:
        return time.monotonic() - self._began

    def _patience(self, connected: Iterable[str], members: int) -> float:
        """Seconds that others are waited for: all, where those who surely answer are too few."""
        sure = (set(self._consents) & set(connected)) - self._doubtful
        quorum = len(sure) >= self.needed(min(self._expected, members))
        return self.deadline * (PATIENCE if quorum else 1.0)

    def _offer(self, members: Mapping[str, PublicIdentity], seconds: float) -> None:
        """Offer the run to who has not answered yet, and to who may be gone."""
        known = (set(self._consents) | set(self._declined)) - self._doubtful
        unasked = [name for name in members if name not in known]
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
            if name in self._consents or name in self._declined:
                continue
            try:
                reply = self.opened(name, answer, members)
            except (BadInput, Refused) as error:
                self._decline(Failure(name, one_line(str(error))))
                continue
            reason = self._refusal(reply)
            if isinstance(reply, Consent) and not reason:
                self._keep(name, answer, reply)
            else:
                self._decline(Failure(name, reason, refused=True))

    def _decline(self, failure: Failure) -> None:
        """For this process's life; its reason lies where `fedlora-server status` finds it."""
        log.warning("%s declines: %s", failure.client, failure.reason)
        self._declined[failure.client] = failure
        write_atomically(
            self._consents_folder() / f"{failure.client}.declined", failure.reason.encode()
        )

    def _offers(self, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        """An offer to each, good for as long as an attempt lasts."""
        signer, path = self.coordinator.identity, self.folder / PROJECTION
        manifest = Signed.by(signer, MANIFEST_TAG, self.manifest.to_bytes())
        projection = path.read_bytes() if path.is_file() else b""
        digest, until = self.manifest.digest, math.ceil(time.time() + self.deadline)
        for name in names:
            address = Signed.by(signer, OFFER_TAG, Address(digest, name, until).to_bytes())
            yield name, request_to_bytes(Offer(manifest, projection, address))

    def _consents_folder(self) -> Path:
        folder = self.folder / "consents"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _keep(self, name: str, data: bytes, consent: Consent) -> None:
        write_atomically(self._consents_folder() / f"{name}.reply", data)
        self._consents[name] = consent

    def _read_consents(self) -> None:
        """Of a run that is resumed; Refused for what nobody signed.

        What a former key signed, or is at another ε than the schedule's, is asked for anew.
        """
        members = self.coordinator.members()
        # of an earlier process: asked anew
        for path in (self.folder / "consents").glob("*.declined"):
            path.unlink()
        for path in sorted((self.folder / "consents").glob("*.reply")):
            if path.stem in members:
                data = path.read_bytes()
                try:
                    reply = self.opened(path.stem, data, members)
                except Refused:
                    if not self._by_former(path.stem, data):
                        raise
                    continue
                if isinstance(reply, Consent) and not self._refusal(reply):
                    self._consents[path.stem] = reply

    def _by_former(self, name: str, data: bytes) -> bool:
        """Whether a key signed it that `name` had before it rotated."""
        for key in self.coordinator.former(name):
            with suppress(Refused):
                self.opened(name, data, {name: key})
                return True
        return False

    def _refusal(self, reply: Reply) -> str:
        """Why it is no consent to this run at what its schedule costs; "" where it is one."""
        if isinstance(reply, Decline):
            return reply.reason
        if not isinstance(reply, Consent) or reply.manifest != self.manifest.digest:
            return f"found a {type(reply).__name__.lower()}, expected a consent to this run"
        return "; ".join(f"consent {fault}" for fault in consent_faults(reply, self.manifest))
