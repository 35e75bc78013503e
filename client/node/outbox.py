"""What left, byte for byte: a release is on disk before it is sent, and sent again as it lies.

Beside each answer lies the digest of the request that it answers. The same request is answered with
the same bytes, after any number of crashes; another request for the same attempt is a rewind, and
refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fedlora.client.node.masked_outbox import FolderOutbox
from fedlora.common.disk.files import write_atomically
from fedlora.common.errors import Refused
from fedlora.common.manifest.plan import RoundPlan


@dataclass(frozen=True)
class Outbox:
    """The releases of all runs, by (manifest, round, attempt); a consent is round 0, attempt 0."""

    folder: Path

    def read(self, manifest: str, round_number: int, attempt: int, request: bytes) -> bytes | None:
        """The reply given to this very request, or None; Refused where another was answered."""
        path = self._path(manifest, round_number, attempt)
        if not path.exists():
            return None
        data = path.read_bytes()
        asked, kept, reply = data[:32], data[32:64], data[64:]
        if hashlib.sha256(reply).digest() != kept:
            raise Refused(f"outbox: round {round_number} attempt {attempt} was changed on disk")
        if asked != hashlib.sha256(request).digest():
            raise Refused(
                f"task: round {round_number} attempt {attempt} was answered for another request: a"
                " rewind"
            )
        return reply

    def write(
        self, manifest: str, round_number: int, attempt: int, request: bytes, reply: bytes
    ) -> None:
        """Keep a reply, durably."""
        path = self._path(manifest, round_number, attempt)
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        mark = hashlib.sha256(request).digest() + hashlib.sha256(reply).digest()
        write_atomically(path, mark + reply, mode=0o600)

    def masked(self, manifest: str) -> FolderOutbox:
        """The masked inputs of a run, beside its consent."""
        return FolderOutbox(self._path(manifest, 0, 0).parent)

    def sizes(self, manifest: str) -> Iterator[tuple[int, int, int]]:
        """(round, attempt, bytes) of each release of a run, oldest first."""
        folder = self._path(manifest, 0, 0).parent
        paths = sorted(folder.iterdir(), key=lambda path: path.stem) if folder.is_dir() else ()
        for path in paths:
            if path.suffix in (".reply", ".masked"):
                number, attempt = path.stem.split("-")
                mark = 64 if path.suffix == ".reply" else 0
                yield int(number), int(attempt), path.stat().st_size - mark

    def _path(self, manifest: str, round_number: int, attempt: int) -> Path:
        name = hashlib.sha256(manifest.encode()).hexdigest()
        return self.folder / name / f"{round_number:06d}-{attempt:06d}.reply"


@dataclass(frozen=True)
class Plans:
    """The plans that a node acted on, so that none goes back: one small file for each attempt."""

    folder: Path

    def check(self, plan: RoundPlan, reserved: dict[int, int]) -> None:
        """Refused unless `plan` goes on from all before it.

        `reserved` is the ledger's attempt -> round.
        """
        seen = {each.attempt: each for each in self._all()}
        rounds = {**{number: each.round for number, each in seen.items()}, **reserved}
        if plan.attempt in reserved:
            raise Refused(
                f"plan attempt: found {plan.attempt}, which was used before: a replay or a rewind"
            )
        if plan.attempt in seen and seen[plan.attempt] != plan:
            raise Refused(f"plan attempt: found {plan.attempt}, which another plan used: a rewind")
        others = {number: round_ for number, round_ in rounds.items() if number != plan.attempt}
        if others and plan.attempt < max(others):
            raise Refused(
                f"plan attempt: found {plan.attempt}, expected more than {max(others)}: a rewind"
            )
        if others and plan.round < max(others.values()):
            raise Refused(
                f"plan round: found {plan.round}, expected {max(others.values())} or more: a rewind"
            )
        for each in seen.values():
            if each.round == plan.round and each.adapter != plan.adapter:
                raise Refused(
                    f"plan adapter: round {plan.round} began from {each.adapter[:20]}… before,"
                    f" found {plan.adapter[:20]}…: a rewind"
                )

    def write(self, plan: RoundPlan) -> None:
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_atomically(self.folder / f"{plan.attempt:06d}.plan", plan.to_bytes(), mode=0o600)

    def _all(self) -> Iterator[RoundPlan]:
        for path in sorted(self.folder.glob("*.plan")) if self.folder.is_dir() else ():
            yield RoundPlan.from_bytes(path.read_bytes())
