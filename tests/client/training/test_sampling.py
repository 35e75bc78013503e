"""A draw is Poisson over units; micro-batches lose, repeat or split nothing silently."""

from __future__ import annotations

from itertools import zip_longest

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.client.training.sampling import Fixed, micro_batches, private_batches, unit_records
from fedlora.common.data.records import unit_groups
from fedlora.common.errors import BadInput
from fedlora.common.model.shapes import padded, shaped
from fedlora.common.privacy.randomness import OsRandom, draw_units


@given(sizes=st.lists(st.integers(1, 5), max_size=12), tokens=st.integers(1, 200), data=st.data())
def test_every_record_of_every_drawn_unit_is_there_once(
    sizes: list[int], tokens: int, data: st.DataObject
) -> None:
    units = unit_groups([str(unit) for unit, size in enumerate(sizes) for _ in range(size)])
    lengths = np.array(
        data.draw(st.lists(st.integers(1, 60), min_size=sum(sizes), max_size=sum(sizes))),
        dtype=np.int64,
    )
    drawn = np.flatnonzero(
        np.array(
            data.draw(st.lists(st.booleans(), min_size=len(sizes), max_size=len(sizes))), dtype=bool
        )
    )
    batches = list(micro_batches(units, drawn.astype(np.int64), lengths, tokens))
    rows = [row for batch in batches for row in batch.rows]
    expected = [
        row
        for unit in drawn
        for row in units.records[units.offsets[unit] : units.offsets[unit + 1]]
    ]
    assert sorted(rows) == sorted(expected)
    for batch, following in zip_longest(batches, batches[1:]):
        padded = int(lengths[batch.rows].max()) * len(batch.rows)
        assert padded <= tokens or len(batch.rows) == 1
        assert (np.diff(batch.owners) >= 0).all()
        goes_on = following is not None and following.owners[0] == batch.owners[-1]
        assert batch.unfinished == goes_on
    owners = [owner for batch in batches for owner in batch.owners]
    unit_of = {
        row: unit
        for unit in drawn
        for row in units.records[units.offsets[unit] : units.offsets[unit + 1]]
    }
    assert len({(owner, unit_of[row]) for owner, row in zip(owners, rows, strict=True)}) == len(
        drawn
    )


def fixed_of(records: int) -> Fixed:
    """So many of one width."""
    return lambda lengths: shaped(
        lengths, padded(lengths, 50, "cpu"), lambda tokens, full, left: records
    )


@given(sizes=st.lists(st.integers(1, 4), max_size=12), records=st.integers(1, 5), data=st.data())
def test_no_private_batch_has_the_records_of_two_units_but_in_a_fixed_shape(
    sizes: list[int], records: int, data: st.DataObject
) -> None:
    units = unit_groups([str(unit) for unit, size in enumerate(sizes) for _ in range(size)])
    some = st.lists(st.integers(1, 60), min_size=sum(sizes), max_size=sum(sizes))
    lengths = np.array(data.draw(some), dtype=np.int64)
    drawn = np.arange(len(sizes), dtype=np.int64)
    batches = list(private_batches(units, drawn, lengths, 100, fixed_of(records)))
    assert sorted(row for batch in batches for row in batch.rows) == list(range(sum(sizes)))
    of = np.repeat(drawn, sizes)
    for batch in batches:
        if batch.shape is None:
            assert len({of[row] for row in batch.rows}) == 1 and sizes[of[batch.rows[0]]] > 1
            continue
        assert len(batch.rows) <= batch.shape[0] == records and not batch.unfinished
        for row in batch.rows:  # a function of its own length
            own = lengths[row]
            assert sizes[of[row]] == 1 and batch.shape[1] == min((own // 8 + 1) * 8, max(own, 50))
        # all padded, or none
        assert len({lengths[row] == batch.shape[1] for row in batch.rows}) == 1


def test_no_units_make_no_batches() -> None:
    units, nothing = unit_groups(["a", "b"]), np.zeros(0, dtype=np.int64)
    assert list(micro_batches(units, nothing, np.array([3, 4]), 10)) == []
    assert list(private_batches(units, nothing, np.array([3, 4]), 10, fixed_of(4))) == []
    places, owners = unit_records(units, nothing)
    assert len(places) == len(owners) == 0


def test_inclusion_frequencies_are_binomial_and_independent() -> None:
    draws = np.zeros((4_000, 50), dtype=bool)
    for row in draws:
        row[draw_units(50, 0.3, OsRandom())] = True
    by_unit = draws.sum(axis=0)
    assert abs(by_unit - 1_200).max() < 5 * np.sqrt(4_000 * 0.3 * 0.7)
    sizes = draws.sum(axis=1)
    assert abs(sizes.mean() - 15) < 5 * np.sqrt(50 * 0.21 / 4_000)
    # a fixed-size sample would have no variance at all
    assert 0.9 < sizes.var() / (50 * 0.21) < 1.1
    together = (draws[:, 0] & draws[:, 1]).sum()
    assert abs(together - 4_000 * 0.09) < 5 * np.sqrt(4_000 * 0.09 * 0.91)


def test_rates_at_the_ends_and_beyond() -> None:
    assert len(draw_units(100, 1.0, OsRandom())) == 100
    assert len(draw_units(100, 0.0, OsRandom())) == 0
    assert len(draw_units(0, 0.5, OsRandom())) == 0
    with pytest.raises(BadInput):
        draw_units(10, 1.5, OsRandom())


def test_draws_do_not_repeat() -> None:
    draws = {tuple(draw_units(200, 0.5, OsRandom())) for _ in range(50)}
    assert len(draws) == 50
