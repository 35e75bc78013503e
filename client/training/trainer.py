"""The trainer: the one object at an institution that touches its data.

    1. consent: is the manifest for the model and adapter that lie here? reserve its whole ε and δ,
                or refuse
    2. train:   is the plan bound to that manifest and to this very state? reserve the attempt,
                durably
    3.          draw, clip, noise, step                                      (client.training.local)
                in mode "client": train without noise, clip the whole update; noise follows with
                the mask
    4.          commit the digest of what leaves; hand it out

Whatever a coordinator sends can only ask. In simulation the same object is called in process.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np

from fedlora.client.training.local import ClientData, LocalTraining
from fedlora.client.training.moments import MomentStore
from fedlora.common.errors import BadInput, Refused
from fedlora.common.ledger.ledger import Budget, Ledger
from fedlora.common.manifest.manifest import RunManifest
from fedlora.common.manifest.plan import RoundPlan, Update
from fedlora.common.model.state import AdapterState
from fedlora.common.privacy.accountant import Spend, charged_epsilon, stated_epsilon
from fedlora.common.privacy.randomness import OsRandom, Random, SeededRandom
from fedlora.common.privacy.skellam import clipped

# of a broadcast adapter: attention's scores stay far below what a mask subtracts from padding
LARGEST_VALUE = 1e3


class Trainer:
    """An institution's side of a run. `ledger` None is for runs without privacy only.

    `masked`: its updates leave under masks, which is where the noise of mode "client" is added;
    else such a run is refused.
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
        """Reserve the whole schedule; Refused past the cap, BadInput for another model."""
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
                self._budget,
                manifest.digest,
                charge(manifest),
                [phase.attempts for phase in manifest.phases],
            )
        elif manifest.mode != "none":
            raise BadInput(
                f"manifest mode: found {manifest.mode!r}, expected record, client or none"
            )
        self._manifest = manifest

    def train(self, plan: RoundPlan, state: AdapterState) -> Update:
        """One attempt at one round. No data are read before the ledger holds the reservation."""
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
                f"plan adapter: found a value of size {largest:g}, expected at most"
                f" {LARGEST_VALUE:g}"
            )
        ledger = self._required_ledger()
        ledger.reserve(self._budget.name, plan.manifest, plan.phase, plan.round, plan.attempt)
        update = self._update(manifest, plan, state, private=True)
        # The chain of hashes may leave, so nothing of an update that has no noise yet goes into it.
        released = plan.to_bytes() if manifest.mode == "client" else _bytes(update)
        ledger.commit(self._budget.name, plan.manifest, plan.round, plan.attempt, _digest(released))
        return update

    def _update(
        self, manifest: RunManifest, plan: RoundPlan, state: AdapterState, private: bool
    ) -> Update:
        owner = self._data.owner
        # A seed that somebody knows voids amplification: it serves runs without privacy only. It
        # does not depend on the attempt, so that a resumed run ends with the bits of an undisturbed
        # one.
        source: Random = (
            OsRandom() if private else SeededRandom(manifest.seed, "train", owner, plan.round)
        )
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


@lru_cache(maxsize=64)
def charge(manifest: RunManifest) -> Spend:
    """What a run with this manifest costs a budget; Refused where it claims less than it costs."""
    stated = schedule_epsilon(manifest)
    return Spend(charged_epsilon(manifest) if manifest.mode == "client" else stated, manifest.delta)


@lru_cache(maxsize=64)
def schedule_epsilon(manifest: RunManifest) -> float:
    """ε of the manifest's whole schedule, computed here; Refused above what it claims."""
    stated = stated_epsilon(manifest)
    if stated > manifest.epsilon * (1 + 1e-6):
        raise Refused(
            f"manifest epsilon: found {manifest.epsilon}, but its schedule costs {stated:.4f}"
        )
    return stated


def _bytes(update: Update) -> bytes:
    return update.delta.astype("<f4", copy=False).tobytes()


def _digest(released: bytes) -> str:
    return "sha256:" + hashlib.sha256(released).hexdigest()
