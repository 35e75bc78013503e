"""What each institution signed for a run, as it lies in the run's folder.

consents/NAME.reply       its consent: what it would reserve
consents/NAME.start       the start that went to it, as it was signed, before it left
consents/NAME.started     its acknowledgement: what it reserved
consents/NAME.declined    why it takes no part, for this process's life
"""

from __future__ import annotations

import logging
from pathlib import Path

from fedlora.common.disk.files import write_atomically
from fedlora.common.protocol.messages import Started
from fedlora.common.trust.identity import Signed
from fedlora.server.rounds.cohort import Failure

log = logging.getLogger(__name__)

REPLY, START, STARTED, DECLINED = ".reply", ".start", ".started", ".declined"


class Consents:
    """Who consented, who was started and who declined; `folder` is the run's."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "consents"
        self.given: dict[str, bytes] = {}  # by institution: the consent as it was signed
        self.started: dict[str, Started] = {}
        self.declined: dict[str, Failure] = {}
        for path in self._folder.glob(f"*{DECLINED}"):  # of an earlier process: asked anew
            path.unlink()

    def answered(self, name: str) -> bool:
        """Whether it consented or declined."""
        return name in self.given or name in self.declined

    def consent(self, name: str, data: bytes) -> None:
        """Keep a consent, instead of an earlier one."""
        self._write(name, REPLY, data)
        self.given[name] = data

    def acknowledge(self, name: str, data: bytes, reply: Started) -> None:
        """Keep what says that the run's cost is reserved."""
        self._write(name, STARTED, data)
        self.started[name] = reply

    def decline(self, failure: Failure) -> None:
        """For this process's life; its reason lies where `fedlora-server status` finds it."""
        log.warning("%s declines: %s", failure.client, failure.reason)
        self.given.pop(failure.client, None)
        self.declined[failure.client] = failure
        self._write(failure.client, DECLINED, failure.reason.encode())

    def withdraw(self, name: str) -> None:
        """Ask anew: its consent was over, or is not the one that the start names."""
        self.given.pop(name, None)
        for kind in (START, REPLY):
            (self._folder / f"{name}{kind}").unlink(missing_ok=True)

    def keep_start(self, name: str, start: Signed) -> None:
        """Keep the start that is about to leave for `name`, durably."""
        self._write(name, START, start.to_bytes())

    def start_of(self, name: str) -> Signed | None:
        """The start that left for `name`, or may have."""
        data = self._read(name, START)
        return None if data is None else Signed.from_bytes(data, f"consents/{name}{START}")

    def on_disk(self) -> dict[str, tuple[bytes | None, bytes | None]]:
        """By institution: the consent and the acknowledgement that an earlier process kept.

        A consent that no start followed is none any more: it may be over.
        """
        names = sorted({path.stem for path in self._folder.glob(f"*{START}")})
        return {name: (self._read(name, REPLY), self._read(name, STARTED)) for name in names}

    def _read(self, name: str, kind: str) -> bytes | None:
        path = self._folder / f"{name}{kind}"
        return path.read_bytes() if path.is_file() else None

    def _write(self, name: str, kind: str, data: bytes) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self._folder / f"{name}{kind}", data)
