"""A coordinator whose adapter magnifies how a loss rounds: by a record's place, it would be seen.

Kernels take what is left over at the end of a tensor through code of its own. Of five labels and
four records the last record's are, and what cancels in all other places did not there: a unit moved
a sum by 63 clips.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from fedlora.client.training.step import PerSampleGradients
from fedlora.common.config.schema import LoraConfig, ModelConfig
from fedlora.common.model.network import build_model
from fedlora.common.model.shapes import Shape
from fedlora.common.tasks.batch import Batch
from fedlora.common.tasks.classification import precise
from fedlora.common.tasks.multi_label import MultiLabel


def labels(count: int) -> tuple[str, ...]:
    return tuple(f"label {place}" for place in range(count))


class Plain(MultiLabel):
    """The mean that another package might bring."""

    def losses(self, outputs: torch.Tensor, batch: Batch) -> torch.Tensor:
        each = functional.binary_cross_entropy_with_logits(
            precise(outputs), batch.targets, reduction="none"
        )
        return each.mean(dim=1)


def differing(task: MultiLabel, records: int, dtype: torch.dtype) -> int:
    """At how many of a few hundred answers a record's gradient depends on its place."""
    rng, count, found = np.random.default_rng(0), len(task.labels), 0
    for answer in rng.normal(0, 4, (200, 1, count)):
        outputs = torch.tensor(answer, dtype=dtype).repeat(records, 1).requires_grad_()
        batch = Batch(torch.empty(0), torch.empty(0), torch.ones(records, count))
        (gradient,) = torch.autograd.grad(task.losses(outputs, batch).sum(), outputs)
        found += bool((gradient != gradient[:1]).any())
    return found


@pytest.mark.parametrize("records", [4, 8, 13, 700])
@pytest.mark.parametrize("count", [5, 7, 28, 90])
def test_a_labels_gradient_has_the_same_bits_in_every_place(count: int, records: int) -> None:
    assert differing(MultiLabel(labels(count)), records, torch.float32) == 0
    if records < 700:
        assert differing(MultiLabel(labels(count)), records, torch.float64) == 0


def test_parts_of_threads_are_no_places() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert differing(MultiLabel(labels(90)), 700, torch.float32) == 0
    finally:
        torch.set_num_threads(before)


def test_a_loss_and_its_gradient_are_the_mean_over_labels() -> None:
    rng = np.random.default_rng(1)
    targets = torch.tensor(rng.integers(0, 2, (700, 90)), dtype=torch.float32)
    outputs = torch.tensor(rng.normal(0, 4, (700, 90)), dtype=torch.float32)
    batch = Batch(torch.empty(0), torch.empty(0), targets)
    found = []
    for task in (MultiLabel(labels(90)), Plain(labels(90))):
        mine = outputs.clone().requires_grad_()
        losses = task.losses(mine, batch)
        found.append((losses, *torch.autograd.grad(losses.sum(), mine)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("count", [5, 7])
def test_records_go_alone_where_a_loss_goes_by_place(count: int, tiny_bert: Path) -> None:
    def together(task: MultiLabel) -> int:
        settings = ModelConfig(str(tiny_bert), max_length=40, pooling="mean")
        model = build_model(settings, LoraConfig(rank=2), task, 5)
        return PerSampleGradients(model).company.records(Shape(4, 16, False))

    assert together(MultiLabel(labels(count))) == 4
    assert together(Plain(labels(count))) == 1
