"""A head's weights that a coordinator chose: what a unit adds in a head phase moves no other's."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from fedlora.client.training import head as heads
from fedlora.client.training.head import head_clipped_sum

WIDTH, CLIP = 64, 1.0
Losses = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def squares(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (outputs[:, 0] - targets).square()


def crosses(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(outputs, targets, reduction="none")


def cancelling(outputs: int, one: int, other: int, small: int) -> nn.Module:
    """Two columns cancel; whether a third survives them goes by the order of adding."""
    head = nn.Linear(WIDTH, outputs)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.zero_()
        row = min(1, len(head.weight) - 1)
        head.weight[row, one], head.weight[row, other] = 1e3, -1e3
        head.weight[row, small], head.bias[row] = 900.0, -450.0
    return head


def records(count: int, size: float, one: int, other: int, small: int) -> torch.Tensor:
    values = np.random.default_rng(1).normal(0, 0.01, (count, WIDTH)).astype(np.float32)
    features = torch.from_numpy(values)
    features[:, one] = features[:, other] = size
    features[:, small] = 1.0
    return features


def largest_move(head: nn.Module, losses: Losses, features: torch.Tensor, count: int) -> float:
    """How far the unit after `count` others moves the sum, before or behind them."""
    classes = 1 if losses is squares else 0
    targets = torch.zeros(count + 1, dtype=torch.float64 if classes else torch.int64)

    def total(rows: list[int]) -> np.ndarray:
        order = torch.tensor(rows)
        owners = np.arange(len(rows))
        return head_clipped_sum(head, losses, features[order], targets[order], owners, CLIP).vector

    others = list(range(count))
    without = total(others)
    each = (total([count, *others]), total([*others, count]))
    return max(float(np.linalg.norm(found - without)) for found in each)


@pytest.mark.parametrize("size", [1e3, 1e17, 1e22])
@pytest.mark.parametrize(("losses", "outputs"), [(squares, 1), (crosses, 2), (crosses, 3)])
def test_a_unit_moves_the_sum_of_a_head_phase_by_a_clip_at_most(
    losses: Losses, outputs: int, size: float
) -> None:
    places = ((0, 1, 2), (0, 8, 3), (0, 32, 16), (5, 63, 48))
    for count, (one, other, small) in product((1, 2, 3, 7, 15, 63, 127, 256, 300), places):
        head = cancelling(outputs, one, other, small)
        features = records(count + 1, size, one, other, small)
        moved = largest_move(head, losses, features, count)
        assert moved <= CLIP * (1 + 1e-9), f"{count} others, columns {one}, {other}, {small}"


@pytest.mark.parametrize("alike", [True, False], ids=["blocks", "one-by-one"])
def test_a_rows_product_is_that_of_the_row_alone(
    alike: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not alike:
        monkeypatch.setattr(heads, "_places_are_alike", lambda *kind: False)
    rng = np.random.default_rng(0)
    rows = torch.from_numpy(rng.normal(0, 1, (300, 24)))
    matrix = torch.from_numpy(rng.normal(0, 1, (24, 5)))
    found = heads._product(rows, matrix)
    assert torch.equal(found, torch.cat([heads._product(row[None], matrix) for row in rows]))
    assert torch.allclose(found, rows @ matrix)


def test_features_beyond_all_honest_ones_are_divided_exactly() -> None:
    features = torch.tensor([[3.0, -1000.0], [0.0, 2.0**40], [1e-3, -3e38]])
    found = heads._bounded(features)
    assert torch.equal(found[0], features[0].double())
    assert found.abs().max() <= heads.LARGEST_FEATURE
    edge = torch.full((2, 2), heads.LARGEST_FEATURE)  # not by whether another is beyond it
    beyond = torch.cat([edge, torch.full((1, 2), 2 * heads.LARGEST_FEATURE)])
    assert torch.equal(heads._bounded(edge), heads._bounded(beyond)[:2])
    assert torch.equal(found[2, 0] / found[2, 1], (features[2, 0].double() / features[2, 1]))
