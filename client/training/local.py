"""Local training: a phase's steps from a given state to an update; nothing remembers the data.

The proximal term and the optimiser act on gradients that are already noised (post-processing), so
neither costs privacy, and the optimiser's moments may be carried from round to round.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from fedlora.client.training.head import head_clipped_sum
from fedlora.client.training.sampling import micro_batches, unit_records
from fedlora.client.training.step import ClipGroups, GradientSum, PerSampleGradients, private_mean
from fedlora.common.data.origin import NOWHERE, Origin
from fedlora.common.data.records import UnitIndex
from fedlora.common.errors import BadInput
from fedlora.common.manifest.manifest import Phase
from fedlora.common.model.features import FeatureCache
from fedlora.common.model.state import AdapterState, Vector
from fedlora.common.privacy.randomness import Random, draw_units
from fedlora.common.tasks.batch import Batch, Encoded, in_rows
from fedlora.common.tasks.task import WORD

Moments = Mapping[str, Vector]  # an optimiser's state, by name


@dataclass(frozen=True, eq=False)
class ClientData:
    """One institution's records: a shared encoding and the units that are its own."""

    owner: str
    encoded: Encoded
    units: UnitIndex
    origin: Origin = NOWHERE  # of the files that they were read from, as they were then
    # (units,) in [0, 1): what decides whether a unit is held out; None where no run may ask
    points: npt.NDArray[np.float64] | None = None
    # (records,) places of their groups among those that a run names; None where it names none
    groups: npt.NDArray[np.int64] | None = None


@dataclass(frozen=True, eq=False)
class LocalResult:
    """`delta` is what leaves; `moments` stay at the node."""

    delta: Vector
    moments: Moments


class LocalTraining:
    """Runs a phase's local steps on one resident model.

    `micro_batch_tokens` bounds memory and changes nothing else but, where batches are packed, the
    last bits. A private run takes its randomness from the operating system; who calls decides by
    the source that is passed in.
    """

    def __init__(
        self, gradients: PerSampleGradients, features: FeatureCache, micro_batch_tokens: int
    ) -> None:
        self.gradients = gradients
        self._model = gradients.model
        self._features = features
        self.tokens = micro_batch_tokens

    def update(
        self,
        data: ClientData,
        phase: Phase,
        state: AdapterState,
        moments: Moments,
        source: Random,
        private: bool,
        packed: bool = False,
    ) -> LocalResult:
        """`phase.steps` steps from `state`. Every step counts, also one whose draw is empty.

        `phase` is named by what the round moves of it (`RunManifest.recipe_of`).

        `packed`: a private step's batches are packed, not of fixed shapes.
        """
        weights = torch.nn.Parameter(torch.from_numpy(state.vector.astype(np.float32)))
        optimizer = _optimizer(phase, weights, moments)
        # noise elsewhere is dropped, its values are constant
        trained = self._model.spec.moved_by(phase.name)
        for _ in range(phase.steps):
            at = AdapterState(state.spec, weights.detach().numpy().copy())
            gradient = self._gradient(data, phase, at, source, private, packed)
            gradient += phase.proximal_mu * (at.vector.astype(np.float64) - state.vector)
            weights.grad = torch.from_numpy(np.where(trained, gradient, 0.0).astype(np.float32))
            optimizer.step()
        delta = weights.detach().numpy() - state.vector
        return LocalResult(delta, _moments(optimizer, phase))

    def clipped_step(
        self,
        data: ClientData,
        phase: Phase,
        state: AdapterState,
        source: Random,
        packed: bool = False,
    ) -> npt.NDArray[np.float64]:
        """(size,) float64: one SGD step of the sum of clipped units, which has no noise yet.

        Nothing is rounded to float32, and no optimiser or state comes between: what one unit moves
        it by is its clipped gradient. BadInput for a phase of another kind of round.
        """
        if phase.steps != 1 or phase.optimizer != "sgd":
            raise BadInput(
                f"manifest phase: found {phase.steps} steps of {phase.optimizer[:40]}, expected 1"
                " of sgd, since noise is added after it"
            )
        total = self._sum(data, phase, state, source, True, packed)
        return total.vector * (-phase.learning_rate / phase.expected_units)

    def _gradient(
        self,
        data: ClientData,
        phase: Phase,
        at: AdapterState,
        source: Random,
        private: bool,
        packed: bool,
    ) -> npt.NDArray[np.float64]:
        """(size,) float64 mean gradient of one step, noised where the run is private."""
        total = self._sum(data, phase, at, source, private, packed)
        if private:
            noise, expected = phase.noise_multiplier, phase.expected_units
            return private_mean(total, self._groups(phase), noise, expected, source)
        return total.vector / phase.expected_units

    def _sum(
        self,
        data: ClientData,
        phase: Phase,
        at: AdapterState,
        source: Random,
        clipped: bool,
        packed: bool,
    ) -> GradientSum:
        """Of the units of a new draw, each clipped where that is asked for."""
        self._model.load(at)
        drawn = draw_units(len(data.units), phase.sampling_rate, source)
        groups = self._groups(phase)
        if phase.name == "head":
            return self._head_sum(data, drawn, at, groups if clipped else None)
        if clipped:
            encoded, units = data.encoded, data.units
            return self.gradients.clipped_sum(encoded, units, drawn, groups, self.tokens, packed)
        batches = micro_batches(data.units, drawn, data.encoded.lengths, self.tokens)
        return self.gradients.plain_sum(data.encoded, batches)

    def _head_sum(
        self,
        data: ClientData,
        drawn: npt.NDArray[np.int64],
        at: AdapterState,
        groups: ClipGroups | None,
    ) -> GradientSum:
        """Sum over the head's coordinates, zero elsewhere."""
        kept = self._features.get(data.owner, data.encoded, data.units.records, at)
        self._model.load(at)
        places, owners = unit_records(data.units, drawn)
        scored = data.encoded.scored(data.units.records)  # of each record, one or its words
        rows, records = unit_records(scored, places)
        targets = data.encoded.targets[scored.records[rows]]
        if data.encoded.by_token:
            targets = np.stack([targets, records], axis=1)
        bound = None if groups is None else groups.bounds[0]
        total = head_clipped_sum(
            self._model.head,
            self._losses,
            kept,
            torch.from_numpy(targets).to(kept.device),
            owners[records],
            bound,
            places=torch.from_numpy(rows).to(kept.device),
        )
        vector = np.zeros(at.spec.size, dtype=np.float64)
        vector[at.spec.head_mask()] = total.vector
        return GradientSum(vector, total.units, total.nonfinite)

    def _losses(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """(records,) of what a head gives; words come with the number of their record.

        Records of about as many words are filled up together: one long record makes no room for
        its length beside all others, nor time. Those without a word, whose loss is 0, are left out.
        """
        task = self._model.task
        if task.reads != WORD:
            return task.losses(logits, Batch(targets, targets, targets))
        tags, records = targets.unbind(dim=1)
        sizes = torch.bincount(records - records[0])
        doublings, found = sizes[records - records[0]].float().log2().ceil(), []
        for each in sorted(set(doublings.tolist())):
            of = torch.nonzero(doublings == each).squeeze(1)
            new = records[of].diff(prepend=records[of[:1]]) > 0
            rows = new.cumsum(dim=0)
            found.append(task.losses(*in_rows(logits[of], tags[of], rows, int(rows[-1]) + 1)))
        return torch.cat(found)

    def _groups(self, phase: Phase) -> ClipGroups:
        spec, moves = self._model.spec, phase.name
        if not moves.startswith("adapter") or phase.head_clip == 0:
            return ClipGroups.flat(spec, phase.clip, moves)
        return ClipGroups.split(spec, phase.clip, phase.head_clip, moves)


def _optimizer(
    phase: Phase, weights: torch.nn.Parameter, moments: Moments
) -> torch.optim.Optimizer:
    if phase.optimizer == "sgd":
        return torch.optim.SGD([weights], lr=phase.learning_rate)
    if phase.optimizer != "adamw":
        raise BadInput(
            f"manifest phase optimizer: found {phase.optimizer!r}, expected sgd or adamw"
        )
    optimizer = torch.optim.AdamW([weights], lr=phase.learning_rate, weight_decay=0.0)
    if moments and phase.carry_optimizer:
        optimizer.state[weights] = {
            name: torch.from_numpy(value.copy()) for name, value in moments.items()
        }
        optimizer.state[weights]["step"] = optimizer.state[weights]["step"].reshape(())
    return optimizer


def _moments(optimizer: torch.optim.Optimizer, phase: Phase) -> Moments:
    if not phase.carry_optimizer or phase.optimizer != "adamw":
        return {}
    (state,) = optimizer.state.values()
    return {
        name: np.atleast_1d(value.detach().numpy()).astype(np.float32)
        for name, value in state.items()
    }
