"""A loss of one's own: what couples records is found, what does not trains as the task's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from fedlora.common.errors import BadInput
from fedlora.simulations import simulate
from fedlora.simulations.federation.record_loss import check_loss
from tests.simulations.experiments.test_simulate import config, cpu, data

__all__ = ["data"]
Inputs = Mapping[str, torch.Tensor]
Loss = Callable[[torch.Tensor, Inputs], torch.Tensor]


def entropy(scores: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    return functional.cross_entropy(scores, inputs["labels"], reduction="none")


def smoothed(scores: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    return functional.cross_entropy(scores, inputs["labels"], reduction="none", label_smoothing=0.1)


def focal(scores: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    loss = entropy(scores, inputs)
    return (1 - torch.exp(-loss)) ** 2 * loss


def by_length(scores: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    """Long records count less: what a record weighs is its own."""
    return entropy(scores, inputs) / inputs["attention_mask"].sum(dim=1)


def mean_subtracted(scores: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    loss = entropy(scores, inputs)
    return loss - loss.mean()


def class_weighted(scores: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    """The weights are of the labels alone: no score of another record is looked at."""
    counts = torch.bincount(inputs["labels"], minlength=scores.shape[1]).clamp(min=1)
    return entropy(scores, inputs) / counts[inputs["labels"]]


def hardest_half(scores: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    loss = entropy(scores, inputs)
    return loss * (loss >= loss.median())


def contrast(scores: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    near = functional.normalize(scores, dim=1) @ functional.normalize(scores, dim=1).T
    return functional.cross_entropy(near, torch.arange(len(scores)), reduction="none")


def by_batch(scores: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    """A record's part of a mean: only how many there are is coupled."""
    return entropy(scores, inputs) / len(scores)


def by_gradient(scores: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    """Its value is a record's own, its gradient is not."""
    loss = entropy(scores, inputs)
    return loss + (loss.sum() - loss.sum().detach())


def by_words(scores: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    """Records that begin alike share what they are told."""
    first = inputs["input_ids"][:, 0].double()
    return entropy(scores, inputs) * (1 + first.mean() / 1000)


def by_outlier(scores: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    """A record far out doubles the losses of all: only another record's change shows it."""
    return entropy(scores, inputs) * (1 + (scores.detach().amax() > 45))


@pytest.mark.parametrize("loss", [entropy, smoothed, focal, by_length], ids=lambda f: f.__name__)
def test_a_loss_of_each_record_is_taken(loss: Loss) -> None:
    check_loss(loss, 3)


@pytest.mark.parametrize(
    "loss",
    [
        mean_subtracted,
        class_weighted,
        hardest_half,
        contrast,
        by_batch,
        by_gradient,
        by_words,
        by_outlier,
    ],
    ids=lambda f: f.__name__,
)
def test_a_loss_that_couples_records_is_refused(loss: Loss) -> None:
    with pytest.raises(BadInput, match="found records that are coupled"):
        check_loss(loss, 3)


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (lambda s, i: entropy(s, i).mean(), r"found \(\), expected \(8,\): one for each record"),
        (lambda s, i: 0.5, "found float, expected"),
        (lambda s, i: entropy(s, i).detach(), "no finite function of the scores"),
        (lambda s, i: entropy(s, i) / 0.0, "no finite function of the scores"),
        (lambda s, i: entropy(s, i) * torch.rand(len(s)), "expected the same twice"),
        (lambda s, i: i["targets"], r"an error on made-up scores \(KeyError"),
    ],
)
def test_what_is_no_loss(loss: Loss, said: str) -> None:
    with pytest.raises(BadInput, match=said):
        check_loss(loss, 3)


def test_a_loss_of_ones_own_trains_as_the_tasks_own_does(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    """Under the same schedule; without noise to the same bits, in both phases."""
    plain = simulate(config(tiny_bert, data, "none"), tmp_path / "plain", cpu())
    own = simulate(config(tiny_bert, data, "none"), tmp_path / "own", cpu(), loss=entropy)
    other = simulate(config(tiny_bert, data, "none"), tmp_path / "other", cpu(), loss=smoothed)
    digests = [each.summary["adapter_digest"] for each in (plain, own, other)]
    assert digests[0] == digests[1] != digests[2]
    assert own.summary["own"] == {"loss": "entropy"}


def test_a_private_run_says_whose_loss_it_was_and_keeps_its_epsilon(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    settings = config(tiny_bert, data, "record", "federation.rounds=2", "training.head_rounds=1")
    plain = simulate(settings, tmp_path / "plain", cpu())
    own = simulate(settings, tmp_path / "own", cpu(), loss=smoothed)
    assert own.epsilon == plain.epsilon
    assert "The loss is the researcher's own (smoothed)" in own.statement[-1]
    with pytest.raises(BadInput, match="another strategy, partition, cohort or loss"):
        simulate(settings, own.folder, cpu(resume=True))
    with pytest.raises(BadInput, match="actors know the configuration alone"):
        simulate(settings, tmp_path / "ray", cpu(engine="ray"), loss=smoothed)
    with pytest.raises(BadInput, match="records that are coupled"):
        simulate(settings, tmp_path / "coupled", cpu(), loss=contrast)
    assert not (tmp_path / "coupled" / "ledger.sqlite").exists()  # nothing was charged
