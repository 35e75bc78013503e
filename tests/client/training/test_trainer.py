"""The trainer asks its ledger before it looks at data, and says no in words."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedlora.client.training.local import ClientData, LocalResult, LocalTraining
from fedlora.client.training.moments import MomentStore
from fedlora.client.training.step import ClipGroups, PerSampleGradients
from fedlora.client.training.trainer import Trainer
from fedlora.common.config.schema import LoraConfig, ModelConfig
from fedlora.common.data.records import Records, UnitIndex, unit_groups
from fedlora.common.errors import BadInput, Refused
from fedlora.common.ledger.ledger import Budget, Ledger
from fedlora.common.manifest.manifest import Network, Phase, RunManifest
from fedlora.common.manifest.plan import RoundPlan
from fedlora.common.model.features import FeatureCache, pooled_features
from fedlora.common.model.network import AdapterModel, build_model
from fedlora.common.model.pooling import build_head
from fedlora.common.model.state import AdapterState, Vector
from fedlora.common.privacy.randomness import OsRandom
from fedlora.common.privacy.shared_record_level import SharedRecordLevel
from fedlora.common.protocol.vectors import rounded
from fedlora.common.tasks.classification import SequenceClassification
from tests.oracles import head_clipped_sum_by_ones

NETWORK = Network.of(ModelConfig(pooling="default"), LoraConfig(targets=("query", "value")))
PHASE = Phase("adapter", 3, 4, 2, 0.5, 4.0, 3.0, 1.0, 0.0, "adamw", 0.01, True, 0.0)


@pytest.fixture(scope="module")
def model(tiny_bert: Path) -> AdapterModel:
    settings = ModelConfig(base=str(tiny_bert), pooling="mean")
    return build_model(settings, LoraConfig(rank=2), SequenceClassification(("a", "b")), seed=3)


@pytest.fixture(scope="module")
def training(model: AdapterModel) -> LocalTraining:
    return LocalTraining(PerSampleGradients(model), FeatureCache(model), 200)


@pytest.fixture(scope="module")
def data(model: AdapterModel) -> ClientData:
    texts = [f"w{k} w{k + 1} good" for k in range(8)]
    records = Records(texts, None, np.arange(8, dtype=np.int64) % 2, None, {}, "test")
    return ClientData("here", model.task.encode(records, model.tokenizer, 16), unit_groups(None, 8))


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger.open(
        tmp_path / "ledger.sqlite", tmp_path / "elsewhere" / "head.json", tmp_path / "key"
    )


def manifest(model: AdapterModel, mode: str = "record", **changes: object) -> RunManifest:
    made = RunManifest(
        federation="f", run="1", task=model.task.name, labels=("a", "b"),
        base_digest=model.base_digest, spec_digest=model.spec.digest, projection_digest="",
        max_length=16, mode=mode, unit="", epsilon=50.0, delta=1e-3, strategy="fedavg",
        participation=1.0, minimum_cohort=1, seed=5,
        network=NETWORK, phases=(PHASE,),
    )  # fmt: skip
    return replace(made, **changes)  # type: ignore[arg-type]


def plan(run: RunManifest, state: AdapterState, round_: int = 1, attempt: int = 1) -> RoundPlan:
    return RoundPlan(run.digest, 0, round_, attempt, state.digest)


@pytest.fixture
def trainer(data: ClientData, training: LocalTraining, ledger: Ledger, tmp_path: Path) -> Trainer:
    return Trainer(
        data, training, ledger, Budget("here", 60.0, 1e-2), MomentStore(tmp_path / "moments")
    )


def test_an_update_is_reserved_then_committed(
    trainer: Trainer, ledger: Ledger, model: AdapterModel
) -> None:
    run, state = manifest(model), AdapterState.zeros(model.spec)
    trainer.consent(run)
    update = trainer.train(plan(run, state), state)
    update.check(plan(run, state), model.spec.size)
    kinds = [entry.body["kind"] for entry in ledger.entries()]
    assert kinds == ["open", "consent", "reserve", "commit"]


def test_an_update_is_rounded_after_its_noise_and_committed_as_it_leaves(
    trainer: Trainer, ledger: Ledger, model: AdapterModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    noised: list[Vector] = []
    true_update = LocalTraining.update

    def noted(*given: Any) -> LocalResult:
        result = true_update(*given)
        noised.append(result.delta)
        return result

    monkeypatch.setattr(LocalTraining, "update", noted)
    run, state = manifest(model, wire="bfloat16"), AdapterState.zeros(model.spec)
    trainer.consent(run)
    update = trainer.train(plan(run, state), state)
    (before,) = noised
    assert update.delta.tobytes() == rounded(before, "bfloat16").tobytes() != before.tobytes()
    digest = hashlib.sha256(update.delta.tobytes()).hexdigest()
    assert ledger.entries()[-1].body["update"] == f"sha256:{digest}"


def test_the_head_phase_clips_each_unit_once(
    model: AdapterModel, training: LocalTraining, data: ClientData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rate 1 and noise switched off here alone: the released mean is the batch-of-one oracle's."""
    units = UnitIndex(np.array([0, 3, 6, 8]), np.arange(8))
    grouped = ClientData("grouped", data.encoded, units)
    phase = replace(
        PHASE,
        name="head",
        sampling_rate=1.0,
        clip=0.05,
        optimizer="sgd",
        steps=1,
        learning_rate=1.0,
    )
    monkeypatch.setattr("fedlora.client.training.step.gaussian", lambda source, n, std: np.zeros(n))
    state = model.state()
    result = training.update(grouped, phase, state, {}, OsRandom(), private=True)
    features = pooled_features(model, data.encoded, np.arange(8))

    def losses(logits: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(logits, truth, reduction="none")

    targets, owners = torch.from_numpy(data.encoded.targets), np.repeat(np.arange(3), [3, 3, 2])
    head = build_head(features.shape[1], 0, 2)  # the model's own is hooked
    head.load_state_dict(model.head.state_dict())
    expected = head_clipped_sum_by_ones(head, losses, features, targets, owners, 0.05)
    moved = -result.delta[model.spec.head_mask()] * phase.expected_units
    assert np.linalg.norm(moved - expected) <= 1e-5 * np.linalg.norm(expected)
    assert not result.delta[~model.spec.head_mask()].any()
    assert 0 < np.linalg.norm(expected) <= 3 * 0.05 * (1 + 1e-6)


@pytest.mark.parametrize("name", ["head", "adapter"])
def test_an_empty_draw_is_a_step_of_noise(
    model: AdapterModel, training: LocalTraining, data: ClientData, name: str
) -> None:
    phase = replace(
        PHASE, name=name, sampling_rate=1e-12, steps=1, optimizer="sgd", learning_rate=1.0
    )
    state = model.state()
    delta = training.update(data, phase, state, {}, OsRandom(), private=True).delta
    moved = delta[model.spec.moved_by(name)] * phase.expected_units / phase.clip
    deviation = phase.noise_multiplier
    assert abs(float(moved.std()) / deviation - 1) < 6 / math.sqrt(2 * moved.size)


@pytest.mark.parametrize("name", ["head", "adapter"])
def test_a_step_whose_noise_is_shared_is_the_clipped_sum_in_float64(
    model: AdapterModel, training: LocalTraining, data: ClientData, name: str
) -> None:
    """Rate 1: the sum that own noise would be added to, scaled by the public step alone."""
    units = UnitIndex(np.array([0, 3, 6, 8]), np.arange(8))
    grouped = ClientData("grouped", data.encoded, units)
    shape = {"steps": 1, "optimizer": "sgd", "sampling_rate": 1.0, "clip": 0.05}
    phase = replace(PHASE, name=name, learning_rate=0.3, **shape)  # type: ignore[arg-type]
    state = model.state()
    step = training.clipped_step(grouped, phase, state, OsRandom())
    drawn = np.arange(3)
    if name == "adapter":
        groups = ClipGroups.flat(model.spec, 0.05)
        expected = training.gradients.clipped_sum(data.encoded, units, drawn, groups, 200).vector
    else:
        expected = training._head_sum(
            grouped, drawn, state, ClipGroups.flat(model.spec, 0.05, "head")
        ).vector
    assert step.dtype == np.float64 and expected.any()
    scale = -0.3 / phase.expected_units
    assert np.linalg.norm(step - scale * expected) <= 1e-9 * np.linalg.norm(step)
    for change in ({"steps": 2}, {"optimizer": "adamw"}):
        with pytest.raises(BadInput, match="expected 1 of sgd"):
            training.clipped_step(grouped, replace(phase, **change), state, OsRandom())


def test_more_units_than_rounding_was_bounded_for_are_no_run_of_shared_noise(
    trainer: Trainer, model: AdapterModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer._masked = True
    with pytest.raises(BadInput, match="with secure and skellam terms"):  # none to hold it against
        trainer.consent(manifest(model, mode="shared-record"))
    monkeypatch.setattr(SharedRecordLevel, "most_units", 7)
    with pytest.raises(BadInput, match="found 8 units, expected at most 7"):
        trainer.consent(manifest(model, mode="shared-record"))


def test_data_is_not_touched_before_the_reservation(
    trainer: Trainer, ledger: Ledger, model: AdapterModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, state = manifest(model), AdapterState.zeros(model.spec)
    trainer.consent(run)

    def touched(*_: object) -> None:
        assert [entry.body["kind"] for entry in ledger.entries()][-1] == "reserve"
        raise KeyboardInterrupt

    monkeypatch.setattr(LocalTraining, "update", touched)
    with pytest.raises(KeyboardInterrupt):
        trainer.train(plan(run, state), state)
    monkeypatch.undo()
    with pytest.raises(Refused, match="used before"):  # a crash costs the attempt
        trainer.train(plan(run, state), state)
    trainer.train(plan(run, state, attempt=2), state)


def test_replays_rewinds_and_strangers_are_refused(trainer: Trainer, model: AdapterModel) -> None:
    run, state = manifest(model), AdapterState.zeros(model.spec)
    with pytest.raises(Refused, match="not consented"):
        trainer.train(plan(run, state), state)
    trainer.consent(run)
    trainer.train(plan(run, state), state)
    with pytest.raises(Refused, match="used before"):
        trainer.train(plan(run, state), state)
    other = AdapterState(model.spec, np.ones(model.spec.size, dtype=np.float32))
    with pytest.raises(BadInput, match="adapter"):
        trainer.train(plan(run, state, attempt=2), other)
    with pytest.raises(BadInput, match="round: found 9"):
        trainer.train(plan(run, state, round_=9, attempt=2), state)
    for attempt in (2, 3, 4):
        trainer.train(plan(run, state, attempt=attempt), state)
    with pytest.raises(Refused, match="attempts of phase 0 are spent"):
        trainer.train(plan(run, state, attempt=5), state)


@pytest.mark.parametrize("field", ["base_digest", "spec_digest", "projection_digest"])
def test_a_manifest_for_another_model_is_bad_input(
    trainer: Trainer, model: AdapterModel, field: str
) -> None:
    with pytest.raises(BadInput, match=field):
        trainer.consent(manifest(model, **{field: "sha256:" + "0" * 64}))


def test_a_manifest_says_how_large_its_model_is_or_nothing(
    trainer: Trainer, model: AdapterModel
) -> None:
    """What a node keeps of an adapter that comes in parts is bounded by it."""
    with pytest.raises(BadInput, match=f"vector_size: found 7, expected {model.spec.size} or 0"):
        trainer.consent(manifest(model, vector_size=7))
    trainer.consent(manifest(model, vector_size=model.spec.size))


def test_a_manifest_that_understates_its_epsilon_is_refused(
    trainer: Trainer, model: AdapterModel
) -> None:
    with pytest.raises(Refused, match="its schedule costs"):
        trainer.consent(manifest(model, epsilon=0.01))


def test_a_private_run_without_a_ledger_does_not_train(
    data: ClientData, training: LocalTraining, model: AdapterModel, tmp_path: Path
) -> None:
    alone = Trainer(data, training, None, Budget("here", 60.0, 1e-2), MomentStore(tmp_path))
    with pytest.raises(Refused, match="ledger: found none"):
        alone.consent(manifest(model))
    with pytest.raises(BadInput, match="mode"):
        alone.consent(manifest(model, mode="other"))
    with pytest.raises(Refused, match="under masks only"):
        alone.consent(manifest(model, mode="client"))


def test_noise_differs_between_attempts_clients_and_restarts(
    data: ClientData, training: LocalTraining, model: AdapterModel, tmp_path: Path
) -> None:
    seen = set()
    for client in range(3):
        torch.manual_seed(0)
        np.random.seed(0)
        folder = tmp_path / str(client)
        ledger = Ledger.open(folder / "ledger.sqlite", folder / "head.json", folder / "key")
        one = Trainer(data, training, ledger, Budget("here", 60.0, 1e-2), MomentStore(folder))
        run, state = manifest(model), AdapterState.zeros(model.spec)
        one.consent(run)
        for attempt in (1, 2):
            seen.add(one.train(plan(run, state, attempt=attempt), state).delta.tobytes())
    assert len(seen) == 6


def test_a_run_without_privacy_repeats_itself_whatever_the_attempt(
    data: ClientData, training: LocalTraining, model: AdapterModel, tmp_path: Path
) -> None:
    run, state = manifest(model, mode="none"), AdapterState.zeros(model.spec)
    deltas = []
    for attempt in (1, 2):
        one = Trainer(
            data, training, None, Budget("here", 1.0, 1e-2), MomentStore(tmp_path / str(attempt))
        )
        one.consent(run)
        deltas.append(one.train(plan(run, state, attempt=attempt), state).delta)
    assert np.array_equal(deltas[0], deltas[1])


def test_moments_are_those_before_the_round_also_after_a_kill(tmp_path: Path) -> None:
    store = MomentStore(tmp_path)
    for number in (1, 2, 5):
        store.write("c", 0, number, {"step": np.full(1, number, dtype=np.float32)})
    assert store.read("c", 0, 6)["step"][0] == 5
    # the round was killed and ran again
    store.write("c", 0, 5, {"step": np.full(1, 50, dtype=np.float32)})
    assert store.read("c", 0, 5)["step"][0] == 2  # and again, from where it began
    assert store.read("c", 0, 6)["step"][0] == 50
    assert store.read("c", 1, 6) == {} and store.read("d", 0, 6) == {}


def test_moments_that_were_torn_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut in a write costs at most an optimiser's state, not an attempt a round."""
    store = MomentStore(tmp_path)
    for number in (1, 2):
        store.write("c", 0, number, {"step": np.full(99, number, dtype=np.float32)})
    newest = max(
        tmp_path.iterdir(), key=lambda path: store.read("c", 0, 3)["step"][0] == 2 and path.name
    )
    whole = newest.read_bytes()
    for torn in (b"", whole[:5], whole[:50], whole[:-1]):
        newest.write_bytes(torn)
        assert store.read("c", 0, 3)["step"][0] == 1
    store.write("c", 0, 3, {"step": np.full(99, 3, dtype=np.float32)})
    assert store.read("c", 0, 4)["step"][0] == 3
    synced: list[int] = []
    monkeypatch.setattr("fedlora.common.disk.files.os.fsync", synced.append)
    store.write("c", 0, 4, {"step": np.full(99, 4, dtype=np.float32)})
    assert len(synced) == 2, "the file, and its folder"


def test_the_proximal_term_pulls_towards_the_global_state(
    data: ClientData, training: LocalTraining, model: AdapterModel
) -> None:
    from fedlora.common.privacy.randomness import SeededRandom

    state = AdapterState.zeros(model.spec)
    free = replace(PHASE, optimizer="sgd", learning_rate=0.5, steps=6)
    held = replace(free, proximal_mu=1.0)
    moved = [
        float(np.linalg.norm(training.update(data, phase, state, {}, SeededRandom(1), False).delta))
        for phase in (free, held)
    ]
    assert moved[1] < 0.9 * moved[0]
