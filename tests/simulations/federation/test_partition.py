"""Partitioners: every unit is dealt once and whole, the same way for the same seed."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.common.config.schema import FederationConfig
from fedlora.common.data.records import Columns, Records, read_label_set, read_records, unit_groups
from fedlora.common.errors import BadInput
from fedlora.simulations.federation.partition import (
    DEALERS,
    Partition,
    partition_by,
    partition_units,
)

KINDS = sorted(DEALERS)


def records_of(
    labels: npt.ArrayLike,
    units: list[str] | None = None,
    columns: dict[str, list[str]] | None = None,
) -> Records:
    numbers = np.asarray(labels, dtype=np.int64)
    return Records(["text"] * len(numbers), None, numbers, units, columns or {}, "train.parquet")


def deal(config: FederationConfig, records: Records, seed: int = 0) -> Partition:
    return partition_units(config, records, unit_groups(records.units, len(records)), seed)


def check_dealt(partition: Partition, units: int, clients: int) -> None:
    """Disjoint and complete: all clients' units are each unit once; nobody has none."""
    assert sorted(partition.units.tolist()) == list(range(units))
    assert partition.offsets[0] == 0 and partition.offsets[-1] == units
    assert len(partition.sizes) == clients and partition.sizes.min() >= 1
    joined = [unit for client in range(clients) for unit in partition.units_of(client)]
    assert joined == partition.units.tolist()


def counts(partition: Partition, labels: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """(clients, labels)"""
    of = [labels[partition.units_of(client)] for client in range(len(partition.sizes))]
    return np.array([np.bincount(mine, minlength=labels.max() + 1) for mine in of])


@given(
    kind=st.sampled_from(KINDS),
    owners=st.lists(st.integers(0, 12), min_size=1, max_size=60),
    alpha=st.sampled_from([1e-300, 1e-3, 0.5, 10.0, 1e6]),
    seed=st.integers(0, 2**63 - 1),
    choose=st.data(),
)
def test_every_unit_is_dealt_once(
    kind: str, owners: list[int], alpha: float, seed: int, choose: st.DataObject
) -> None:
    labels = choose.draw(st.lists(st.integers(0, 3), min_size=len(owners), max_size=len(owners)))
    units = choose.draw(st.sampled_from([None, [str(owner) for owner in owners]]))
    records = records_of(labels, units)
    number = len(unit_groups(units, len(records)))
    config = FederationConfig(
        partition=kind, clients=choose.draw(st.integers(1, number)), alpha=alpha
    )
    partition = deal(config, records, seed)
    check_dealt(partition, number, config.clients)
    again = deal(config, records, seed)
    assert np.array_equal(partition.units, again.units)
    assert np.array_equal(partition.offsets, again.offsets)


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_decides(kind: str) -> None:
    records = records_of(np.arange(400) % 4)
    config = FederationConfig(partition=kind, clients=8)
    one, two = (deal(config, records, seed) for seed in (1, 2))
    assert not np.array_equal(one.units, two.units)


@pytest.mark.parametrize("kind", [*KINDS, "by-column"])
@pytest.mark.parametrize(
    ("units", "clients", "found"),
    [(None, 5, "4 records"), (["ann", "bob", "ann", "ann"], 3, "2 units")],
    ids=["data-fewer-than-clients", "data-fewer-than-clients-units"],
)
def test_too_few_units(kind: str, units: list[str] | None, clients: int, found: str) -> None:
    records = records_of([0, 1, 0, 1], units, {"where": ["a", "b", "a", "a"]})
    config = FederationConfig(partition=kind, clients=clients, column="where")
    with pytest.raises(BadInput) as caught:
        deal(config, records)
    assert caught.value.faults == (
        (
            f"train.parquet: found {found}, expected at least one for each of [federation] clients"
            f" = {clients}"
        ),
    )


def test_iid_sizes_differ_by_one_at_most() -> None:
    labels = np.arange(1_003) % 5
    partition = deal(FederationConfig(partition="iid", clients=10), records_of(labels))
    assert set(partition.sizes.tolist()) == {100, 101}
    assert counts(partition, labels).min() > 5  # each label everywhere


@pytest.mark.parametrize(("alpha", "low", "high"), [(0.05, 0.75, 1.0), (1e4, 0.25, 0.35)])
def test_dirichlet_skews_labels_as_alpha_says(alpha: float, low: float, high: float) -> None:
    """The mean share of the most frequent of four labels.

    Near 1 for a small alpha, 1/4 for a large one.
    """
    labels = np.arange(8_000) % 4
    partition = deal(
        FederationConfig(partition="dirichlet", clients=20, alpha=alpha), records_of(labels)
    )
    table = counts(partition, labels)
    assert low < float((table.max(axis=1) / table.sum(axis=1)).mean()) < high


def test_shards_give_a_client_few_labels() -> None:
    labels = np.arange(1_000) % 10
    partition = deal(FederationConfig(partition="shards", clients=10), records_of(labels))
    assert set(partition.sizes.tolist()) == {100}
    assert (counts(partition, labels) > 0).sum(axis=1).max() <= 2


def test_quantity_skews_sizes_and_not_labels() -> None:
    labels = np.sort(np.arange(20_000) % 4)
    partition = deal(
        FederationConfig(partition="quantity", clients=10, alpha=0.5), records_of(labels)
    )
    assert partition.sizes.max() > 5 * partition.sizes.min()
    table = counts(partition, labels)[partition.sizes > 500]
    assert np.allclose(table / table.sum(axis=1, keepdims=True), 0.25, atol=0.06)


@pytest.mark.parametrize("kind", ["dirichlet", "quantity"])
def test_equal_shares_are_cut_without_a_remainder(kind: str) -> None:
    partition = deal(
        FederationConfig(partition=kind, clients=4, alpha=1e6), records_of(np.zeros(400))
    )
    assert partition.sizes.tolist() == [100] * 4


def test_by_column_names_its_clients() -> None:
    where = ["north", "south", "north", "east"]
    records = records_of([0, 1, 0, 1], ["ann", "bob", "ann", "cid"], {"where": where})
    partition = deal(FederationConfig(partition="by-column", column="where", clients=3), records)
    assert partition.names == ("east", "north", "south")
    assert [partition.units_of(client).tolist() for client in range(3)] == [[2], [0], [1]]


def test_by_column_counts_its_clients() -> None:
    records = records_of([0, 1, 0, 1], None, {"where": ["a", "b", "a", "a"]})
    with pytest.raises(BadInput) as caught:
        deal(FederationConfig(partition="by-column", column="where", clients=3), records)
    assert caught.value.faults == (
        "train.parquet column 'where': found 2 values, expected [federation] clients = 3",
    )


def test_by_column_refuses_to_split_a_unit() -> None:
    """The row is that of the file, although the first record went to the validation part."""
    whole = records_of(
        [0, 0, 1, 0, 1], ["x", "ann", "bob", "ann", "bob"], {"where": ["a", "a", "b", "b", "b"]}
    )
    records = whole.take(np.array([1, 2, 3, 4]))
    with pytest.raises(BadInput) as caught:
        deal(FederationConfig(partition="by-column", column="where", clients=2), records)
    assert caught.value.faults == (
        (
            'train.parquet row 4 where: found "b", expected the value of its unit\'s other records:'
            " a unit is never split"
        ),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_ten_thousand_clients_take_no_time(kind: str) -> None:
    """Linear in units and clients, also where most clients come away empty at first."""
    records = records_of(np.arange(320_000) % 4)
    started = time.process_time()
    partition = deal(FederationConfig(partition=kind, clients=10_000, alpha=0.01), records)
    assert time.process_time() - started < 3.0
    assert partition.sizes.min() >= 1 and partition.sizes.sum() == 320_000


def test_real_institutions(shared_data: Path) -> None:
    folder = shared_data / "clinc150"
    labels = read_label_set(folder / "test.parquet", "label")
    records = read_records(
        folder / "train.parquet", Columns("text", label="label", more=("domain",)), labels
    )
    partition = deal(FederationConfig(partition="by-column", column="domain", clients=10), records)
    assert "banking" in partition.names and partition.sizes.tolist() == [1_500] * 10
    check_dealt(partition, 15_000, 10)


@pytest.mark.parametrize(
    ("owners", "said"),
    [
        ([0, 0, 2], "found no unit for client 1, expected one at least"),
        ([0, 1, 3], "found clients 0 to 3, expected 0 to 2"),
        ([0, 1], r"found int64 \(2,\), expected a whole number for each of 3 units"),
        ([0.0, 1.0, 2.0], r"found float64 \(3,\), expected a whole number for each of 3 units"),
    ],
)
def test_a_dealing_of_one_s_own_gives_each_institution_a_unit(
    owners: list[float], said: str
) -> None:
    records = records_of([0, 1, 0])
    units = unit_groups(None, 3)
    with pytest.raises(BadInput, match=f"partition: {said}"):
        partition_by(lambda records, units: np.array(owners), 3, records, units)
    assert partition_by(lambda records, units: np.array([2, 0, 1]), 3, records, units).sizes.all()
