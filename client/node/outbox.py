"""What left, byte for byte: a release is on disk before it is sent, and sent again as it lies.

Beside each answer lies the digest of the request that it answers. The same request is answered with
the same bytes, after any number of crashes; another request for the same attempt is a rewind, and
refused. A masked input is kept by itself, as it left or may have left. What is too large for a
reply lies beside the one that lists its parts, until another attempt is answered; of a masked input
that is as large, its size stays then.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

from fedlora.common.disk.files import sync_folder, write_atomically
from fedlora.common.errors import BadInput, Refused
from fedlora.common.manifest.plan import RoundPlan
from fedlora.common.protocol.messages import MAX_LIST_BYTES, parts_in
from fedlora.common.protocol.vector_parts import Parts, is_large, listed, part_in_file

REPLY, START, MASKED = ".reply", ".started", ".masked"
BODY = ".body"  # of a reply that lists its parts
GONE = ".masked-size"  # of a masked input that made room: its bytes, as a number


class Release(NamedTuple):
    """Something that left, or may have; round and attempt are 0 of a consent and of a start."""

    round: int
    attempt: int
    size: int  # bytes
    kind: str  # REPLY, START or MASKED


@dataclass(frozen=True)
class Outbox:
    """The releases of all runs, by (manifest, round, attempt); a consent is round 0, attempt 0.

    So is what acknowledged the run's start, which is of another kind.
    """

    folder: Path

    def read(
        self, manifest: str, round_number: int, attempt: int, request: bytes, kind: str = REPLY
    ) -> bytes | None:
        """The reply given to this very request, or None; Refused where another was answered."""
        path = self._path(manifest, round_number, attempt, kind)
        if not path.exists():
            return None
        data = path.read_bytes()
        asked, kept, reply = data[:32], data[32:64], data[64:]
        if hashlib.sha256(reply).digest() != kept:
            raise Refused(f"outbox: round {round_number} attempt {attempt} was changed on disk")
        if asked != hashlib.sha256(request).digest():
            raise Refused(
                f"{'start' if kind == START else 'task'}: round {round_number} attempt {attempt}"
                " was answered for another request: a rewind"
            )
        return reply

    def write(
        self,
        manifest: str,
        round_number: int,
        attempt: int,
        request: bytes,
        reply: bytes,
        kind: str = REPLY,
    ) -> None:
        """Keep a reply, durably."""
        path = self._path(manifest, round_number, attempt, kind)
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        mark = hashlib.sha256(request).digest() + hashlib.sha256(reply).digest()
        write_atomically(path, mark + reply, mode=0o600)

    def write_body(
        self, manifest: str, round_number: int, attempt: int, parts: Iterable[bytes]
    ) -> Parts:
        """Keep what is too large for a reply, durably, before the reply that lists its parts.

        Those of earlier attempts make room: no attempt is asked for once another was.
        """
        path = self._path(manifest, round_number, attempt, BODY)
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        for other in path.parent.glob(f"*{BODY}"):
            other.unlink()
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), "wb") as stream:
            found = listed(_kept(parts, stream))
            stream.flush()
            os.fsync(stream.fileno())
        sync_folder(path.parent)
        return found

    def part(
        self, manifest: str, round_number: int, attempt: int, number: int, masked: bool
    ) -> bytes:
        """Part `number` of an answer that left, or may have; BadInput where it is not kept."""
        told = self._path(manifest, round_number, attempt, MASKED if masked else REPLY)
        path = told if masked else told.with_suffix(BODY)
        data = part_in_file(path, number) if told.is_file() else b""
        if not data:
            raise BadInput(
                f"fetch: found no part {number} of round {round_number} attempt {attempt}, expected"
                " one of the last answer's"
            )
        return data

    def masked(self, manifest: str) -> FolderOutbox:
        """The masked inputs of a run, beside its consent."""
        return FolderOutbox(self._path(manifest, 0, 0).parent)

    def started(self, manifest: str) -> bool:
        """Whether a start of the run was acknowledged."""
        return self._path(manifest, 0, 0, START).exists()

    def sizes(self, manifest: str) -> Iterator[Release]:
        """Each release of a run, oldest first."""
        folder = self._path(manifest, 0, 0).parent
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            number, _, attempt = path.stem.partition("-")
            if path.suffix in (REPLY, START, MASKED):
                mark = 0 if path.suffix == MASKED else 64
                size = path.stat().st_size - mark
                if path.suffix == REPLY:
                    size += _listed_bytes(path, size)
                yield Release(int(number), int(attempt), size, path.suffix)
            elif path.suffix == GONE and not path.with_suffix(MASKED).exists():
                yield Release(int(number), int(attempt), int(path.read_text()), MASKED)

    def _path(self, manifest: str, round_number: int, attempt: int, kind: str = REPLY) -> Path:
        name = hashlib.sha256(manifest.encode()).hexdigest()
        return self.folder / name / f"{round_number:06d}-{attempt:06d}{kind}"


def _kept(parts: Iterable[bytes], stream: BinaryIO) -> Iterator[bytes]:
    for part in parts:
        stream.write(part)
        yield part


def _listed_bytes(path: Path, size: int) -> int:
    """How many bytes a kept reply lists, which left in parts; 0 of any other reply."""
    parts = parts_in(path.read_bytes()[64:]) if size <= MAX_LIST_BYTES else None
    return 0 if parts is None else parts.size


class MaskedOutbox(Protocol):
    """The masked inputs of one run that left or may have left; durable where the node is."""

    def put(self, round_number: int, attempt: int, data: bytes) -> None:
        """Keep these bytes before they are sent; FedloraError where the attempt was used."""

    def get(self, round_number: int, attempt: int) -> bytes | None:
        """The exact bytes of an earlier `put`, or None."""

    def used(self) -> Sequence[tuple[int, int]]:
        """(round, attempt) of every `put`, also of those from before a restart."""


class FolderOutbox(MaskedOutbox):
    """One file for each attempt; whole and on disk before `put` returns. Of large ones, the last
    alone is kept whole: once a later attempt is masked, no secret is left that could open it.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._folder = folder

    def put(self, round_number: int, attempt: int, data: bytes) -> None:
        if any(used == attempt for _, used in self.used()):
            raise Refused(f"outbox: attempt {attempt} was used before")
        path = self._path(round_number, attempt)
        write_atomically(path, data, mode=0o600)
        for other in self._folder.glob(f"*-*{MASKED}"):
            if other != path and is_large(size := other.stat().st_size):
                write_atomically(other.with_suffix(GONE), str(size).encode(), mode=0o600)
                other.unlink()

    def get(self, round_number: int, attempt: int) -> bytes | None:
        path = self._path(round_number, attempt)
        return path.read_bytes() if path.is_file() else None

    def used(self) -> Sequence[tuple[int, int]]:
        left = (path for kind in (MASKED, GONE) for path in self._folder.glob(f"*-*{kind}"))
        found = (path.stem.split("-") for path in left)
        return sorted({(int(round_number), int(attempt)) for round_number, attempt in found})

    def _path(self, round_number: int, attempt: int) -> Path:
        return self._folder / f"{round_number:06d}-{attempt:06d}{MASKED}"


@dataclass
class MemoryOutbox(MaskedOutbox):
    """For simulations, where no node outlives the process: the last input, and what was used."""

    last: tuple[int, int, bytes] = (0, 0, b"")
    seen: list[tuple[int, int]] = field(default_factory=list)

    def put(self, round_number: int, attempt: int, data: bytes) -> None:
        if any(used == attempt for _, used in self.seen):
            raise Refused(f"outbox: attempt {attempt} was used before")
        self.seen.append((round_number, attempt))
        self.last = (round_number, attempt, data)

    def get(self, round_number: int, attempt: int) -> bytes | None:
        return self.last[2] if self.last[:2] == (round_number, attempt) else None

    def used(self) -> Sequence[tuple[int, int]]:
        return self.seen


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
        """Keep a plan, durably, before it is acted on."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_atomically(self._path(plan), plan.to_bytes(), mode=0o600)

    def tried(self, plan: RoundPlan) -> bool:
        """Whether its attempt was acted on before."""
        return self._path(plan).is_file()

    def _path(self, plan: RoundPlan) -> Path:
        return self.folder / f"{plan.attempt:06d}.plan"

    def _all(self) -> Iterator[RoundPlan]:
        for path in sorted(self.folder.glob("*.plan")) if self.folder.is_dir() else ():
            yield RoundPlan.from_bytes(path.read_bytes())
