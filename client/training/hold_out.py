"""Which units a run does not train on, and the noisy counts of how an adapter does on them.

A unit is held out by a keyed hash of itself alone: of two data sets that differ by one unit, all
others are on the same side. The key is the ledger's, so that runs of one ledger hold out the same
units at the same share; what a run costs does not rest on it, for every unit is charged for both.

    counts = ( Σ_u mean over u's records of its cells  +  N(0, noise_multiplier²) ) / expected_units

A record's cell follows from its own tokens: it is computed in batches of fixed shapes. How many
units are held out is told by nothing but the noised counts, also where there are none.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from fedlora.client.training.local import ClientData
from fedlora.common.codec.framing import digest
from fedlora.common.data.records import Records, UnitIndex
from fedlora.common.data.unit_names import keyed_points
from fedlora.common.errors import BadInput, Refused
from fedlora.common.ledger.ledger import Ledger
from fedlora.common.manifest.counts import LOSS, Cells
from fedlora.common.manifest.manifest import Groups, RunManifest
from fedlora.common.model.elementwise import by_record
from fedlora.common.model.features import FEATURE_TOKENS
from fedlora.common.model.network import AdapterModel
from fedlora.common.model.shapes import Shape, padded, shaped
from fedlora.common.privacy.modes import guarantee_of
from fedlora.common.privacy.randomness import Random, gaussian
from fedlora.common.tasks.batch import Batch, Encoded

PURPOSE = "fedlora-hold-out-1"
NO_UNITS = UnitIndex(np.zeros(1, dtype=np.int64), np.zeros(0, dtype=np.int64))
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def unit_points(manifest: RunManifest, names: list[bytes], ledger: Ledger | None) -> Floats:
    """(units,) where each of `names` falls: what is below the share is held out.

    Refused where a run with privacy has no ledger, whose key it is under.
    """
    if not guarantee_of(manifest).private:
        return keyed_points(names, digest(PURPOSE, str(manifest.seed).encode()))
    if ledger is None:
        raise Refused("ledger: found none, expected one: nothing private is counted without it")
    return keyed_points(names, ledger.secret(PURPOSE))


def group_places(records: Records, groups: Groups | None) -> Ints | None:
    """(records,) place of each record's value among the groups', after them where it is none.

    BadInput where the column was not read; None where a run compares no groups.
    """
    if groups is None:
        return None
    if groups.column not in records.columns:
        raise BadInput(f"{records.where}: found no column {groups.column!r} of groups")
    places = {value: place for place, value in enumerate(groups.values)}
    values = records.columns[groups.column]
    return np.array([places.get(each, len(places)) for each in values], dtype=np.int64)


def parted(data: ClientData, manifest: RunManifest) -> tuple[ClientData, ClientData]:
    """What the run trains on, and what it holds out: each unit in one of them.

    Refused where an evaluation is asked for and nobody said where units fall.
    """
    terms = manifest.evaluation
    if terms is None:
        return data, replace(data, units=NO_UNITS)
    if data.points is None:
        raise Refused("manifest evaluation: found no hold-out here, expected one to count on")
    held = data.points < terms.hold_out
    train, out = (data.units.take(np.flatnonzero(each)) for each in (~held, held))
    return replace(data, units=train), replace(data, units=out)


def noisy_counts(
    model: AdapterModel, held: ClientData, manifest: RunManifest, source: Random
) -> npt.NDArray[np.float32]:
    """(cells,) of the state that `model` holds, noised where the run has privacy, normalised."""
    cells = Cells.of(manifest)
    total = counted(model, held, cells)
    phase = manifest.accounted[-1]
    if guarantee_of(manifest).private:
        total += gaussian(source, cells.size, phase.noise_multiplier * phase.clip)
    return (total / phase.expected_units).astype(np.float32)


def counted(model: AdapterModel, held: ClientData, cells: Cells) -> Floats:
    """(cells,) float64 without noise: it never leaves."""
    total, units = np.zeros(cells.size, dtype=np.float64), held.units
    if not len(units.records):
        return total
    sizes = np.diff(units.offsets)
    places = _places(model, held, units.records, cells)
    weights = np.repeat(cells.weight / np.maximum(sizes, 1), sizes)
    np.add.at(total, places, weights[:, None])
    return total


@torch.no_grad()
def _places(model: AdapterModel, held: ClientData, rows: Ints, cells: Cells) -> Ints:
    """(len(rows), kinds) cells of the records, in batches of fixed shapes."""
    data, scored, kinds = held.encoded, cells.counts != (LOSS,), len(cells.counts)
    result = np.zeros((len(rows), kinds), dtype=np.int64)
    groups = np.zeros(len(data), dtype=np.int64) if held.groups is None else held.groups
    lengths = padded(data.lengths[rows], model.longest, model.device.type)
    records = partial(_records, model, scored)
    for chosen, shape in shaped(data.lengths[rows], lengths, records):
        batch = data.batch(rows[chosen], model.pad, model.device, (shape.records, shape.tokens))
        found = [each[: len(chosen)] for each in _answers(model, batch, scored)]
        losses = found[0].double().cpu().numpy()
        none = np.zeros(len(chosen), dtype=np.int64)
        guesses = found[1].float().argmax(dim=1).cpu().numpy() if scored else none
        true = data.targets[rows[chosen]] if scored else none
        result[chosen] = cells.places(true, guesses, losses, groups[rows[chosen]])
    return result


def _answers(model: AdapterModel, batch: Batch, scored: bool) -> list[torch.Tensor]:
    """(records,) losses of a batch, and (records, classes) scores where they are counted."""
    with by_record(len(batch.ids), model.device):
        if not scored:
            return [model.losses(batch)]
        scores = model.logits(batch)
        return [model.task.losses(scores, batch), scores]


def _records(model: AdapterModel, scored: bool, tokens: int, full: bool, _: int) -> int:
    """Records of a batch, by their length: more than one where no place or company counts."""
    shape = Shape(FEATURE_TOKENS[model.device.type] // tokens, tokens, full)

    def give(nobodys: Encoded) -> list[torch.Tensor]:
        every = np.arange(shape.records, dtype=np.int64)
        size = (shape.records, shape.tokens)
        return _answers(model, nobodys.batch(every, model.pad, model.device, size), scored)

    kind = ("counted", model.precision, model.attention, scored, shape)
    return model.shapes.records(kind, shape.records, lambda: model.tried(shape, give) is not None)
