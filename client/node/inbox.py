"""The adapter that comes in parts: one at a time, of whichever run, so that none fills a disk.

Parts of another adapter, or of the same one cut otherwise, take its place.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from fedlora.common.disk.mapped import mapped
from fedlora.common.errors import BadInput
from fedlora.common.manifest.manifest import RunManifest
from fedlora.common.protocol.pieces import Coming
from fedlora.common.protocol.vector_parts import Arrival, cut_file
from fedlora.common.protocol.vectors import BYTES


@dataclass(frozen=True)
class Inbox:
    """One file in a folder: what has come of an adapter."""

    folder: Path

    def arrival(self, coming: Coming) -> Arrival:
        """Where the parts of `coming` are added; what lies there of another adapter goes."""
        listed = hashlib.sha256(coming.to_bytes()).hexdigest()
        path = self.folder / f"{_hashed(coming.adapter)}-{listed}"
        for other in self.folder.iterdir() if self.folder.is_dir() else ():
            if other != path:
                other.unlink()
        return Arrival(path, coming.parts)

    def read(self, manifest: RunManifest, adapter: str) -> memoryview:
        """The adapter of this digest as float32, little-endian; BadInput where it is not whole."""
        expected = BYTES["float32"] * manifest.vector_size
        found = [*self.folder.glob(f"{_hashed(adapter)}-*")]
        size = found[0].stat().st_size if found else 0
        if not expected or size != expected:
            raise BadInput(
                f"task adapter: found {size} bytes that came before it, expected {expected}"
            )
        hasher = hashlib.sha256(manifest.spec_digest.encode())
        for part in cut_file(found[0]):
            hasher.update(part)
        if f"sha256:{hasher.hexdigest()}" != adapter:
            found[0].unlink()  # it comes again
            raise BadInput("task adapter: found other bytes on disk than its digest is of")
        return mapped(found[0])


def _hashed(adapter: str) -> str:
    """A name that a file can have, whatever a coordinator calls an adapter."""
    return hashlib.sha256(adapter.encode()).hexdigest()
