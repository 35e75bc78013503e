"""An optimiser's state between rounds: on the institution's disk, or in memory alone."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors.numpy import load, save

from fedlora.client.training.local import Moments
from fedlora.common.disk.files import write_atomically

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MomentStore:
    """An optimiser's state between rounds, in files that only their owner reads.

    A node keeps there what is made of noised gradients, and a simulation, whose data are the
    researcher's own, whatever it has.

    Two files for each client and phase (or a phase's rounds of one half of LoRA), so that a round
    that is killed after its write and before the server's commit finds the moments it started from.
    Each is whole and on disk before it replaces what was there; one that can't be read is as good
    as none, for an optimiser begins anew without harm and an attempt is dear.
    """

    folder: Path

    def read(self, client: str, phase: int | str, before_round: int) -> Moments:
        """The moments of the last round before `before_round`; nothing where there are none."""
        held = self._held(client, phase, before_round).values()
        found = max(held, key=_round_of, default={})
        return {name: value for name, value in found.items() if name != "round"}

    def write(self, client: str, phase: int | str, round_number: int, moments: Moments) -> None:
        """Keep a client's moments after a round, beside those of the round before."""
        if not moments:
            return
        held = self._held(client, phase, round_number)
        base = max(held, key=lambda slot: _round_of(held[slot]), default=None)
        target = next(slot for slot in self._slots(client, phase) if slot != base)
        self._save(target, save({**moments, "round": np.array([round_number], dtype=np.int64)}))

    def _held(self, client: str, phase: int | str, before_round: int) -> dict[Path, Moments]:
        """What each slot holds that was written before `before_round`."""
        held = {slot: self._moments(slot) for slot in self._slots(client, phase)}
        return {
            slot: found for slot, found in held.items() if found and _round_of(found) < before_round
        }

    def _slots(self, client: str, phase: int | str) -> tuple[Path, Path]:
        stem = f"{hashlib.sha256(client.encode()).hexdigest()[:16]}-{phase}"
        return self.folder / f"{stem}-a.safetensors", self.folder / f"{stem}-b.safetensors"

    def _moments(self, slot: Path) -> Moments:
        """What lies in a slot, its round among it; nothing where no whole file does."""
        try:
            found: Moments = load(self._load(slot))
            _round_of(found)
        except FileNotFoundError:
            return {}
        except Exception:  # the library raises several unrelated types
            log.warning("%s: found no readable moments; the optimiser begins anew", slot)
            return {}
        return found

    def _load(self, slot: Path) -> bytes:
        return slot.read_bytes()

    def _save(self, slot: Path, data: bytes) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(slot, data, mode=0o600)


@dataclass(frozen=True)
class UnnoisedMoments(MomentStore):
    """Of modes that add no noise in a step: they say as much as the data, so no file has them.

    They end with the process that trains; the optimiser then begins anew, without harm.
    """

    folder: Path = Path()
    held: dict[Path, bytes] = field(default_factory=dict)

    def _load(self, slot: Path) -> bytes:
        if slot not in self.held:
            raise FileNotFoundError(slot)
        return self.held[slot]

    def _save(self, slot: Path, data: bytes) -> None:
        self.held[slot] = data


def _round_of(moments: Moments) -> int:
    return int(moments["round"][0])
