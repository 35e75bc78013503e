"""The trainer: the one object at an institution that touches its data.

    1. consent: is the manifest for the model and adapter that lie here? reserve its whole ε and δ, or refuse
    2. train:   is the plan bound to that manifest and to this very state? reserve the attempt, durably
    3.          draw, clip, noise, step                                      (client.training)
                in mode "client": train without noise, clip the whole update; noise follows with the mask
    4.          commit the digest of what leaves; hand it out

Whatever a coordinator sends can only ask. In simulation the same object is called in process.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from safetensors.numpy import load, save

from fedlora.client.training import ClientData, LocalTraining, Moments
from fedlora.common.errors import BadInput, Refused
from fedlora.common.files import write_atomically
from fedlora.common.ledger import Budget, Ledger
from fedlora.common.messages import RoundPlan, RunManifest, Update
from fedlora.common.privacy import Spend, charged_epsilon, stated_epsilon
from fedlora.common.randomness import OsRandom, Random, SeededRandom
from fedlora.common.skellam import clipped
from fedlora.common.state import AdapterState

log = logging.getLogger(__name__)

LARGEST_VALUE = (
    1e3  # of a broadcast adapter: attention's scores stay far below what a mask subtracts from padding
)


@dataclass(frozen=True)
class MomentStore:
    """An optimiser's state between rounds: noised values, nothing else.

    Two files for each client and phase, so that a round that is killed after its write and before the
    server's commit finds the moments it started from. Each is whole and on disk before it replaces what was there;
    one that can't be read is as good as none, for an optimiser begins anew without harm and an attempt is dear.
    """

    folder: Path

    def read(self, client: str, phase: int, before_round: int) -> Moments:
        """The moments of the last round before `before_round`; nothing where there are none."""
        held = self._held(client, phase, before_round).values()
        found = max(held, key=_round_of, default={})
        return {name: value for name, value in found.items() if name != "round"}

    def write(self, client: str, phase: int, round_number: int, moments: Moments) -> None:
        if not moments:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        held = self._held(client, phase, round_number)
        base = max(held, key=lambda slot: _round_of(held[slot]), default=None)
        target = next(slot for slot in self._slots(client, phase) if slot != base)
        write_atomically(target, save({**moments, "round": np.array([round_number], dtype=np.int64)}))

    def _held(self, client: str, phase: int, before_round: int) -> dict[Path, Moments]:
        """What each slot holds that was written before `before_round`."""
        held = {slot: _moments(slot) for slot in self._slots(client, phase)}
        return {slot: found for slot, found in held.items() if found and _round_of(found) < before_round}

    def _slots(self, client: str, phase: int) -> tuple[Path, Path]:
        stem = f"{hashlib.sha256(client.encode()).hexdigest()[:16]}-{phase}"
        return self.folder / f"{stem}-a.safetensors", self.folder / f"{stem}-b.safetensors"


class Trainer:
    """An institution's side of a run. `ledger` None is for runs without privacy only.

    `masked`: its updates leave under masks, which is where the noise of mode "client" is added; else such a run is
    refused.
    """

    def __init__(
        self,
        data: ClientData,
        training: LocalTraining,
        ledger: Ledger | None,
        budget: Budget,
        moments: MomentStore,
        masked: bool = False,
    ) -> None:
        self._masked = masked
        self._data = data
        self._training = training
        self._ledger = ledger
        self._budget = budget
        self._moments = moments
        self._manifest: RunManifest | None = None

    def consent(self, manifest: RunManifest) -> None:
        """Reserve the whole schedule; Refused past the cap, BadInput where the model is another one."""
        model = self._training.gradients.model
        projection = "" if model.projection is None else model.projection.digest
        for name, found, expected in (
            ("base_digest", manifest.base_digest, model.base_digest),
            ("spec_digest", manifest.spec_digest, model.spec.digest),
            ("projection_digest", manifest.projection_digest, projection),
        ):
            if found != expected:
                raise BadInput(f"manifest {name}: found {found}, expected {expected}")
        if manifest.mode == "client" and not self._masked:
            raise Refused(
                "manifest mode: found client, whose updates leave under masks only, expected record"
            )
        if manifest.mode in ("record", "client"):
            self._required_ledger().consent(
                self._budget, manifest.digest, charge(manifest), [phase.attempts for phase in manifest.phases]
            )
        elif manifest.mode != "none":
            raise BadInput(f"manifest mode: found {manifest.mode!r}, expected record, client or none")
        self._manifest = manifest

    def train(self, plan: RoundPlan, state: AdapterState) -> Update:
        """One attempt at one round. Nothing is read from the data before the ledger holds the reservation."""
        manifest = self._manifest
        if manifest is None or plan.manifest != manifest.digest:
            raise Refused(f"plan manifest: found {plan.manifest}, which was not consented to")
        if manifest.phase_of(plan.round) != plan.phase:
            raise BadInput(f"plan phase: found {plan.phase} for round {plan.round}")
        if state.digest != plan.adapter:
            raise BadInput(f"plan adapter: found {state.digest}, expected {plan.adapter}")
        if manifest.mode == "none":
            return self._update(manifest, plan, state, private=False)
        largest = float(np.abs(state.vector).max(initial=0.0))
        if largest > LARGEST_VALUE:
            raise BadInput(
                f"plan adapter: found a value of size {largest:g}, expected at most {LARGEST_VALUE:g}"
            )
        ledger = self._required_ledger()
        ledger.reserve(self._budget.name, plan.manifest, plan.phase, plan.round, plan.attempt)
        update = self._update(manifest, plan, state, private=True)
        # The chain of hashes may leave, so nothing of an update that has no noise yet goes into it.
        released = plan.to_bytes() if manifest.mode == "client" else _bytes(update)
        ledger.commit(self._budget.name, plan.manifest, plan.round, plan.attempt, _digest(released))
        return update

    def _update(self, manifest: RunManifest, plan: RoundPlan, state: AdapterState, private: bool) -> Update:
        owner = self._data.owner
        # A seed that somebody knows voids amplification: it serves runs without privacy only. It does not
        # depend on the attempt, so that a resumed run ends with the bits of an undisturbed one.
        source: Random = OsRandom() if private else SeededRandom(manifest.seed, "train", owner, plan.round)
        phase = manifest.phases[plan.phase]
        moments = self._moments.read(owner, plan.phase, plan.round)
        by_step = manifest.mode == "record"
        result = self._training.update(self._data, phase, state, moments, source, by_step)
        self._moments.write(owner, plan.phase, plan.round, result.moments)
        delta = clipped(result.delta, phase.clip) if manifest.mode == "client" else result.delta
        return Update(owner, plan.manifest, plan.round, plan.attempt, delta)

    def _required_ledger(self) -> Ledger:
        if self._ledger is None:
            raise Refused("ledger: found none, expected one: nothing private trains without it")
        return self._ledger


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


@lru_cache(maxsize=64)
def charge(manifest: RunManifest) -> Spend:
    """What a run with this manifest costs a budget; Refused where it claims less than its schedule costs."""
    stated = schedule_epsilon(manifest)
    return Spend(charged_epsilon(manifest) if manifest.mode == "client" else stated, manifest.delta)


@lru_cache(maxsize=64)
def schedule_epsilon(manifest: RunManifest) -> float:
    """ε of the manifest's whole schedule, computed here whatever the manifest claims; Refused above its claim."""
    stated = stated_epsilon(manifest)
    if stated > manifest.epsilon * (1 + 1e-6):
        raise Refused(f"manifest epsilon: found {manifest.epsilon}, but its schedule costs {stated:.4f}")
    return stated


def _bytes(update: Update) -> bytes:
    return update.delta.astype("<f4", copy=False).tobytes()


def _digest(released: bytes) -> str:
    return "sha256:" + hashlib.sha256(released).hexdigest()
