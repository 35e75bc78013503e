"""Masked inputs that left or may have left: kept before they are sent, sent again as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from fedlora.common.disk.files import write_atomically
from fedlora.common.errors import Refused


class Outbox(Protocol):
    """The masked inputs of one run that left or may have left; durable where the node is."""

    def put(self, round_number: int, attempt: int, data: bytes) -> None:
        """Keep these bytes before they are sent; FedloraError where the attempt was used."""

    def get(self, round_number: int, attempt: int) -> bytes | None:
        """The exact bytes of an earlier `put`, or None."""

    def used(self) -> Sequence[tuple[int, int]]:
        """(round, attempt) of every `put`, also of those from before a restart."""


class FolderOutbox:
    """One file for each attempt; whole and on disk before `put` returns."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._folder = folder

    def put(self, round_number: int, attempt: int, data: bytes) -> None:
        if any(used == attempt for _, used in self.used()):
            raise Refused(f"outbox: attempt {attempt} was used before")
        write_atomically(self._path(round_number, attempt), data, mode=0o600)

    def get(self, round_number: int, attempt: int) -> bytes | None:
        path = self._path(round_number, attempt)
        return path.read_bytes() if path.is_file() else None

    def used(self) -> Sequence[tuple[int, int]]:
        found = (path.stem.split("-") for path in self._folder.glob("*-*.masked"))
        return sorted((int(round_number), int(attempt)) for round_number, attempt in found)

    def _path(self, round_number: int, attempt: int) -> Path:
        return self._folder / f"{round_number:06d}-{attempt:06d}.masked"


@dataclass
class MemoryOutbox:
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
