"""Robust means, against slow references that go coordinate by coordinate and pair by pair."""

from __future__ import annotations

import math
import statistics

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.common.config.load import parse_config
from fedlora.common.config.schema import ROBUST, AggregationConfig
from fedlora.common.disk import mapped
from fedlora.common.errors import BadInput
from fedlora.common.model.state import AdapterSpec, AdapterState, TensorSpec
from fedlora.server.strategies.gathered import Summed, gathering
from fedlora.server.strategies.robust import ROBUST_MEANS

Rows = list[list[float]]


def median(rows: Rows, hostile: int) -> list[float]:
    return [statistics.median(column) for column in zip(*rows, strict=True)]


def trimmed(rows: Rows, hostile: int) -> list[float]:
    return [
        statistics.fmean(sorted(column)[hostile : len(column) - hostile])
        for column in zip(*rows, strict=True)
    ]


def krum(rows: Rows, hostile: int) -> list[float]:
    def score(place: int) -> float:
        others = [row for other, row in enumerate(rows) if other != place]
        far = sorted(math.dist(rows[place], row) ** 2 for row in others)
        return math.fsum(far[: len(rows) - hostile - 2])

    best = sorted(range(len(rows)), key=score)[: len(rows) - hostile]
    return [statistics.fmean(rows[place][c] for place in best) for c in range(len(rows[0]))]


def shortened(rows: Rows, hostile: int) -> list[float]:
    bound = statistics.median(math.hypot(*row) for row in rows)
    short = [[v * min(1.0, bound / (math.hypot(*row) or 1.0)) for v in row] for row in rows]
    return [statistics.fmean(column) for column in zip(*short, strict=True)]


REFERENCES = {
    "median": median,
    "trimmed-mean": trimmed,
    "multi-krum": krum,
    "norm-filter": shortened,
}


def drawn(seed: int, rows: int, size: int) -> npt.NDArray[np.float64]:
    return np.random.default_rng(seed).normal(size=(rows, size))


@pytest.mark.parametrize("name", ROBUST)
@settings(deadline=None)
@given(seed=st.integers(0, 2**32), hostile=st.integers(1, 3), more=st.integers(0, 4))
def test_every_rule_is_its_reference(name: str, seed: int, hostile: int, more: int) -> None:
    asked = AggregationConfig(strategy=name, hostile=hostile)
    updates = drawn(seed, asked.fewest + more, 5)
    expected = REFERENCES[name](updates.tolist(), hostile)
    for stretch in (mapped.STRETCH, 1):
        found = np.zeros(5)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(mapped, "STRETCH", stretch)
            ROBUST_MEANS[name]([*updates], hostile, found)
        np.testing.assert_allclose(found, expected, rtol=1e-9)


@pytest.mark.parametrize("name", ROBUST)
@pytest.mark.parametrize("attack", [1e6, -1e6, -1.0, 30.0])
def test_hostile_updates_do_not_carry_it_away(name: str, attack: float) -> None:
    """A mean moves by their length; these stay where the honest ones are."""
    asked = AggregationConfig(strategy=name, hostile=2)
    honest = 1.0 + 0.1 * drawn(5, 8, 50)
    both = np.concatenate([honest, np.full((2, 50), attack)]).astype(np.float32)
    gathered = gathering(asked)(zeros(50))
    for update in both:
        gathered.add(update)
    found = gathered.total() / gathered.count
    assert gathered.count == 10
    # the filter bounds what two of ten can do; the others choose among coordinates of the honest
    reach = 0.45 if name == "norm-filter" else 0.2
    assert np.linalg.norm(found - honest.mean(axis=0)) < reach * np.linalg.norm(honest.mean(axis=0))


def zeros(size: int) -> AdapterState:
    return AdapterState.zeros(AdapterSpec((TensorSpec("head.weight", (size,)),)))


def test_fedavg_keeps_a_sum_alone() -> None:
    gathered = gathering(AggregationConfig())(zeros(3))
    assert isinstance(gathered, Summed)
    for value in (1, 2):
        gathered.add(np.full(3, value, dtype=np.float32))
    np.testing.assert_array_equal(gathered.total(), np.full(3, 3.0))


def test_too_few_updates_make_no_mean() -> None:
    gathered = gathering(AggregationConfig(strategy="multi-krum", hostile=1))(zeros(2))
    for _ in range(4):
        gathered.add(np.ones(2, dtype=np.float32))
    assert (gathered.count, gathered.total().tolist()) == (4, [0.0, 0.0])


@pytest.mark.parametrize(
    ("given_", "found"),
    [
        ('secure = true\nstrategy = "median"', "expected secure = false: it compares updates"),
        ('strategy = "multi-krum"\nhostile = 4', "expected at least 11 institutions in a round"),
    ],
)
def test_what_cannot_work_is_refused_at_the_start(given_: str, found: str) -> None:
    with pytest.raises(BadInput, match=found):
        parse_config(f"[data]\ntrain = 'a'\ntest = 'b'\n[aggregation]\n{given_}\n")
