"""The trainer: the one object at an institution that touches its data.

    1. consent: is the manifest for the model and adapter that lie here? reserve its whole ε and δ,
                or refuse
    2. train:   is the plan bound to that manifest and to this very state? reserve the attempt,
                durably
    3.          draw, clip, noise, step (client.training.local), round to what the manifest sends;
                after the last round count, noise, round (client.training.hold_out)
    4.          commit the digest of what leaves; hand it out

What of this a run needs, its guarantee says: where noise follows with the mask, the whole update is
clipped here; a run without privacy has nothing to reserve. Whatever a coordinator sends can only
ask. In simulation the same object is called in process.
"""

from __future__ import annotations

from fedlora.client.training.head import layers_of
from fedlora.client.training.hold_out import noisy_counts, parted
from fedlora.client.training.local import ClientData, LocalTraining
from fedlora.client.training.moments import MomentStore
from fedlora.common.codec.strict import digest_of
from fedlora.common.errors import BadInput, Refused
from fedlora.common.ledger.ledger import Budget, Ledger
from fedlora.common.ledger.subject import Subject
from fedlora.common.manifest.manifest import RunManifest
from fedlora.common.manifest.plan import RoundPlan, Update
from fedlora.common.model.network import AdapterModel
from fedlora.common.model.state import AdapterState
from fedlora.common.privacy.accountant import Spend
from fedlora.common.privacy.guarantee import SLACK, Guarantee
from fedlora.common.privacy.modes import guarantee_of
from fedlora.common.privacy.randomness import OsRandom, Random, SeededRandom
from fedlora.common.protocol.vectors import rounded

# of a broadcast adapter: attention's scores stay far below what a mask subtracts from padding
LARGEST_VALUE = 1e3


class Trainer:
    """An institution's side of a run. `ledger` None is for runs without privacy only.

    `masked`: its updates leave under masks; else a run that needs them is refused.
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
        self._guarantee: Guarantee | None = None  # of the run that was consented to
        self._trained, self._held = data, data  # once it holds some out: two parts

    def consent(self, manifest: RunManifest) -> None:
        """Reserve the whole schedule; Refused past the cap, BadInput for another model."""
        check_model(manifest, self._training.gradients.model)
        guarantee = guarantee_of(manifest)
        units = len(self._data.units)
        if units > guarantee.most_units:
            raise BadInput(f"data: found {units} units, expected at most {guarantee.most_units:g}")
        if guarantee.needs_masks and not self._masked:
            raise Refused(
                f"manifest mode: found {guarantee.name}, whose updates leave under masks only,"
                " expected record"
            )
        guarantee.check_network(self._training.gradients.model.spec)
        if guarantee.private:
            self._required_ledger().consent(
                self._budget,
                manifest.digest,
                charge(guarantee),
                [phase.attempts for phase in manifest.accounted],
                Subject.of(manifest, self._data.origin),
            )
        self._guarantee = guarantee
        self._trained, self._held = parted(self._data, manifest)

    def train(self, plan: RoundPlan, state: AdapterState) -> Update:
        """One attempt at one round. No data are read before the ledger holds the reservation."""
        guarantee = self._guarantee
        if guarantee is None or plan.manifest != guarantee.manifest.digest:
            raise Refused(f"plan manifest: found {plan.manifest}, which was not consented to")
        if guarantee.manifest.phase_of(plan.round) != plan.phase:
            raise BadInput(f"plan phase: found {plan.phase} for round {plan.round}")
        check_state(guarantee, plan, state)
        if not guarantee.private:
            return self._update(guarantee, plan, state)
        ledger = self._required_ledger()
        ledger.reserve(self._budget.name, plan.manifest, plan.phase, plan.round, plan.attempt)
        update = self._update(guarantee, plan, state)
        digest = digest_of(guarantee.committed(plan, update))
        ledger.commit(self._budget.name, plan.manifest, plan.round, plan.attempt, digest)
        return update

    def _update(self, guarantee: Guarantee, plan: RoundPlan, state: AdapterState) -> Update:
        owner, manifest = self._data.owner, guarantee.manifest
        # A seed that somebody knows voids amplification: it serves runs without privacy only. It
        # does not depend on the attempt, so that a resumed run ends with the bits of an undisturbed
        # one.
        source: Random = (
            OsRandom()
            if guarantee.private
            else SeededRandom(manifest.seed, "train", owner, plan.round)
        )
        answers = (owner, plan.manifest, plan.round, plan.attempt)
        if manifest.evaluates(plan.phase):
            model = self._training.gradients.model
            model.load(state)
            counts = noisy_counts(model, self._held, manifest, source)
            return Update(*answers, rounded(counts, manifest.wire))
        phase, packed = manifest.recipe_of(plan.round), manifest.batches == "packed"
        if guarantee.clip_in_step and not guarantee.noise_in_step:
            step = self._training.clipped_step(self._trained, phase, state, source, packed)
            return Update(*answers, step)
        half = phase.name.partition(".")[2]  # has moments of its own, as if there were no other
        kept = f"{plan.phase}.{half}" if half else plan.phase
        moments = self._moments.read(owner, kept, plan.round)
        by_step = guarantee.noise_in_step
        result = self._training.update(
            self._trained, phase, state, moments, source, by_step, packed
        )
        self._moments.write(owner, kept, plan.round, result.moments)
        delta = rounded(guarantee.clipped(result.delta, phase), manifest.wire)
        return Update(*answers, delta)

    def _required_ledger(self) -> Ledger:
        if self._ledger is None:
            raise Refused("ledger: found none, expected one: nothing private trains without it")
        return self._ledger


def check_state(guarantee: Guarantee, plan: RoundPlan, state: AdapterState) -> None:
    """BadInput where `state` is not the one that the plan starts from, or has too large a value
    for a run with privacy.
    """
    if state.digest != plan.adapter:
        raise BadInput(f"plan adapter: found {state.digest}, expected {plan.adapter}")
    if not guarantee.private:
        return
    # not np.abs, which would be as large as the adapter
    largest = float(max(state.vector.max(initial=0.0), -state.vector.min(initial=0.0)))
    if largest > LARGEST_VALUE:
        raise BadInput(
            f"plan adapter: found a value of size {largest:g}, expected at most {LARGEST_VALUE:g}"
        )


def check_model(manifest: RunManifest, model: AdapterModel) -> None:
    """BadInput where the manifest is for another base, adapter or projection than `model` has, or
    asks of it what it can't do: before anything is charged.
    """
    projection = "" if model.projection is None else model.projection.digest
    for name, found, expected in (
        ("base_digest", manifest.base_digest, model.base_digest),
        ("spec_digest", manifest.spec_digest, model.spec.digest),
        ("projection_digest", manifest.projection_digest, projection),
    ):
        if found != expected:
            raise BadInput(f"manifest {name}: found {found}, expected {expected}")
    if manifest.vector_size not in (0, model.spec.size):
        raise BadInput(
            f"manifest vector_size: found {manifest.vector_size}, expected {model.spec.size} or 0"
        )
    if any(phase.name == "head" for phase in manifest.phases):
        layers_of(model.head)


def charge(guarantee: Guarantee) -> Spend:
    """What a run costs a budget, whatever it claims; Refused where it claims less than it costs."""
    claimed, stated = guarantee.manifest.epsilon, guarantee.stated_epsilon()
    if stated > claimed * SLACK:
        raise Refused(f"manifest epsilon: found {claimed}, but its schedule costs {stated:.4f}")
    return guarantee.charge()
