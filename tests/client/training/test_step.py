"""The clipped sum is a batch-of-one loop's, whatever the padding, micro-batches and units."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedlora.client.training.head import head_clipped_sum
from fedlora.client.training.sampling import micro_batches
from fedlora.client.training.step import ClipGroups, GradientSum, PerSampleGradients, private_mean
from fedlora.common.config.schema import LoraConfig, ModelConfig
from fedlora.common.data.records import Records, UnitIndex, unit_groups
from fedlora.common.errors import BadInput
from fedlora.common.model.network import AdapterModel, build_model
from fedlora.common.model.pooling import build_head
from fedlora.common.model.state import AdapterState
from fedlora.common.privacy.accountant import group_scales
from fedlora.common.privacy.randomness import OsRandom
from fedlora.common.tasks.batch import Batch, Encoded
from fedlora.common.tasks.causal_lm import CausalLanguageModel
from fedlora.common.tasks.classification import SequenceClassification
from fedlora.common.tasks.task import Task
from tests.oracles import clipped_sum_by_ones, head_clipped_sum_by_ones


@dataclass(frozen=True)
class Case:
    """A hooked model, and the same model without hooks for the oracle."""

    model: AdapterModel
    gradients: PerSampleGradients
    data: Encoded
    reference: AdapterModel
    # of the sum of the units' norms: what single precision can promise about a sum of vectors
    near: float


RECORDS = 24


def texts(count: int, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return [
        " ".join(f"w{k}" for k in rng.integers(0, 60, rng.integers(2, 20))) for _ in range(count)
    ]


def records(labels: bool) -> Records:
    return Records(
        texts=texts(RECORDS, 1),
        responses=None if labels else texts(RECORDS, 2),
        labels=np.arange(RECORDS, dtype=np.int64) % 3 if labels else None,
        units=None,
        columns={},
        where="test",
    )


def awake(model: AdapterModel) -> None:
    """Random values, so that no gradient is zero only because B is."""
    rng = np.random.default_rng(3)
    model.load(AdapterState(model.spec, rng.normal(0, 0.05, model.spec.size).astype(np.float32)))


CASES = {
    "bert-qv-mean": ("tiny_bert", "mean", ("query", "value")),
    "bert-all-layers": ("tiny_bert", "layers", ("query", "key", "value", "dense")),
    "bert-qv-default": ("tiny_bert", "default", ("query", "value")),
    "llama-qv": ("tiny_llama", "default", ("q_proj", "v_proj")),
    "llama-all": (
        "tiny_llama",
        "default",
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    ),
}


DEVICES = ("cpu", *(("cuda",) if torch.cuda.is_available() else ()))


@pytest.fixture(
    scope="module",
    params=[(name, device) for device in DEVICES for name in CASES],
    ids=lambda param: "-".join(param),
)
def case(request: pytest.FixtureRequest) -> Case:
    """Where there is a GPU, also there; the loop that it is held against stays on the CPU."""
    name, device = request.param
    fixture, pooling, targets = CASES[name]
    folder: Path = request.getfixturevalue(fixture)
    causal = fixture == "tiny_llama"
    task: Task = CausalLanguageModel() if causal else SequenceClassification(("a", "b", "c"))
    settings_ = ModelConfig(base=str(folder), task=task.name, pooling=pooling, max_length=40)
    model, reference = (
        build_model(settings_, LoraConfig(rank=3, targets=targets), task, 5, torch.device(where))
        for where in (device, "cpu")
    )
    awake(model)
    awake(reference)
    return Case(
        model,
        PerSampleGradients(model),
        task.encode(records(not causal), model.tokenizer, 40),
        reference,
        1e-6 if device == "cpu" else 4e-6,
    )


def units_of(sizes: list[int]) -> UnitIndex:
    """Units of the given sizes over the first records, in a scrambled order."""
    names = np.repeat(np.arange(len(sizes)), sizes)
    order = np.random.default_rng(len(sizes)).permutation(len(names))
    return unit_groups([str(name) for name in names[order]])


@pytest.mark.parametrize("sizes", [[], [1], [1] * 9, [3], [7, 1, 1, 5, 2], [9, 9]], ids=str)
@pytest.mark.parametrize("tokens", [1, 64, 4096])
@pytest.mark.parametrize("packed", [False, True], ids=["fixed", "packed"])
def test_the_clipped_sum_is_that_of_a_batch_of_one_loop(
    case: Case, sizes: list[int], tokens: int, packed: bool
) -> None:
    model, gradients, data = case.model, case.gradients, case.data
    units = units_of(sizes)
    groups = ClipGroups.flat(model.spec, 0.7)
    drawn = np.arange(len(sizes), dtype=np.int64)
    found = gradients.clipped_sum(data, units, drawn, groups, tokens, packed)
    expected = clipped_sum_by_ones(case.reference, data, units, drawn, groups)
    assert found.units == len(sizes)
    assert np.linalg.norm(found.vector - expected) <= case.near * max(0.7 * len(sizes), 1e-30)


def test_packed_batches_are_those_of_a_step_without_privacy(case: Case) -> None:
    units, drawn, lengths = units_of([3, 1, 1]), np.arange(3, dtype=np.int64), case.data.lengths
    packed = [*case.gradients.batches(case.data, units, drawn, 4096, True)]
    plain = [*micro_batches(units, drawn, lengths, 4096)]
    assert [batch.rows.tolist() for batch in packed] == [batch.rows.tolist() for batch in plain]
    assert len(packed) == 1 and packed[0].shape is None


def test_two_groups_are_clipped_apart(case: Case) -> None:
    model, gradients, data = case.model, case.gradients, case.data
    if not model.spec.head_mask().any():
        pytest.skip("a language model has no task head: one group is all there is")
    units, drawn = units_of([1, 4, 2]), np.arange(3, dtype=np.int64)
    groups = ClipGroups.split(model.spec, 0.05, 0.4)
    found = gradients.clipped_sum(data, units, drawn, groups, 50)
    expected = clipped_sum_by_ones(case.reference, data, units, drawn, groups)
    assert np.linalg.norm(found.vector - expected) <= case.near * 3 * 0.45


def test_a_phase_clips_what_it_moves_and_nothing_else(case: Case) -> None:
    """The norm of what stands still would eat the clip, and its noise would be for nothing."""
    model, gradients, data = case.model, case.gradients, case.data
    units, drawn = units_of([1, 4, 2]), np.arange(3, dtype=np.int64)
    groups = ClipGroups.flat(model.spec, 0.05, "lora")
    found = gradients.clipped_sum(data, units, drawn, groups, 50)
    moved = model.spec.moved_by("lora")
    expected = np.zeros(model.spec.size)
    for unit in drawn:
        whole = ClipGroups.flat(model.spec, 1e9)
        alone = clipped_sum_by_ones(case.reference, data, units, np.array([unit]), whole)[moved]
        expected[moved] += alone * min(1.0, 0.05 / float(np.linalg.norm(alone)))
    assert not found.vector[~moved].any()
    assert np.linalg.norm(found.vector - expected) <= case.near * 3 * 0.05
    np.testing.assert_allclose(groups.noise_std(2.0), np.where(moved, 0.1, 0.0))


def test_without_a_clip_it_is_the_plain_gradient(case: Case) -> None:
    model, gradients, data = case.model, case.gradients, case.data
    units, drawn = units_of([1, 4, 2]), np.arange(3, dtype=np.int64)
    found = gradients.plain_sum(data, micro_batches(units, drawn, data.lengths, 50))
    expected = clipped_sum_by_ones(
        case.reference, data, units, drawn, ClipGroups.flat(model.spec, 1e9)
    )
    assert np.linalg.norm(found.vector - expected) <= case.near * max(
        float(np.linalg.norm(expected)), 1e-30
    )


def test_a_record_that_is_not_finite_is_zeroed_and_counted(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, gradients, data = case.model, case.gradients, case.data
    units, drawn = units_of([2, 1, 3]), np.arange(3, dtype=np.int64)
    losses = model.losses
    poisoned = int(units.records[units.offsets[2]])

    def with_nan(batch: Batch) -> torch.Tensor:
        rows = losses(batch)
        return rows * torch.where(
            torch.from_numpy(current == poisoned).to(rows.device), torch.nan, 1.0
        )

    original = gradients._backward
    current = np.zeros(0, dtype=np.int64)

    def remember(encoded: Encoded, batch: object) -> None:
        nonlocal current
        current = batch.rows  # type: ignore[attr-defined]
        original(encoded, batch)  # type: ignore[arg-type]

    monkeypatch.setattr(model, "losses", with_nan)
    monkeypatch.setattr(gradients, "_backward", remember)
    groups = ClipGroups.flat(model.spec, 0.7)
    found = gradients.clipped_sum(data, units, drawn, groups, 40)
    monkeypatch.undo()
    expected = clipped_sum_by_ones(case.reference, data, units, drawn[:2], groups)
    assert found.nonfinite == 1 and found.units == 3
    assert np.linalg.norm(found.vector - expected) <= case.near * 1.4


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    sizes=st.lists(st.integers(1, 6), max_size=6),
    hidden=st.sampled_from([0, 5]),
    bound=st.sampled_from([0.01, 1.0, 1e6]),
    rows=st.sampled_from([1, 3, 100]),
)
def test_the_head_without_hooks_is_the_batch_of_one_loop(
    sizes: list[int], hidden: int, bound: float, rows: int
) -> None:
    torch.manual_seed(len(sizes))
    head = build_head(7, hidden, 3)
    owners = np.repeat(np.arange(len(sizes)), sizes)
    features, targets = torch.randn(len(owners), 7), torch.arange(len(owners)) % 3

    def losses(logits: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(logits, truth, reduction="none")

    found = head_clipped_sum(head, losses, features, targets, owners, bound, rows)
    expected = head_clipped_sum_by_ones(head, losses, features, targets, owners, bound)
    scale = max(sum(min(bound, 50.0) for _ in sizes), 1e-30)
    assert np.linalg.norm(found.vector - expected) <= 2e-6 * scale
    assert found.units == len(sizes)


@pytest.mark.parametrize("sizes", [[1, 1, 1], [2, 1, 3]], ids=str)
def test_in_a_head_too_a_unit_that_is_not_finite_adds_zero(sizes: list[int]) -> None:
    owners = np.repeat(np.arange(3), sizes)
    features, targets = torch.randn(len(owners), 7), torch.arange(len(owners)) % 3
    head, kept = build_head(7, 0, 3), owners != 2
    features[-1, 0] = torch.inf

    def losses(logits: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(logits, truth, reduction="none")

    found = head_clipped_sum(head, losses, features, targets, owners, 0.1)
    alone = head_clipped_sum(head, losses, features[kept], targets[kept], owners[kept], 0.1)
    assert (found.units, found.nonfinite) == (3, 1)
    np.testing.assert_allclose(found.vector, alone.vector, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("scale", "bound"), [(10.0, 0.01), (10.0, 0.1), (100.0, 0.1)])
def test_a_unit_whose_records_pull_against_each_other_is_clipped(
    scale: float, bound: float
) -> None:
    """2,000 texts that hardly differ, half of them of each label.

    A norm from inner products comes out as 0.
    """
    torch.manual_seed(0)
    head = torch.nn.Sequential(torch.nn.Linear(384, 2))
    for parameter in head.parameters():
        torch.nn.init.zeros_(parameter)
    targets, owners = torch.arange(2_000) // 1_000, np.zeros(2_000, dtype=np.int64)

    def losses(logits: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(logits, truth, reduction="none")

    largest = 0.0
    for spread in (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2):
        common = torch.nn.functional.normalize(torch.randn(1, 384), dim=1)
        near = (
            torch.nn.functional.normalize(common + spread * torch.randn(2_000, 384), dim=1) * scale
        )
        found = head_clipped_sum(head, losses, near, targets, owners, bound)
        largest = max(largest, float(np.linalg.norm(found.vector.astype(np.float64))))
    assert 0.5 * bound < largest <= bound * (1 + 1e-5)


def test_noise_has_the_claimed_scale_in_each_group_and_not_another(case: Case) -> None:
    model = case.model
    if not model.spec.head_mask().any():
        pytest.skip("a language model has no task head: one group is all there is")
    groups = ClipGroups.split(model.spec, 0.2, 3.0)
    zero = np.zeros(model.spec.size)
    draws = np.stack(
        [private_mean(GradientSum(zero, 0, 0), groups, 1.3, 10.0, OsRandom()) for _ in range(300)]
    )
    assert draws.dtype == np.float64 and (draws.astype(np.float32) != draws).mean() > 0.9
    for inside, scale in zip(
        (~model.spec.head_mask(), model.spec.head_mask()),
        group_scales(1.3, (0.2, 3.0)),
        strict=True,
    ):
        ratio = draws[:, inside].std() * 10.0 / scale
        assert 0.97 < ratio < 1.03


@pytest.mark.parametrize("noise", [0.0, -1.0])
def test_a_private_mean_without_noise_is_refused(case: Case, noise: float) -> None:
    model = case.model
    total = GradientSum(np.zeros(model.spec.size), 0, 0)
    with pytest.raises(BadInput, match="noise_multiplier"):
        private_mean(total, ClipGroups.flat(model.spec, 1.0), noise, 1.0, OsRandom())
