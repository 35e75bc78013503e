"""Counts of a hold-out: what one unit moves, the noise on them, and who is held out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora.client.training import hold_out
from fedlora.client.training.hold_out import (
    counted,
    group_places,
    noisy_counts,
    parted,
    unit_points,
)
from fedlora.client.training.local import ClientData
from fedlora.common.config.schema import LoraConfig, ModelConfig
from fedlora.common.data.records import Records, UnitIndex, unit_groups
from fedlora.common.data.unit_names import unit_names
from fedlora.common.errors import BadInput, Refused
from fedlora.common.ledger.ledger import Ledger
from fedlora.common.manifest.counts import EDGES, Cells
from fedlora.common.manifest.manifest import EvaluationTerms, Groups, RunManifest
from fedlora.common.model import network
from fedlora.common.model.network import AdapterModel, build_model
from fedlora.common.model.shapes import Shapes
from fedlora.common.privacy.randomness import OsRandom
from fedlora.common.tasks.batch import Batch
from fedlora.common.tasks.causal_lm import CausalLanguageModel
from fedlora.common.tasks.classification import SequenceClassification
from tests.client.institution import manifest_of
from tests.conftest import WORDS
from tests.oracles import counts_by_ones

KINDS = ("right", "classes", "confusion", "loss")
EVERY = (*KINDS, "groups")
TERMS = EvaluationTerms(0.3, 1, 10.0, 4.0, KINDS)
RUN = manifest_of(evaluation=TERMS)


@pytest.fixture(scope="module")
def model(tiny_bert: Path) -> AdapterModel:
    settings = ModelConfig(base=str(tiny_bert), pooling="mean")
    return build_model(settings, LoraConfig(rank=2), SequenceClassification(("a", "b")), seed=3)


def data_of(model: AdapterModel, owners: list[str]) -> ClientData:
    texts = [" ".join(WORDS[n % 7 : n % 7 + 1 + n % 9]) for n in range(len(owners))]
    labels = np.arange(len(owners), dtype=np.int64) % 2
    records = Records(texts, None, labels, owners, {}, "test")
    units = unit_groups(owners, len(owners))
    return ClientData("here", model.task.encode(records, model.tokenizer, 16), units)


@given(
    st.lists(
        st.tuples(
            st.integers(0, 3),
            st.integers(0, 3),
            st.one_of(st.floats(0, 10), st.sampled_from([np.nan, np.inf, -np.inf])),
            st.integers(0, 2),
        ),
        min_size=1,
        max_size=9,
    ),
    st.lists(st.sampled_from(EVERY), min_size=1, unique=True),
)
def test_a_unit_moves_the_counts_by_a_norm_of_at_most_1(
    records: list[tuple[int, int, float, int]], kinds: list[str]
) -> None:
    cells = Cells(tuple(kinds), 4, 2)
    places = cells.places(*(np.array(each) for each in zip(*records, strict=True)))
    moved = np.zeros(cells.size)
    np.add.at(moved, places, cells.weight / len(records))
    assert np.linalg.norm(moved) <= 1 + 1e-12
    for shares in cells.named(moved).values():
        assert shares.min() >= 0 and shares.sum() == pytest.approx(1)


def test_the_cells_say_what_was_right_and_how_large_the_loss_was() -> None:
    cells = Cells(KINDS, 3)
    true, guesses = np.array([0, 2, 2]), np.array([0, 2, 1])
    places = cells.places(true, guesses, np.array([0.01, np.nan, 0.3]), true)
    total = np.zeros(cells.size)
    np.add.at(total, places, cells.weight)
    named = cells.named(total)
    assert named["right"].tolist() == pytest.approx([1, 2])
    assert named["classes"].tolist() == [[0, 1], [0, 0], [1, 1]]
    assert named["confusion"].tolist() == [[1, 0, 0], [0, 0, 0], [0, 1, 1]]
    assert named["loss"].tolist() == [1, 0, 0, 1, 0, 0, 0, 1] and len(EDGES) == 7


def test_batched_counts_are_those_of_one_record_after_the_other(model: AdapterModel) -> None:
    held = data_of(model, [f"p{n % 11}" for n in range(40)])
    cells = Cells.of(RUN)
    found = counted(model, held, cells)
    assert found == pytest.approx(counts_by_ones(model, held, cells), abs=1e-9)
    assert cells.named(found)["right"].sum() == pytest.approx(11)


def test_the_noise_on_a_count_is_as_predicted(model: AdapterModel) -> None:
    """Of 40,000 draws a deviation is known to 0.35 %; the mean to half a percent of it."""
    held = data_of(model, ["p"] * 3)
    truth = counted(model, held, Cells.of(RUN))
    draws = 40_000 // Cells.of(RUN).size
    noisy = np.array([noisy_counts(model, held, RUN, OsRandom()) for _ in range(3)])
    assert np.abs(noisy * TERMS.expected_units - truth).max() < 6 * TERMS.noise_multiplier
    empty = replace(held, units=held.units.take(np.zeros(0, np.int64)))
    alone = np.array([noisy_counts(model, empty, RUN, OsRandom()) for _ in range(draws)])
    found = alone.ravel() * TERMS.expected_units
    assert found.std() == pytest.approx(TERMS.noise_multiplier, rel=0.015)
    assert abs(found.mean()) < 0.03 * TERMS.noise_multiplier
    exact = noisy_counts(model, held, replace(RUN, mode="none"), OsRandom())
    assert exact * TERMS.expected_units == pytest.approx(truth, rel=1e-6)


def test_a_unit_more_or_less_moves_nobody_elses_side(tmp_path: Path) -> None:
    names = [f"record {n}" for n in range(2_000)]
    ledger = Ledger.open(tmp_path / "l.sqlite", tmp_path / "h.json", tmp_path / "key")
    other = Ledger.open(tmp_path / "m.sqlite", tmp_path / "i.json", tmp_path / "key2")

    def held(texts: list[str], by: Ledger | None = ledger, run: RunManifest = RUN) -> set[str]:
        records = Records(texts, None, None, None, {}, "train")
        points = unit_points(run, unit_names(records), by)
        return {text for text, point in zip(texts, points, strict=True) if point < 0.3}

    whole = held(names)
    assert 500 < len(whole) < 700 and held(names[::-1]) == whole
    for lost in (0, 700, 1_999):
        assert held(names[:lost] + names[lost + 1 :]) == whole - {names[lost]}
    assert held(names, run=replace(RUN, run="2")) == whole != held(names, other)
    with pytest.raises(Refused, match="expected one: nothing private"):
        held(names, None)


def test_each_unit_is_trained_on_or_held_out(model: AdapterModel) -> None:
    data = data_of(model, [f"p{n % 11}" for n in range(40)])
    points = np.linspace(0, 0.99, 11)
    train, held = parted(replace(data, points=points), RUN)
    assert (len(train.units), len(held.units)) == (7, 4)
    rows = np.concatenate([train.units.records, held.units.records])
    assert sorted(rows) == list(range(40))
    whole, none = parted(data, replace(RUN, evaluation=None))
    assert whole is data and not len(none.units)
    with pytest.raises(Refused, match="expected one to count on"):
        parted(data, RUN)


def test_units_are_taken_in_the_order_given() -> None:
    units = unit_groups(["a", "b", "a", "c", "b"], 5)
    found = units.take(np.array([2, 0]))
    assert found.offsets.tolist() == [0, 1, 3] and found.records.tolist() == [3, 0, 2]
    assert isinstance(found, UnitIndex) and not len(units.take(np.zeros(0, np.int64)))


def test_what_is_no_number_is_counted_where_it_can_move_nobody(model: AdapterModel) -> None:
    """A hostile adapter makes scores overflow: a record is in some cell all the same, once."""
    held, before = data_of(model, [f"p{n}" for n in range(9)]), model.state()
    parameters = list(model.parameters.values())
    with torch.no_grad():
        parameters[-1].fill_(float("nan"))
    try:
        named = Cells.of(RUN).named(counted(model, held, Cells.of(RUN)))
    finally:
        model.load(before)
    assert named["right"].sum() == pytest.approx(9) and named["loss"][-1] == pytest.approx(9)


def test_counts_of_classes_need_classes() -> None:
    for run in (replace(RUN, labels=()), replace(RUN, task="multi-label")):
        with pytest.raises(BadInput, match=r'expected \["loss"\] with task'):
            Cells.of(run)
    many = tuple(str(n) for n in range(300))
    with pytest.raises(BadInput, match="found 90610 cells, expected at most 65536"):
        Cells.of(replace(RUN, labels=many))
    assert Cells.of(replace(RUN, labels=(), evaluation=replace(TERMS, counts=("loss",)))).size == 8


def test_a_language_model_s_losses_are_counted(tiny_llama: Path) -> None:
    model = build_model(
        ModelConfig(base=str(tiny_llama), task="causal-lm", max_length=16),
        LoraConfig(rank=2),
        CausalLanguageModel(()),
        seed=3,
    )
    texts = [" ".join(WORDS[n : n + 3 + n % 5]) for n in range(12)]
    records = Records(texts, None, None, None, {}, "test")
    encoded = model.task.encode(records, model.tokenizer, 16)
    held = ClientData("here", encoded, unit_groups(None, len(texts)))
    cells = Cells(("loss",), 0)
    found = counted(model, held, cells)
    with torch.no_grad():
        losses = [
            float(model.losses(encoded.batch(np.array([n]), model.pad, model.device))[0])
            for n in range(len(texts))
        ]
    assert found.tolist() == np.bincount(np.searchsorted(EDGES, losses), minlength=8).tolist()


def test_groups_are_of_their_values_and_all_others(model: AdapterModel) -> None:
    owners = [f"p{n % 11}" for n in range(40)]
    wards = [("north", "south", "nowhere")[n % 11 % 3] for n in range(40)]
    records = Records(["a"] * 40, None, None, owners, {"ward": wards}, "notes")
    places = group_places(records, Groups("ward", ("south", "north")))
    assert places is not None and places.tolist() == [(1, 0, 2)[n % 11 % 3] for n in range(40)]
    assert group_places(records, None) is None
    with pytest.raises(BadInput, match="found no column 'town' of groups"):
        group_places(records, Groups("town", ("x",)))
    terms = replace(TERMS, counts=("groups", "right"))
    run = replace(RUN, evaluation=terms, groups=Groups("ward", ("south", "north")))
    held, cells = replace(data_of(model, owners), groups=places), Cells.of(run)
    found = counted(model, held, cells)
    assert found == pytest.approx(counts_by_ones(model, held, cells), abs=1e-9)
    named = cells.named(found)
    assert named["groups"].sum(axis=1).tolist() == pytest.approx([4, 4, 3])
    assert named["groups"].sum(axis=0) == pytest.approx(named["right"])
    for wrong in (replace(run, groups=None), replace(RUN, groups=run.groups)):
        with pytest.raises(BadInput, match="where they are counted, and there alone"):
            Cells.of(wrong)


def test_where_a_place_in_a_batch_counts_records_go_alone(
    model: AdapterModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, rows = data_of(model, [f"p{n}" for n in range(9)]), list[int]()
    expected, answers = counted(model, held, Cells.of(RUN)), hold_out._answers

    def noted(model: AdapterModel, batch: Batch, scored: bool) -> list[torch.Tensor]:
        rows.append(len(batch.ids))
        return answers(model, batch, scored)

    monkeypatch.setattr(hold_out, "_answers", noted)
    monkeypatch.setattr(network, "alike", lambda same, beside: False)
    monkeypatch.setattr(model, "shapes", Shapes())
    found = counted(model, held, Cells.of(RUN))
    assert found == pytest.approx(expected) and rows.count(1) == 9
