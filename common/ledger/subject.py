"""Whose records a consent is about: what a budget counts, for whom, and in which file it lay."""

from __future__ import annotations

from dataclasses import dataclass

from fedlora.common.manifest.manifest import RunManifest

RECORD = "record"  # the unit where no column names one


@dataclass(frozen=True)
class Subject:
    """Kept with a consent; empty is what is not known."""

    unit: str = ""  # of privacy: RECORD, or the column that names it
    federation: str = ""
    path: str = ""  # of the data file, without links
    data: str = ""  # the digest of its bytes then, which an entry has under the ledger's key only

    @classmethod
    def of(cls, manifest: RunManifest, path: str = "", data: str = "") -> Subject:
        """The manifest's unit, also where a whole institution is protected: what such a run costs a
        budget of units is no less than what it costs any of them.
        """
        return cls(manifest.unit or RECORD, manifest.federation, path, data)


UNKNOWN = Subject()
