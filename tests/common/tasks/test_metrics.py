"""Figures that are computed from sums are those that well-known libraries compute at once."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
import torch

from fedlora.common.data.records import Records
from fedlora.common.errors import BadInput
from fedlora.common.tasks.batch import IGNORED, Batch, add_totals
from fedlora.common.tasks.multi_label import MultiLabel
from fedlora.common.tasks.regression import Regression
from fedlora.common.tasks.token_classification import TokenClassification, entities

RNG = np.random.default_rng(0)
NOTHING = torch.zeros(0)


def in_two(task: object, outputs: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
    """The figures of two batches added up."""
    half = len(outputs) // 2
    parts = [
        task.measure(outputs[rows], Batch(NOTHING, NOTHING, targets[rows]))  # type: ignore[attr-defined]
        for rows in (slice(None, half), slice(half, None))
    ]
    found: dict[str, float] = task.metrics(add_totals(parts))  # type: ignore[attr-defined]
    return found


def test_many_labels() -> None:
    task = MultiLabel(("a", "b", "c", "never"))
    targets = torch.from_numpy((RNG.random((60, 4)) < (0.5, 0.2, 0.7, 0)).astype(np.float32))
    outputs = torch.from_numpy(RNG.normal(0, 1, (60, 4)).astype(np.float32)) + targets
    outputs[:, 3] = -1
    found, given = in_two(task, outputs, targets), outputs > 0
    micro, macro = (
        sklearn.metrics.f1_score(targets[:, :3], given[:, :3], average=how)
        for how in ("micro", "macro")
    )
    assert found["micro_f1"] == pytest.approx(micro) and found["macro_f1"] == pytest.approx(macro)
    assert found["exact_match"] == pytest.approx(sklearn.metrics.accuracy_score(targets, given))
    loss = torch.nn.functional.binary_cross_entropy_with_logits(outputs, targets)
    assert found["loss"] == pytest.approx(float(loss), rel=1e-6)


def test_numbers() -> None:
    task = Regression(("0.0", "5.0"))
    true, answered = RNG.uniform(0, 5, 50), RNG.uniform(0, 5, 50)
    records = Records(["t"] * 50, None, None, None, {}, "test", parts={"score": list(true)})
    targets, outputs = (torch.from_numpy(task.targets_of(records)), torch.from_numpy(answered))
    found = in_two(task, (outputs[:, None] - 2.5) / 2.5, targets)
    assert found["spearman"] == pytest.approx(scipy.stats.spearmanr(true, answered).statistic)
    assert found["pearson"] == pytest.approx(scipy.stats.pearsonr(true, answered).statistic, 1e-5)
    assert found["rmse"] == pytest.approx(float(np.sqrt(np.mean((true - answered) ** 2))), 1e-5)


def test_an_answer_stays_on_the_scale_and_a_constant_one_correlates_with_nothing() -> None:
    task, far = Regression(("1", "3")), torch.tensor([[9.0], [-9.0], [0.0]])
    assert task.answers(far, Batch(NOTHING, NOTHING, NOTHING)) == [3.0, 1.0, 2.0]
    found = in_two(task, torch.zeros(4, 1), torch.tensor([0.0, 1.0, -1.0, 0.5]))
    assert found["spearman"] == found["pearson"] == 0.0


def test_a_number_beyond_the_public_scale_is_refused() -> None:
    records = Records(["t"], None, None, None, {}, "train.csv", parts={"score": [5.5]})
    with pytest.raises(BadInput, match=r"row 1: found 5\.5, expected a number of the public scale"):
        Regression(("0", "5")).targets_of(records)


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("O B-d I-d O B-d", [("d", 1, 3), ("d", 4, 5)]),
        ("B-d B-d I-d", [("d", 0, 1), ("d", 1, 3)]),
        ("I-d I-d O", [("d", 0, 2)]),  # begins without a "B-", as conlleval reads it
        ("B-d I-e I-e", [("d", 0, 1), ("e", 1, 3)]),
        ("O O", []),
        ("", []),
    ],
)
def test_entities(tags: str, found: list[tuple[str, int, int]]) -> None:
    assert list(entities(tags.split())) == found


def test_an_entity_is_right_where_type_and_borders_are() -> None:
    task = TokenClassification(("O", "B-d", "I-d", "B-e", "I-e"))
    true = [[1, 2, 0, 3], [0, 0, 1, IGNORED]]
    given = [[1, 2, 0, 1], [0, 1, 1, 4]]
    outputs = torch.nn.functional.one_hot(torch.tensor(given), 5).float()
    found = in_two(task, outputs, torch.tensor(true))
    # right: the first "d" and the last one; given four, true three
    assert (found["entity_precision"], found["entity_recall"]) == (2 / 4, 2 / 3)
    assert found["entity_f1"] == pytest.approx(4 / 7) and found["word_accuracy"] == 5 / 7
