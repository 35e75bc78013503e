"""A ledger's anchor: its newest head once more, in a place that no copy of its folder holds.

A head is restored with the ledger where a backup has both. The anchor lies elsewhere (another
machine's share, say), is written after every entry, and may be behind the chain, but never ahead of
it, nor of another chain. So a ledger that was put back to an older day refuses service, also where
it has gone on since.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fedlora.common.disk.files import write_atomically
from fedlora.common.errors import BadInput, Refused
from fedlora.common.ledger.signed_head import Head, opened_head, signed_head
from fedlora.common.trust.identity import Identity


class Anchor:
    """The file at `path`, of the ledger whose key this is."""

    def __init__(self, path: Path, key: Identity) -> None:
        self._path, self._key = path, key
        # what was verified or written here before
        self._seen: tuple[bytes | None, Head] = (None, Head())

    @property
    def missing(self) -> bool:
        """Whether there is none, or its disk is not there."""
        return not self._path.is_file()

    def check(self, at: Head, hash_of: Callable[[int], str]) -> None:
        """Refused where the chain, which ends `at`, is not the one that was anchored, or an older
        copy of it; `hash_of` gives the hash of an entry by its number. A missing anchor passes.
        """
        if self.missing:
            return
        found = self._read()
        if found.count > at.count:
            raise Refused(
                f"ledger anchor {self._path}: found height {found.count}, expected at most"
                f" {at.count}, the ledger's: it was restored from an older copy"
            )
        if found.count and hash_of(found.count) != found.hash:
            raise Refused(
                f"ledger anchor {self._path}: found another entry {found.count} than the ledger's:"
                " it was restored from an older copy and went on, or is another one"
            )

    def write(self, at: Head) -> None:
        """Anchor the chain here, durably; OSError where that can't be."""
        data = signed_head(self._key, at)
        write_atomically(self._path, data)
        self._seen = (data, at)

    def _read(self) -> Head:
        data = self._path.read_bytes()
        if data != self._seen[0]:
            try:
                self._seen = (data, opened_head(data, self._key.public))
            except (BadInput, Refused) as error:
                raise Refused(
                    f"ledger anchor {self._path}: found none that this ledger's key signed"
                ) from error
        return self._seen[1]
