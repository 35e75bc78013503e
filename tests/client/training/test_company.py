"""A record stands only beside others that do not move it, by a try on records of nobody's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fedlora.client.training.company import RECORDS, Company, sizes_of
from fedlora.client.training.sampling import Ints, MicroBatch
from fedlora.client.training.step import ClipGroups, PerSampleGradients
from fedlora.common.config.schema import LoraConfig, ModelConfig
from fedlora.common.data.records import unit_groups
from fedlora.common.model.network import AdapterModel, build_model
from fedlora.common.model.shapes import Shape, Shapes, padded, tries
from fedlora.common.model.state import AdapterState
from fedlora.common.tasks.batch import Encoded
from fedlora.common.tasks.classification import SequenceClassification

LONGEST, TOKENS, COUNT = 40, 4096, 64
# of a record: what it gives in a row of a batch of some shape
Given = Callable[[int, int, MicroBatch], float]


@pytest.fixture(scope="module")
def model(tiny_bert: Path) -> AdapterModel:
    settings = ModelConfig(str(tiny_bert), max_length=LONGEST, pooling="mean")
    return build_model(settings, LoraConfig(rank=2), SequenceClassification(("a", "b")), 5)


@pytest.fixture
def fresh(model: AdapterModel) -> AdapterModel:
    """The same, of which nothing was tried yet."""
    model.shapes = Shapes()
    return model


def company_of(model: AdapterModel, given: Given) -> Company:
    def rows(data: Encoded, batch: MicroBatch) -> list[torch.Tensor]:
        lengths = data.lengths[batch.rows].tolist()
        return [torch.tensor([given(row, length, batch) for row, length in enumerate(lengths)])]

    return Company(model, rows)


def lengths(seed: int) -> Ints:
    return np.random.default_rng(seed).integers(2, LONGEST + 1, COUNT)


def settled(company: Company, tokens: int = TOKENS) -> list[tuple[Ints, Shape]]:
    """The batches of a draw after enough others, each record in exactly one."""
    for seed in range(40):
        found = [*company.batches(lengths(seed), tokens)]
        assert sorted(np.concatenate([places for places, _ in found])) == list(range(COUNT))
    return found


def own_width(length: int, full: bool) -> int:
    width = int(padded(np.array([length]), LONGEST, "cpu")[0])
    assert full == (width == length)
    return width


def test_records_go_together_where_nothing_moves_them(fresh: AdapterModel) -> None:
    found = settled(company_of(fresh, lambda row, length, batch: float(length)))
    assert max(shape.records for _, shape in found) == 16
    widths = [len({own_width(w, s.full) for w in lengths(39)[p].tolist()}) for p, s in found]
    assert set(widths) == {1}, "of one width: what padding adds, no try says"
    rows, before = (sum(s.records for _, s in each) for each in (found, alone(fresh)))
    assert COUNT <= rows < before, "hardly a row of nobody's"
    for places, shape in found:
        own = lengths(39)[places]
        assert len(places) <= shape.records and shape.records * shape.tokens <= TOKENS
        assert (own == shape.tokens).all() if shape.full else (own < shape.tokens).all()


def alone(model: AdapterModel) -> list[tuple[Ints, Shape]]:
    """As a first draw goes, before anything larger was tried."""
    model.shapes = Shapes()
    return [*company_of(model, lambda row, length, batch: float(length)).batches(lengths(39), 256)]


@pytest.mark.parametrize(
    ("given", "harmless"),
    [
        (lambda row, length, batch: float(batch.shape[0]), {4}),
        (lambda row, length, batch: float(batch.shape[0] == 1), {*range(2, 17)}),
        (lambda row, length, batch: float(row == 7), {*range(1, 8)}),
        (lambda row, length, batch: float("inf" if batch.shape[0] > 4 else 0), {1, 2, 3, 4}),
        (lambda row, length, batch: float("nan" if batch.shape[0] == 2 else 0), {1, *range(3, 17)}),
        (
            lambda row, length, batch: float(np.spacing(1.0) * (row == batch.shape[0] - 1 > 3)),
            {1, 2, 3, 4},
        ),
    ],
    ids=["how many", "alone", "a place", "many not finite", "two not", "the last row, by a bit"],
)
def test_batches_that_move_a_record_are_not_made(
    fresh: AdapterModel, given: Given, harmless: set[int]
) -> None:
    sizes = {shape.records for _, shape in settled(company_of(fresh, given))}
    assert sizes <= harmless
    assert sizes != {RECORDS["cpu"]} or harmless == sizes


def test_where_products_round_differences_away_no_shape_but_its_own_is_trusted(
    fresh: AdapterModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPT-Neo's gradients differed by how many records there were, unseen by 64 tries."""
    monkeypatch.setattr(fresh, "precision", torch.bfloat16)
    found = settled(company_of(fresh, lambda row, length, batch: float(length)))
    assert {shape.records for _, shape in found} == {RECORDS["cpu"]}


def test_a_lower_precision_is_tried_more_often(
    fresh: AdapterModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A difference by place that one record in ten shows is seen; and by large values alone."""
    for tokens, times in ((8, 64), (40, 13), (512, 1), (2048, 1)):
        assert tries(Shape(4, tokens, False), torch.bfloat16, 1000) == times
        assert tries(Shape(4, tokens, False), torch.float32, 1000) == 1
    assert tries(Shape(512, 8, False), torch.bfloat16, 1000) == 4
    assert tries(Shape(4, 8, False), torch.bfloat16, 168_000_000) == 1
    monkeypatch.setattr(fresh, "precision", torch.bfloat16)
    made = []

    def seldom(row: int, length: int, batch: MicroBatch) -> float:
        made.append(float(fresh.state().vector.std()))
        return float(row == 3 and len(made) > 40)

    assert company_of(fresh, seldom).records(Shape(4, 40, False)) == 1
    assert {each > 0.2 for each in made} == {True, False}


def test_what_held_of_smaller_micro_batches_says_nothing_of_larger_ones(
    fresh: AdapterModel,
) -> None:
    """A record's own shape may have more records there: four of 32 tokens of 159, three of 120."""

    def few(row: int, length: int, batch: MicroBatch) -> float:
        assert batch.shape is not None
        return float(batch.shape[0] == 3)

    company = company_of(fresh, few)
    settled(company, 120)
    for places, shape in settled(company, 159):
        for length in lengths(39)[places].tolist():
            own, *_ = sizes_of("cpu", 159, own_width(length, shape.full), fresh.spec.size)
            assert (own == 3) == (shape.records == 3)


def test_what_is_seldom_wanted_is_not_tried(fresh: AdapterModel) -> None:
    tried: list[int] = []

    def noted(row: int, length: int, batch: MicroBatch) -> float:
        tried.append(len(batch.rows))
        return float(length)

    company = company_of(fresh, noted)
    assert {s.records for _, s in company.batches(lengths(0)[:6], TOKENS)} == {4}
    assert set(tried) == {4}


def test_no_size_holds_more_than_a_micro_batch_or_gradients_have_room_for() -> None:
    assert sizes_of("cpu", 4096, 64, 1000) == [4, 8, 16]
    assert sizes_of("cpu", 640, 64, 1000) == [4, 8]
    assert sizes_of("cpu", 128, 64, 1000) == [2]
    assert sizes_of("cpu", 64, 100, 1000) == [1]
    assert sizes_of("cpu", 4096, 64, 168_000_000) == [4]
    assert sizes_of("cuda", 1 << 16, 64, 1000) == [512]


def test_a_gradient_has_the_bits_of_its_own_shape_in_every_batch(model: AdapterModel) -> None:
    """Of whatever batches this machine's products allow."""
    model.shapes = Shapes()
    gradients = PerSampleGradients(model)
    rng = np.random.default_rng(1)
    data = model.inputs.nobodys(model.task, lengths(39), rng)
    settled(gradients.company)
    units, every = unit_groups(None, COUNT), np.arange(COUNT, dtype=np.int64)
    values = rng.normal(0, 0.3, model.spec.size).astype(np.float32)
    model.load(AdapterState(model.spec, values))
    for batch in gradients.batches(data, units, every, TOKENS):
        together = gradients._samples(data, batch)
        for place, row in enumerate(batch.rows):
            own = data.lengths[row] == (width := padded(data.lengths, LONGEST, "cpu")[row])
            shape = Shape(gradients.company.records(Shape(4, int(width), bool(own))), width, own)
            filled = (shape.records, shape.tokens)
            solitary = MicroBatch(np.array([row]), np.zeros(1, dtype=np.int64), False, filled)
            for one, other in zip(gradients._samples(data, solitary), together, strict=True):
                assert torch.equal(one[0], other[place])
    groups = ClipGroups.flat(model.spec, 1e4)
    total = gradients.clipped_sum(data, units, every, groups, TOKENS).vector
    without = gradients.clipped_sum(data, units, every[1:], groups, TOKENS).vector
    only = gradients.clipped_sum(data, units, every[:1], groups, TOKENS).vector
    assert np.linalg.norm(total - without - only) <= 1e-12 * np.linalg.norm(total)
