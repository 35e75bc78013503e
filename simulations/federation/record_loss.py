"""A loss of the researcher's own: of each record by itself, or refused before anything is charged.

What a unit adds to a step is clipped on the strength that its gradient is its own. A loss that
looks at other records of its batch (a contrast, weights by how often a class occurs, a mean) breaks
that, and nothing downstream could notice. So it is tried on made-up scores: each record is
changed in turn, and neither the losses of the others nor their gradients may move; each record is
tried alone, and must have the loss that it has in company.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fedlora.common.errors import BadInput
from fedlora.common.tasks.batch import Batch
from fedlora.common.tasks.task import Task

# (n, classes) scores and a batch's tensors by the names that transformers has for them, `labels`,
# `input_ids` and `attention_mask`, to (n,) losses. A head phase, whose features are cached, has
# `labels` alone.
RecordLoss = Callable[[torch.Tensor, Mapping[str, torch.Tensor]], torch.Tensor]

OWN_LOSS = (
    "The loss is the researcher's own ({name}). On made-up scores no record had a part in the loss"
    " of another."
)
RECORDS, WORDS = 8, 6  # of a made-up batch
SIZES = (0.1, 1.0, 10.0)  # of made-up scores: what chooses records by their loss shows at some size
TRIALS = 4  # batches of each size
TOLERANCE = 1e-5  # of rounding, relative


@dataclass(frozen=True)
class WithLoss:
    """A task whose loss in training is the researcher's own; measures and metrics stay its own."""

    task: Task
    loss: RecordLoss

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)

    def losses(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """(n,) of `logits` (n, classes)."""
        precise = logits if logits.dtype == torch.float64 else logits.float()
        return self.loss(precise, _inputs(batch))


def with_loss(task: Task, loss: RecordLoss) -> Task:
    """`task` with a loss that was tried; BadInput where it is none, or couples records."""
    if task.name != "sequence-classification":
        raise BadInput(f"loss: found task {task.name}, expected sequence-classification")
    check_loss(loss, len(task.labels))
    return WithLoss(task, loss)  # type: ignore[return-value]  # what it has not, its task has


def check_loss(loss: RecordLoss, classes: int) -> None:
    """BadInput unless `loss` gives each record a loss that no other record has a part in."""
    generator = torch.Generator().manual_seed(0)  # tries are the same on every machine
    for size in SIZES * TRIALS:
        scores = size * torch.randn(RECORDS, classes, generator=generator)
        inputs = _made_up(classes, RECORDS, generator)
        losses, gradients = _tried(loss, scores, inputs)
        again, _ = _tried(loss, scores, inputs)
        if _moved(losses, again).any():
            raise BadInput("loss: found other losses for the same records, expected the same twice")
        _check_alone(loss, scores, inputs, losses)
        _check_apart(gradients)
        for record in range(RECORDS):
            other = _changed(scores, inputs, record, classes, size, generator)
            moved = _moved(losses, _tried(loss, *other)[0])
            moved[record] = False
            if moved.any():
                _refuse(f"that of record {int(moved.nonzero()[0])} moved as record {record} did")


def _tried(
    loss: RecordLoss, scores: torch.Tensor, inputs: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(n,) losses, and (n, n) how much of each loss's gradient lies in each record's scores."""
    scores = scores.clone().requires_grad_()
    try:
        losses = loss(scores, dict(inputs))
    except BadInput:
        raise
    except Exception as error:
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        raise BadInput(f"loss: found an error on made-up scores ({said})") from error
    found = tuple(losses.shape) if isinstance(losses, torch.Tensor) else type(losses).__name__
    if found != (len(scores),):
        raise BadInput(f"loss: found {found}, expected ({len(scores)},): one for each record")
    if not losses.requires_grad or not bool(torch.isfinite(losses).all()):
        raise BadInput("loss: found no finite function of the scores, expected one")
    each = [torch.autograd.grad(one, scores, retain_graph=True)[0] for one in losses]
    return losses.detach(), torch.stack([gradient.abs().sum(dim=1) for gradient in each])


def _check_alone(
    loss: RecordLoss, scores: torch.Tensor, inputs: Mapping[str, torch.Tensor], losses: torch.Tensor
) -> None:
    for record in range(RECORDS):
        one = slice(record, record + 1)
        alone, _ = _tried(loss, scores[one], {name: each[one] for name, each in inputs.items()})
        if _moved(losses[one], alone).any():
            _refuse(f"record {record} has another loss alone than in company")


def _check_apart(gradients: torch.Tensor) -> None:
    others = gradients - torch.diag(gradients.diagonal())
    if (others > TOLERANCE * gradients.sum(dim=1, keepdim=True)).any():
        _refuse("a record's gradient lies in the scores of another")


def _refuse(seen: str) -> None:
    raise BadInput(f"loss: found records that are coupled ({seen}), expected each by itself")


def _moved(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """(n,) whether a loss is another, beyond rounding."""
    return (before - after).abs() > TOLERANCE * (1.0 + before.abs())


def _made_up(classes: int, records: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    def drawn(most: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, most, shape, generator=generator)

    ids = drawn(1000, records, WORDS)
    labels = drawn(classes, records)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def _changed(
    scores: torch.Tensor,
    inputs: Mapping[str, torch.Tensor],
    record: int,
    classes: int,
    size: float,
    generator: torch.Generator,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The same batch with another record in one place: other scores, words and label."""
    others = {name: each.clone() for name, each in inputs.items()}
    for name, each in _made_up(classes, 1, generator).items():
        others[name][record] = each[0]
    others["labels"][record] = (inputs["labels"][record] + 1) % classes
    scores = scores.clone()
    scores[record] = 3 * size * torch.randn(classes, generator=generator)
    return scores, others


def _inputs(batch: Batch) -> dict[str, torch.Tensor]:
    if batch.ids.ndim == 1:  # a head on cached features: no words are there
        return {"labels": batch.targets}
    return {
        "input_ids": batch.ids,
        "attention_mask": batch.mask.clamp(max=1),
        "labels": batch.targets,
    }
