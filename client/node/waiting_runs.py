"""Runs that were consented to and not started: nothing of them is charged, and few are kept.

offers/RUN/    manifest and projection as they were offered; address.signed, until when the consent
               is good; consented.json, under which limits; consent.reply, the bytes that left; what
               loading the network left there; start.json, which start is acted on, from before it
               is charged; checked.json, what policy and data were when they were last tried
offers/today.json    how often data may have been read today for nothing: for offers of new runs,
               and of runs whose data were changed since they were consented to; for starts and
               attempts that were asked for again, for which no ledger counted the first reading

A start moves the folder to runs/, in one step. A coordinator that never starts what it offers fills
no disk: the last `MOST` are kept, and older ones make room. A run that was begun before there were
starts is kept where it lies.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedlora.client.node.folder import MANIFEST, PROJECTION, NodeFolder
from fedlora.client.node.policy import Policy
from fedlora.common.codec.strict import from_canonical, json_table, to_canonical
from fedlora.common.disk.files import now, read_bytes, sync_folder, write_atomically
from fedlora.common.errors import BadInput
from fedlora.common.protocol.messages import Offer
from fedlora.common.trust.identity import Signed

MOST = 4
ADDRESS, CONSENT = "address.signed", "consent.reply"
CONSENTED, STARTED = "consented.json", "started.json"  # when, and what the policy said then
CHECKED, NAMED, TODAY = "checked.json", "start.json", "today.json"


@dataclass(frozen=True)
class Waiting:
    """What was offered and consented to; `consent` is the very reply that left."""

    manifest: Signed
    address: Signed
    consent: bytes


@dataclass(frozen=True)
class _Checked:
    """The stamp of policy and data under which a run was tried, and then consented to."""

    stamp: str


@dataclass(frozen=True)
class _Named:
    """The digest of the signed start that is acted on."""

    start: str


@dataclass(frozen=True)
class _Today:
    """How often data may have been read for nothing on a day of UTC."""

    day: str
    offers: int


@dataclass(frozen=True)
class Offers:
    """The consents of one node that wait for a start, by the digests of their manifests."""

    folder: NodeFolder

    def read(self, manifest: str) -> Waiting | None:
        """What waits, or did until it was started; None where nothing was consented to."""
        place = self.place(manifest)
        if not (place / CONSENT).is_file():
            return None
        manifest_, address = (
            Signed.from_bytes((place / name).read_bytes(), f"kept {name}")
            for name in (MANIFEST, ADDRESS)
        )
        return Waiting(manifest_, address, (place / CONSENT).read_bytes())

    def projection(self, manifest: str) -> Path:
        """Where the projection of what waits lies, or of the run that was begun."""
        return self.place(manifest) / PROJECTION

    def lay_out(self, manifest: str, projection: bytes) -> Path:
        """The file of the projection, from which the run's network is built to try it."""
        path = self.projection(manifest)
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_atomically(path, projection, mode=0o600)
        return path

    def checked(self, manifest: str) -> str | None:
        """The stamp of what was tried before the last consent; None without one, and "" of one
        that an earlier version gave.
        """
        place = self.place(manifest)
        if not (place / CONSENT).is_file():
            return None
        path = place / CHECKED
        return from_canonical(_Checked, read_bytes(path), str(path)).stamp if path.exists() else ""

    def keep(self, manifest: str, offer: Offer, consent: bytes, policy: Policy, stamp: str) -> None:
        """Keep what was consented to, and under which policy; the consent last makes it whole.

        `stamp` says what was tried.
        """
        place = self.place(manifest)
        write_atomically(place / CHECKED, to_canonical(_Checked(stamp)), mode=0o600)
        note(place / CONSENTED, policy)
        write_atomically(place / MANIFEST, offer.manifest.to_bytes(), mode=0o600)
        write_atomically(place / ADDRESS, offer.address.to_bytes(), mode=0o600)
        write_atomically(place / CONSENT, consent, mode=0o600)

    def name_start(self, manifest: str, start: str) -> None:
        """Keep, durably, which start is acted on, by its digest, before anything is charged."""
        path = self.place(manifest) / NAMED
        write_atomically(path, to_canonical(_Named(start)), mode=0o600)

    def names_start(self, manifest: str) -> bool:
        """Whether a start was acted on."""
        return (self.place(manifest) / NAMED).exists()

    def named_start(self, manifest: str, charged: bool) -> str:
        """The start that alone may go on: it was `charged`, or moved the run. "" where none did, or
        an earlier version kept none.
        """
        path = self.place(manifest) / NAMED
        if not (path.exists() and (charged or self._begun(manifest))):
            return ""
        return from_canonical(_Named, read_bytes(path), str(path)).start

    def begin(self, manifest: str) -> None:
        """Move what waits to the runs, durably; a second time changes nothing."""
        waits, run = self._waits(manifest), self.folder.run(manifest)
        if not self._begun(manifest):
            shutil.rmtree(run, ignore_errors=True)  # without a manifest nothing ran in it
            run.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            waits.rename(run)
            sync_folder(run.parent)
            sync_folder(waits.parent)

    def drop(self, manifest: str) -> None:
        """Forget what waits; of a run that was begun nothing but its consent."""
        (self.place(manifest) / CONSENT).unlink(missing_ok=True)
        shutil.rmtree(self._waits(manifest), ignore_errors=True)

    def make_room(self, stays: Callable[[str], bool]) -> None:
        """Forget all but the last `MOST`, and those that `stays` says of their manifest."""
        waits = [path for path in self.folder.offers.glob("*") if path.is_dir()]
        waits.sort(key=lambda path: path.stat().st_mtime_ns)
        for path in waits[:-MOST]:
            if not stays(f"sha256:{path.name}"):
                self.drop(f"sha256:{path.name}")

    def count(self, most: int) -> None:
        """Count one more reading of data that nobody is charged for, durably; BadInput beyond
        `most` a day.
        """
        path, today = self.folder.offers / TODAY, datetime.now(UTC).date().isoformat()
        known = _Today(today, 0)
        if path.exists():
            found = from_canonical(_Today, read_bytes(path), str(path))
            known = found if found.day == today else known
        if known.offers >= most:
            raise BadInput(
                "offers: found data read for nothing as often as this node has it, expected at"
                f" most {most} a day (UTC), by [limits] offers"
            )
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_atomically(path, to_canonical(_Today(today, known.offers + 1)), mode=0o600)

    def place(self, manifest: str) -> Path:
        """The folder of what waits, or of the run that was begun; it may not be there."""
        return self.folder.run(manifest) if self._begun(manifest) else self._waits(manifest)

    def _waits(self, manifest: str) -> Path:
        return self.folder.offers / manifest.removeprefix("sha256:")

    def _begun(self, manifest: str) -> bool:
        return self.folder.manifest(manifest).is_file()


def note(path: Path, policy: Policy, **more: object) -> None:
    """Keep, durably: now, under this policy's limits; `more` is what else belongs there."""
    table = {"time": now(), "policy": policy.digest, "limits": asdict(policy.limits), **more}
    write_atomically(path, json.dumps(table, sort_keys=True).encode(), mode=0o600)


def noted(path: Path) -> Mapping[str, Any]:
    """What was kept; nothing of a run that an earlier version began, or where a kill left none."""
    try:
        return json_table(read_bytes(path), path.name) if path.is_file() else {}
    except BadInput:
        return {}
