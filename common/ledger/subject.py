"""Whose records a consent is about: what a budget counts, for whom, and in which files it lay."""

from __future__ import annotations

from collections.abc import KeysView
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from fedlora.common.data.origin import NOWHERE, Origin
from fedlora.common.manifest.manifest import RunManifest

RECORD = "record"  # the unit where no column names one


@dataclass(frozen=True)
class Subject:
    """Kept with a consent; empty is what is not known."""

    unit: str = ""  # of privacy: RECORD, or the column that names it
    federation: str = ""
    path: str = ""  # of the data, without links
    data: str = ""  # the digest of their bytes then, which an entry has under the ledger's key only
    files: tuple[tuple[str, str], ...] = ()  # each file's path and digest, likewise

    @classmethod
    def of(cls, manifest: RunManifest, origin: Origin = NOWHERE) -> Subject:
        """The manifest's unit, also where a whole institution is protected: what such a run costs a
        budget of units is no less than what it costs any of them.
        """
        unit = manifest.unit or RECORD
        return cls(unit, manifest.federation, origin.path, origin.digest, origin.files)

    @property
    def lying(self) -> dict[str, Any]:
        """Where the data lie, and their digests, as an entry has them."""
        return {"path": self.path, "data": self.data, "files": self.files}

    @property
    def traces(self) -> frozenset[str]:
        """What a later consent to the same data has in common with this one: paths and digests."""
        each = {trace for file in self.files for trace in file if trace}
        return frozenset(filter(None, {self.path, self.data, *each}))

    @property
    def around(self) -> frozenset[str]:
        """The folders that hold the data: one of them may have been charged as a whole."""
        places = [path for path, _ in self.files] or [self.path]
        return frozenset(str(each) for place in places for each in PurePath(place).parents)

    def beside(self, known: KeysView[str]) -> bool:
        """Whether anything lies neither in a place that is `known`, nor in a folder that is."""
        places = {self.path, *(path for path, _ in self.files)} - {""}
        return any(
            known.isdisjoint({place, *map(str, PurePath(place).parents)}) for place in places
        )


UNKNOWN = Subject()
