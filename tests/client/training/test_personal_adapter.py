"""LoRA's B of an institution's own: as by hand, above a frozen A, and scored by others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fedlora.client.training import personal_adapter as module
from fedlora.client.training.local import ClientData, LocalResult, LocalTraining
from fedlora.client.training.personal_adapter import RATE, personal_adapter, states_by_pass
from fedlora.client.training.personal_head import FOLDS, Personal
from fedlora.client.training.sampling import micro_batches
from fedlora.client.training.step import ClipGroups
from fedlora.common.data.records import Records, unit_groups
from fedlora.common.model.features import pooled_features
from fedlora.common.model.network import AdapterModel
from fedlora.common.model.state import AdapterState
from tests.client.training.test_trainer import model, training
from tests.oracles import personal_by_hand

__all__ = ["model", "training"]  # fixtures


def released(model: AdapterModel) -> AdapterState:
    """A drawn A, B at 0, as after a federation that trained a head alone."""
    values = np.random.default_rng(1).normal(0, 0.3, model.spec.size).astype(np.float32)
    return AdapterState(model.spec, np.where(model.spec.half_mask("B"), 0, values))


def client(
    model: AdapterModel, count: int, units: list[str] | None = None, chance: bool = False
) -> ClientData:
    """Texts of two words, whose order is the label, or nothing is."""
    texts = [f"w{k % 40} {('good bad', 'bad good')[k // 2 % 2]}" for k in range(count)]
    labels = np.arange(count, dtype=np.int64) // 2 % 2
    if chance:
        labels = np.random.default_rng(3).integers(0, 2, count)
    records = Records(texts, None, labels, None, {}, "test")
    encoded = model.task.encode(records, model.tokenizer, 16)
    return ClientData("here", encoded, unit_groups(units, count))


def fitted(training: LocalTraining, data: ClientData, start: AdapterState) -> Any:
    model = training.gradients.model
    model.load(start)
    features = pooled_features(model, data.encoded, data.units.records)
    return personal_adapter(training, data, features, start)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # Opacus', of a hooked model
def test_two_passes_are_two_steps_of_adam_by_hand(
    model: AdapterModel, training: LocalTraining
) -> None:
    """Of as few units as a step has, which is drawn whole: no draw is left to chance."""
    data, start = client(model, module.SMALLEST_BATCH), released(model)
    expected = personal_by_hand(model, data.encoded, start, RATE, 2)
    *_, state = states_by_pass(training, data, start, 0, 2)
    b, a = model.spec.half_mask("B"), model.spec.half_mask("A")
    assert np.array_equal(state.vector[a], start.vector[a])
    assert np.abs(state.vector[b]).mean() > RATE  # from 0: its own gradient is not
    np.testing.assert_allclose(state.vector, expected, atol=2e-5)


def test_b_learns_and_a_unit_scores_nothing_that_saw_it(
    model: AdapterModel, training: LocalTraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[set[int]] = []
    began: list[AdapterState] = []
    true_update = LocalTraining.update

    def noted(self: LocalTraining, data: ClientData, *given: Any, **named: Any) -> LocalResult:
        seen.append(set(data.units.records.tolist()))
        began.append(given[1])
        return true_update(self, data, *given, **named)

    def nudged(*given: Any) -> Personal:
        moved = given[-1].vector + np.float32(1e-3) * model.spec.head_mask().astype(np.float32)
        return Personal(AdapterState(model.spec, moved), None, {}, {})

    monkeypatch.setattr(LocalTraining, "update", noted)
    monkeypatch.setattr(module, "personal_head", nudged)
    monkeypatch.setattr(module, "MOST_PASSES", 3)
    count = 60
    data = client(model, count, [str(k // 2) for k in range(count)])
    start = released(model)
    found = fitted(training, data, start)
    assert 0 < found.passes <= 3
    assert found.adapter["loss"] < found.head["loss"]
    a = model.spec.half_mask("A")
    assert np.array_equal(found.state.vector[a], start.vector[a])
    assert found.state.vector[model.spec.half_mask("B")].all()
    third = {k for k in range(count) if k // 2 % FOLDS == 0}
    assert seen[-found.passes :] == [set(range(count))] * found.passes
    assert all(not each & third for each in seen[: -found.passes])
    assert began[0] == began[-found.passes] == found.own_head.state != start
    assert fitted(training, data, start).state == found.state  # drawn by a seed


def test_where_it_does_not_help_the_head_stays(
    model: AdapterModel, training: LocalTraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = AdapterState(model.spec, np.zeros(model.spec.size, np.float32))
    monkeypatch.setattr(module, "RATE", 0.3)
    found = fitted(training, client(model, 60, chance=True), start)
    assert found.passes == 0 and found.state == found.own_head.state
    assert found.adapter == found.head and "0 passes" in found.choice
    few = fitted(training, client(model, FOLDS - 1), start)
    assert few.state == start and few.adapter == {} and few.passes == 0


def test_why_b_without_noise_stays_out_of_a_run(
    model: AdapterModel, training: LocalTraining
) -> None:
    """One unit more moves B, and so what all *others* add to A: by more than the clip of one."""
    count, others = 30, np.arange(1, 11)
    data = client(model, count, ["large"] * (count - 10) + [str(k) for k in range(10)])
    data.encoded.targets[: count - 10] ^= 1  # the large unit pulls the other way
    start, clip, gradients = released(model), 1e-6, training.gradients
    groups, sums = ClipGroups.flat(model.spec, clip, "lora.A"), []
    for drawn in (np.arange(11), others):
        model.load(start)
        batches = micro_batches(data.units, drawn, data.encoded.lengths, training.tokens)
        step = gradients.plain_sum(data.encoded, batches).vector * model.spec.half_mask("B")
        model.load(AdapterState(model.spec, (start.vector - step).astype(np.float32)))
        total = gradients.clipped_sum(data.encoded, data.units, others, groups, training.tokens)
        sums.append(total.vector)
    assert np.linalg.norm(sums[0] - sums[1]) > 2 * clip
