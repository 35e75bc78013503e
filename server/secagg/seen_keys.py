"""The keys of a run's earlier epochs, and who signed them: nodes refuse each list with one.

Nodes remember them as long as they run, so the coordinator must over its own restarts: else one
member that repeats an old key makes all others refuse each U1. Who signs one key for two epochs is
proven to lie by its own signatures.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from fedlora.common.disk.files import append_line
from fedlora.common.errors import Refused
from fedlora.common.secagg.wire import KeyOffer
from fedlora.server.secagg.log import KEYS, UNLIMITED, tables_of

log = logging.getLogger(__name__)


class SeenKeys:
    """As hashes: no recorded key lies on a disk. In `folder`, durably; without one in memory."""

    def __init__(self, folder: Path | None = None) -> None:
        self._path = None if folder is None else folder / KEYS
        self._seen: dict[str, tuple[str, str]] = {}  # by key: its epoch, and who signed it
        self.liars: set[str] = set()
        for table in [] if self._path is None else tables_of(self._path):
            self._take(table)

    def check(self, offer: KeyOffer) -> None:
        """Refused where a key was seen; who signed it for another epoch, whosever, is a liar."""
        epoch = offer.epoch.hex()
        again = sorted({self._seen[key] for key in _hashes(offer) if key in self._seen})
        for earlier, owner in again:
            # Of the same epoch it is no lie: a carrier may bring one offer twice.
            if earlier != epoch and offer.name not in self.liars:
                log.warning(
                    "keys: %s signed a key that %s had signed for an earlier epoch",
                    offer.name,
                    owner,
                )
                self._keep({"liar": offer.name, "owner": owner, "epochs": [earlier, epoch]})
        if again:
            raise Refused(
                f"keys of {offer.name}: found one that {again[0][1]} signed for an earlier epoch,"
                " expected fresh ones"
            )

    def add(self, offers: Collection[KeyOffer]) -> None:
        """The keys of a U1; on disk when this returns, before any node sees them."""
        epoch = next(iter(offers)).epoch.hex()
        self._keep({"epoch": epoch, "keys": {offer.name: _hashes(offer) for offer in offers}})

    def _keep(self, table: Mapping[str, Any]) -> None:
        if self._path is not None:
            append_line(self._path, table, UNLIMITED)
        self._take(table)

    def _take(self, table: Mapping[str, Any]) -> None:
        if "liar" in table:
            self.liars.add(str(table["liar"]))
            return
        for name, hashes in table["keys"].items():
            self._seen.update((key, (table["epoch"], name)) for key in hashes)


def _hashes(offer: KeyOffer) -> list[str]:
    return [hashlib.sha256(key).hexdigest() for key in (offer.share_key, *offer.mask_keys)]
