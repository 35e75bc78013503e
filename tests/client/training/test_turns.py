"""RoLoRA at a node: what a round trains, clips and noises is the half that leaves, and no more."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedlora.client.training.local import ClientData, LocalTraining
from fedlora.client.training.moments import MomentStore
from fedlora.client.training.step import ClipGroups
from fedlora.client.training.trainer import Trainer
from fedlora.common.ledger.ledger import Budget, Ledger
from fedlora.common.manifest.manifest import RunManifest
from fedlora.common.manifest.turns import taken
from fedlora.common.model.network import AdapterModel
from fedlora.common.model.state import AdapterState
from fedlora.common.privacy.modes import guarantee_of
from fedlora.common.privacy.randomness import OsRandom
from tests.client.training.test_trainer import PHASE, data, ledger, manifest, model, plan, training

__all__ = ["data", "ledger", "model", "training"]  # fixtures


def by_turns(model: AdapterModel, **changes: object) -> RunManifest:
    run = manifest(model, **changes)  # type: ignore[arg-type]
    return replace(run, network=replace(run.network, variant="rolora"))


def trainer_of(
    run: RunManifest, data: ClientData, training: LocalTraining, ledger: Ledger, folder: Path
) -> Trainer:
    made = Trainer(data, training, ledger, Budget("here", 60.0, 1e-2), MomentStore(folder))
    made.consent(run)
    return made


@pytest.mark.parametrize("head_clip", [0.0, 0.5])
def test_a_round_noises_all_of_its_half_and_nothing_else(
    model: AdapterModel,
    training: LocalTraining,
    data: ClientData,
    ledger: Ledger,
    tmp_path: Path,
    head_clip: float,
) -> None:
    """AdamW's moments are carried: those of the other half must not move it."""
    phase = replace(PHASE, rounds=4, attempts=6, head_clip=head_clip)
    run, state = by_turns(model, phases=(phase,)), model.state()
    trainer = trainer_of(run, data, training, ledger, tmp_path)
    for attempt, number in enumerate((1, 1, 2, 3, 4, 4), start=1):  # rounds 1 and 4 twice
        update = trainer.train(plan(run, state, number, attempt), state)
        moved = model.spec.moved_by(f"adapter.{'BA'[(number - 1) % 2]}")
        assert update.delta[moved].all() and not update.delta[~moved].any()
        assert len(taken(update.delta, run.leaving(model.spec, number))) == moved.sum()
        state = AdapterState(model.spec, (state.vector + update.delta).astype(np.float32))
    kinds = [entry.body["kind"] for entry in ledger.entries()]
    assert kinds == ["open", "consent", *["reserve", "commit"] * 6]


def test_it_costs_what_it_costs_with_both_halves(model: AdapterModel) -> None:
    whole, halves = guarantee_of(manifest(model)), guarantee_of(by_turns(model))
    assert halves.charge() == whole.charge()
    (said,) = set(halves.statement(1.0)) - set(whole.statement(1.0))
    assert "only the half that moves is clipped, noised and sent" in said


@pytest.mark.parametrize("moves", ["adapter.B", "adapter.A", "lora.B", "lora.A"])
def test_the_half_alone_is_clipped(
    model: AdapterModel,
    training: LocalTraining,
    data: ClientData,
    moves: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rate 1 and noise switched off here alone: one unit, as long as the clip in its half."""
    monkeypatch.setattr("fedlora.client.training.step.gaussian", lambda source, n, std: np.zeros(n))
    one = replace(data, units=replace(data.units, offsets=np.array([0, 8])))
    phase = replace(
        *(PHASE,), name=moves, sampling_rate=1.0, clip=1e-4, optimizer="sgd", steps=1,
        learning_rate=1.0, expected_units=1.0,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    drawn = rng.normal(size=model.spec.size, scale=0.1)
    state = AdapterState(model.spec, drawn.astype(np.float32))
    delta = training.update(one, phase, state, {}, OsRandom(), private=True).delta
    length = np.linalg.norm((delta - 0.0).astype(np.float64))
    assert length == pytest.approx(1e-4, rel=1e-3)
    assert not delta[~model.spec.moved_by(moves)].any()


def test_split_clips_leave_the_other_half_alone(model: AdapterModel) -> None:
    groups = ClipGroups.split(model.spec, 0.3, 0.1, "adapter.A")
    head, moved = model.spec.head_mask(), model.spec.moved_by("adapter.A")
    assert np.array_equal(groups.group >= 0, moved) and (groups.group[head] == 1).all()
    assert np.array_equal(groups.noise_std(1.0) > 0, moved)
