"""LoRA's B and a head of an institution's own, above the A that a federation released.

FedSA-LoRA (Guo et al. 2025) shares A and keeps B at home; here that happens after the federation:
A stands still as it was released, and nothing of B or the head leaves, so nothing is clipped,
noised or charged (`personal_head`). Both begin where they are best known: B as it was released, the
head as `personal_head` fits it. B may be 0, where A passes no gradient on, but B itself has one.

How many passes over the records are worth it, a third of the units decides that no pass saw; then
all of them are trained on for as many. Where none helps, a head of its own is all that there is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from fedlora.client.training.local import ClientData, LocalTraining
from fedlora.client.training.personal_head import (
    FOLDS,
    Personal,
    check_head,
    fold_of,
    personal_head,
)
from fedlora.common.manifest.manifest import Phase
from fedlora.common.model.features import length_batches
from fedlora.common.model.network import AdapterModel
from fedlora.common.model.state import AdapterState, Vector
from fedlora.common.privacy.randomness import SeededRandom
from fedlora.common.tasks.batch import add_totals

MOVES = "adapter.B"  # a round's name for the head and B: A stands still
MOST_PASSES = 8
# AdamW's, which B has without privacy in a federation too (`server.defaults`); units of a step, at
# most, and steps of a pass that few units are drawn in smaller batches for
RATE, BATCH, STEPS, SMALLEST_BATCH = 2e-3, 32, 24, 4
SCORED_TOKENS = 8192  # of a pass without gradients


@dataclass(frozen=True, eq=False)
class PersonalAdapter:
    """A state with the institution's own B and head, and what each part is worth on its records.

    `released`, `head` and `adapter` are the task's metrics on the third of the units that neither
    the head nor B was fitted to; empty where there are fewer units than folds. They decide how many
    passes there are, so that `adapter`, the best of them, is a little better than new records say.
    """

    state: AdapterState
    own_head: Personal  # what the adapter began with
    passes: int  # 0: its own head alone is better
    released: dict[str, float]
    head: dict[str, float]
    adapter: dict[str, float]

    @property
    def figures(self) -> dict[str, object]:
        """What a person reads of it."""
        return {
            "pull": self.own_head.pull,
            "passes": self.passes,
            "released": self.released,
            "head": self.head,
            "adapter": self.adapter,
        }

    @property
    def compared(self) -> dict[str, dict[str, float]]:
        """The metrics of each, under its title."""
        return {
            "released adapter": self.released,
            "own head": self.head,
            "own head and adapter": self.adapter,
        }

    @property
    def choice(self) -> str:
        """What was chosen, and how."""
        return f"{self.passes} passes from: {self.own_head.choice}"


def personal_adapter(
    training: LocalTraining,
    data: ClientData,
    features: torch.Tensor,
    released: AdapterState,
    seed: int = 0,
) -> PersonalAdapter:
    """Train B and the head of `released` on `data`, whose `features` are `personal_head`'s.

    `seed` and the owner's name decide which units a step draws. With fewer units than `FOLDS` the
    released state stays. BadInput for a head that doesn't answer records.
    """
    model = training.gradients.model
    check_head(model)
    own_head = personal_head(model, data, features, released)
    if len(data.units) < FOLDS:
        return PersonalAdapter(released, own_head, 0, {}, {}, {})
    held = np.arange(len(data.units)) % FOLDS == 0
    fit, out = (replace(data, units=data.units.take(np.flatnonzero(m))) for m in (~held, held))
    seen = features[~fold_of(data, 0).to(features.device)]
    begin = personal_head(model, fit, seen, released).state
    scores = [_metrics(model, out, begin)]
    for state in states_by_pass(training, fit, begin, seed, MOST_PASSES):
        scores.append(_metrics(model, out, state))
        if scores[-1]["loss"] >= scores[-2]["loss"]:
            break
    best = min(range(len(scores)), key=lambda passes: scores[passes]["loss"])
    before = _metrics(model, out, released)
    *_, state = own_head.state, *states_by_pass(training, data, own_head.state, seed, best)
    return PersonalAdapter(state, own_head, best, before, scores[0], scores[best])


def states_by_pass(
    training: LocalTraining, data: ClientData, begin: AdapterState, seed: int, most: int
) -> Iterator[AdapterState]:
    """The state after each of `most` passes from `begin`, in which head and B move."""
    units, state = len(data.units), begin
    batch = min(units, BATCH, max(SMALLEST_BATCH, units // STEPS))
    phase = Phase(
        name=MOVES,
        rounds=most,
        attempts=most,
        steps=math.ceil(units / batch),
        sampling_rate=batch / units,
        expected_units=batch,
        noise_multiplier=0.0,
        clip=1.0,  # of a step that clips, which these don't
        head_clip=0.0,
        optimizer="adamw",
        learning_rate=RATE,
        carry_optimizer=True,
        proximal_mu=0.0,
    )
    source, moments = SeededRandom(seed, "personal", data.owner), dict[str, Vector]()
    for _ in range(most):
        result = training.update(data, phase, state, moments, source, private=False)
        state = AdapterState(state.spec, state.vector + result.delta)
        moments = dict(result.moments)
        yield state


@torch.no_grad()
def _metrics(model: AdapterModel, data: ClientData, state: AdapterState) -> dict[str, float]:
    """The task's, over all records of `data`."""
    model.load(state)
    rows, encoded = data.units.records, data.encoded
    parts = [
        model.measure(encoded.batch(rows[chosen], model.pad, model.device))
        for chosen in length_batches(encoded.lengths[rows], SCORED_TOKENS)
    ]
    return model.task.metrics(add_totals(parts))
