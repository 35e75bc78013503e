"""An optimiser's state between rounds, on the institution's disk."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load, save

from fedlora.client.training.local import Moments
from fedlora.common.disk.files import write_atomically

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MomentStore:
    """An optimiser's state between rounds, in files that only their owner reads.

    Made of noised gradients where noise is added in every step (mode "record"). In modes "none" and
    "client" it is not noised, says as much as the data beside it, and must leave no more than they.

    Two files for each client and phase, so that a round that is killed after its write and before
    the server's commit finds the moments it started from. Each is whole and on disk before it
    replaces what was there; one that can't be read is as good as none, for an optimiser begins anew
    without harm and an attempt is dear.
    """

    folder: Path

    def read(self, client: str, phase: int, before_round: int) -> Moments:
        """The moments of the last round before `before_round`; nothing where there are none."""
        held = self._held(client, phase, before_round).values()
        found = max(held, key=_round_of, default={})
        return {name: value for name, value in found.items() if name != "round"}

    def write(self, client: str, phase: int, round_number: int, moments: Moments) -> None:
        """Keep a client's moments after a round, beside those of the round before."""
        if not moments:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        held = self._held(client, phase, round_number)
        base = max(held, key=lambda slot: _round_of(held[slot]), default=None)
        target = next(slot for slot in self._slots(client, phase) if slot != base)
        write_atomically(
            target, save({**moments, "round": np.array([round_number], dtype=np.int64)}), mode=0o600
        )

    def _held(self, client: str, phase: int, before_round: int) -> dict[Path, Moments]:
        """What each slot holds that was written before `before_round`."""
        held = {slot: _moments(slot) for slot in self._slots(client, phase)}
        return {
            slot: found for slot, found in held.items() if found and _round_of(found) < before_round
        }

    def _slots(self, client: str, phase: int) -> tuple[Path, Path]:
        stem = f"{hashlib.sha256(client.encode()).hexdigest()[:16]}-{phase}"
        return self.folder / f"{stem}-a.safetensors", self.folder / f"{stem}-b.safetensors"


def _moments(slot: Path) -> Moments:
    """What lies in a slot, its round among it; nothing where no whole file does."""
    try:
        found: Moments = load(slot.read_bytes())
        _round_of(found)
    except FileNotFoundError:
        return {}
    except Exception:  # the library raises several unrelated types
        log.warning("%s: found no readable moments; the optimiser begins anew", slot)
        return {}
    return found


def _round_of(moments: Moments) -> int:
    return int(moments["round"][0])
