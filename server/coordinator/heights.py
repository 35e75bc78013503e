"""How far each member's ledger had come when it last said so: what a restored one falls short of.

A ledger only grows, and its height is how many entries it has. A member whose ledger is lower than
it was, or of the same height and another one, was put back to an older day or has another ledger:
what it spent in between it would spend again. Its operator finds the newest ledger; a member that
has lost it for good is revoked, and enrolled again under a new key, from which on it is another.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path

from fedlora.common.codec.strict import build, json_table
from fedlora.common.disk import locks
from fedlora.common.disk.files import read_bytes, write_atomically
from fedlora.common.errors import FedloraError

HEIGHTS = "heights.json"


@dataclass(frozen=True)
class Height:
    """How many entries a ledger has, and which one it is there; 0 where nothing was said."""

    height: int = 0
    head: str = ""


def put_back(seen: Height, found: Height) -> str:
    """Why a ledger that was `seen` before can't be the one that is `found` now, or ""."""
    if found.height < seen.height:
        return (
            f"ledger height: found {found.height}, expected at least {seen.height}, which this"
            " member's ledger had before: it was restored from an older copy, or is another one"
        )
    if found.height == seen.height and found.head != seen.head:
        return (
            f"ledger height: found another entry {found.height} than this member's ledger had"
            " before: it was restored from an older copy, or is another one"
        )
    return ""


class Heights:
    """The highest of each member, in one file; `path` lies in the coordinator's folder."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def seen(self, member: str) -> Height:
        """The highest that a member has stated."""
        return self._read().get(member, Height())

    def fault(self, member: str, found: Height) -> str:
        """Why a member's ledger is none that goes on from what was seen of it; "" where it is."""
        return put_back(self.seen(member), found)

    def note(self, member: str, found: Height) -> None:
        """Keep what a member's ledger has come to, durably, if it is higher."""
        with self._locked():
            heights = self._read()
            if found.height > heights.get(member, Height()).height:
                self._write(heights | {member: found})

    def forget(self, member: str) -> None:
        """Know nothing of this member's ledger any more."""
        with self._locked():
            heights = self._read()
            if heights.pop(member, None) is not None:
                self._write(heights)

    def _locked(self) -> AbstractContextManager[None]:
        lock = self._path.with_suffix(".lock")
        held = FedloraError(f"{lock}: found it held by another process, expected it free")
        return locks.exclusive(lock, held, locks.SECONDS)

    def _write(self, heights: Mapping[str, Height]) -> None:
        table = {name: asdict(each) for name, each in heights.items()}
        write_atomically(self._path, json.dumps(table, indent=1, sort_keys=True).encode())

    def _read(self) -> dict[str, Height]:
        if not self._path.exists():
            return {}
        table = json_table(read_bytes(self._path), str(self._path))
        return {name: build(Height, each, f"{self._path} {name}") for name, each in table.items()}
