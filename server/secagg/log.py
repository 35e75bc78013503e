"""What a run keeps about its masked sums, as two files of its folder.

    sums.jsonl    a line for each attempt whose masks are asked for, on disk before they are; a
                  second one, with its end, replaces it
    keys.jsonl    the keys of each epoch's list, on disk before any node sees them, and who signed
                  one for two epochs

A line of the first says what may have been learnt, also where the sum was thrown away afterwards or
the process died: summary and card count these lines, and not the committed rounds. Nodes remember
the keys of a run as long as they run and refuse every list that holds one again, so the coordinator
must over its own restarts: else one member that repeats an old key makes all others refuse each
list. Who signs one key for two epochs is proven to lie by its own signatures.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedlora.common.disk.files import append_line, lines_of
from fedlora.common.errors import BadInput, Refused
from fedlora.common.manifest.manifest import RunManifest
from fedlora.common.secagg.wire import KeyOffer
from fedlora.server.rounds.cohort import SecureRecord

log = logging.getLogger(__name__)

SUMS, KEYS = "sums.jsonl", "keys.jsonl"
UNLIMITED = 1 << 62
# At each stage of an attempt: who was there before it, and who after it.
DROP_OUTS = (
    ("keys", "asked", "cohort"),
    ("shares", "cohort", "dealt"),
    ("input", "dealt", "members"),
    ("confirm", "members", "confirmed"),
    ("open", "confirmed", "opened"),
)


class SumLog:
    """Sums, keys and liars of one run: in `folder`, durably; without one in memory only.

    `liars` are proven by what they signed: an opening or a deal, or one key for two epochs. Keys
    are kept as hashes: one that was recorded does not lie on a disk.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._sums: dict[int, Mapping[str, Any]] = {}  # by attempt: its last line
        self._seen: dict[str, tuple[str, str]] = {}  # by key: its epoch, and who signed it
        self.liars: set[str] = set()
        if folder is not None:
            for table in tables_of(folder / SUMS):
                self._take_sum(table)
            for table in tables_of(folder / KEYS):
                self._take_keys(table)

    @property
    def sums(self) -> list[Mapping[str, Any]]:
        """The last line of each attempt, in order.

        Of one that was cut short the masks were not asked for, or another is.
        """
        return [self._sums[attempt] for attempt in sorted(self._sums)]

    def summary(self, manifest: RunManifest) -> dict[str, Any] | None:
        """How a run was aggregated, from what was noted of each sum that may have been learnt.

        A sum that did not count in the end is one of them. None where the run was not aggregated
        securely.
        """
        if manifest.secure is None:
            return None
        sums = self.sums
        return {
            "minimum_cohort": manifest.minimum_cohort,
            "colluders": manifest.secure.max_colluders,
            "threshold_rule": manifest.secure.threshold,
            "cohort": _range(sums, "cohort"),
            "threshold": _range(sums, "threshold"),
            "smallest_sum": _range(sums, "members")[0],
            "dropouts": {
                stage: sum(_lost(each, before, after) for each in sums)
                for stage, before, after in DROP_OUTS
            },
            "liars": sorted(self.liars),
            "suspected": sorted({name for each in sums for name in each.get("suspected", ())}),
            "sums": len(sums),
            "bits": manifest.secure.bits,
        }

    def note(self, record: SecureRecord) -> None:
        """What is about to be learnt, or how it ended; on disk when this returns."""
        table = asdict(record)
        self._append(SUMS, table)
        self._take_sum(table)

    def check_keys(self, offer: KeyOffer) -> None:
        """Refused where a key was seen; who signed it for another epoch, its own or somebody's, is
        a liar.
        """
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
                self._keep_keys({"liar": offer.name, "owner": owner, "epochs": [earlier, epoch]})
        if again:
            raise Refused(
                f"keys of {offer.name}: found one that {again[0][1]} signed for an earlier epoch,"
                " expected fresh ones"
            )

    def add_keys(self, offers: Collection[KeyOffer]) -> None:
        """The keys of a U1; on disk when this returns, before any node sees them."""
        epoch = next(iter(offers)).epoch.hex()
        self._keep_keys({"epoch": epoch, "keys": {offer.name: _hashes(offer) for offer in offers}})

    def _keep_keys(self, table: Mapping[str, Any]) -> None:
        self._append(KEYS, table)
        self._take_keys(table)

    def _append(self, name: str, table: Mapping[str, Any]) -> None:
        if self._folder is not None:
            append_line(self._folder / name, table, UNLIMITED)

    def _take_sum(self, table: Mapping[str, Any]) -> None:
        self._sums[int(table["attempt"])] = table
        self.liars.update(map(str, table["liars"]))

    def _take_keys(self, table: Mapping[str, Any]) -> None:
        if "liar" in table:
            self.liars.add(str(table["liar"]))
            return
        for name, hashes in table["keys"].items():
            self._seen.update((key, (table["epoch"], name)) for key in hashes)


def _hashes(offer: KeyOffer) -> list[str]:
    return [hashlib.sha256(key).hexdigest() for key in (offer.share_key, *offer.mask_keys)]


def _lost(each: Mapping[str, Any], before: str, after: str) -> int:
    """Drop-outs of a stage; none are known where a coordinator stopped before it knew them."""
    return 0 if each[after] is None else max(each[before] - each[after], 0)


def _range(sums: Sequence[Mapping[str, Any]], name: str) -> list[int]:
    values = [each[name] for each in sums] or [0]
    return [min(values), max(values)]


def tables_of(path: Path) -> list[Mapping[str, Any]]:
    """A log's lines; BadInput for one that a kill did not cut short and that is none.

    The log counts what was cut.
    """
    found: list[Mapping[str, Any]] = []
    cut_short = 0
    for line in lines_of(path):
        if line.value is None:
            cut_short += 1
        elif line.table is None:
            what = str(line.value)[:40]
            raise BadInput(f"{path} line {line.number}: found {what}, expected a table")
        else:
            found.append(line.table)
    if cut_short:
        log.warning(
            "%s: found %d lines that can't be read, and counted the others", path, cut_short
        )
    return found
