"""A head of an institution's own, on top of a released adapter: trained here, and never sent.

Nothing leaves, so nothing is clipped, noised or charged; what comes of it is as private as the
records. It starts at the released head and is pulled towards it, as in fine-tuning after FedAvg
(Cheng et al. 2021, "Fine-tuning is fine in federated learning") with the distance of Ditto (Li et
al. 2021). How strong the pull is, records decide that no fit of theirs saw; where none helps, the
released head stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from fedlora.client.training.head import layers_of
from fedlora.client.training.local import ClientData
from fedlora.client.training.sampling import unit_records
from fedlora.common.errors import BadInput
from fedlora.common.model.network import AdapterModel
from fedlora.common.model.state import HEAD_PREFIX, AdapterState
from fedlora.common.tasks.batch import Batch, Totals, add_totals
from fedlora.common.tasks.task import RECORD, Task

FOLDS = 3  # each of units that the other two thirds are fitted without
# times half the squared distance from the released head, beside the mean loss; the strongest first,
# from which the next one's search goes on
PULLS = (1e-1, 1e-2, 1e-3, 1e-4)
ITERATIONS = 60  # of L-BFGS, for each pull
Weights = list[torch.Tensor]


@dataclass(frozen=True, eq=False)
class Personal:
    """A state with the institution's own head, and what both heads are worth on its own records.

    `released` and `own` are the task's metrics over all folds, each scored by a head that it had no
    part in; the released one was trained, under privacy, with these records. Empty where there are
    fewer units than folds.
    """

    state: AdapterState
    pull: float | None  # None: the released head is the better one, and is kept
    released: dict[str, float]
    own: dict[str, float]

    @property
    def figures(self) -> dict[str, object]:
        """What a person reads of it."""
        return {"pull": self.pull, "released": self.released, "own": self.own}

    @property
    def compared(self) -> dict[str, dict[str, float]]:
        """The metrics of each, under its title."""
        return {"released head": self.released, "own head": self.own}

    @property
    def choice(self) -> str:
        """What was chosen, and how."""
        return "the released head is kept" if self.pull is None else f"pull {self.pull:g}"


def personal_head(
    model: AdapterModel, data: ClientData, features: torch.Tensor, released: AdapterState
) -> Personal:
    """Fit the head of `released` to `data`, whose `features` (records, width) are in unit order.

    With fewer units than `FOLDS` the released head stays. BadInput for a head that doesn't answer
    records.
    """
    check_head(model)
    if len(data.units) < FOLDS:
        return Personal(released, None, {}, {})
    model.load(released)
    rows = torch.from_numpy(data.encoded.targets[data.units.records])
    whole = _Records(model.task, layers_of(model.head), features, rows.to(features.device))
    start = [each.detach().clone() for each in model.head.parameters()]
    folds = [fold_of(data, number).to(features.device) for number in range(FOLDS)]
    tried = [whole.path(~fold, start) for fold in folds]
    by_pull = [
        add_totals([whole.totals(fold, tried[n][place]) for n, fold in enumerate(folds)])
        for place in range(len(PULLS))
    ]
    before = add_totals([whole.totals(fold, start) for fold in folds])
    metrics = [model.task.metrics(totals) for totals in (before, *by_pull)]
    best = min(range(len(metrics)), key=lambda number: metrics[number]["loss"])
    if best == 0:
        return Personal(released, None, metrics[0], metrics[0])
    found = whole.path(torch.ones_like(folds[0]), start)[best - 1]
    return Personal(_with_head(released, found), PULLS[best - 1], metrics[0], metrics[best])


def check_head(model: AdapterModel) -> None:
    """BadInput unless the head is of linear layers and answers each record by itself."""
    if model.task.reads != RECORD:
        raise BadInput(
            f'personal head: found task = "{model.task.name}", expected one whose head answers'
            " records"
        )
    layers_of(model.head)


@dataclass(frozen=True, eq=False)
class _Records:
    """Features and targets of one institution, and the layers above them."""

    task: Task
    layers: Sequence[nn.Module]
    features: torch.Tensor
    targets: torch.Tensor

    def path(self, chosen: torch.Tensor, start: Weights) -> list[Weights]:
        """Weights for each pull, fitted to the records `chosen`, a mask."""
        found, weights = [], start
        for pull in PULLS:
            weights = self._fitted(chosen, start, weights, pull)
            found.append(weights)
        return found

    def _fitted(
        self, chosen: torch.Tensor, anchor: Weights, begin: Weights, pull: float
    ) -> Weights:
        weights = [each.clone().requires_grad_(True) for each in begin]
        search = torch.optim.LBFGS(weights, max_iter=ITERATIONS, line_search_fn="strong_wolfe")
        features, batch = self.features[chosen], _targets_alone(self.targets[chosen])

        def objective() -> torch.Tensor:
            search.zero_grad()
            scores = _through(self.layers, weights, features)
            away = sum((w - a).square().sum() for w, a in zip(weights, anchor, strict=True))
            value = self.task.losses(scores, batch).mean() + 0.5 * pull * away
            value.backward()  # type: ignore[no-untyped-call]
            return value

        search.step(objective)  # type: ignore[no-untyped-call]
        return [each.detach() for each in weights]

    @torch.no_grad()
    def totals(self, chosen: torch.Tensor, weights: Weights) -> Totals:
        """The task's sums over the records `chosen`."""
        scores = _through(self.layers, weights, self.features[chosen])
        return self.task.measure(scores, _targets_alone(self.targets[chosen]))


def _targets_alone(targets: torch.Tensor) -> Batch:
    return Batch(targets, targets, targets)  # a head's losses read nothing else


def _through(layers: Sequence[nn.Module], weights: Weights, features: torch.Tensor) -> torch.Tensor:
    """What the layers give with `weights`: each linear one's matrix and bias, in their order."""
    value, given = features, iter(weights)
    for layer in layers:
        linear = isinstance(layer, nn.Linear)
        value = functional.linear(value, next(given), next(given)) if linear else layer(value)
    return value


def fold_of(data: ClientData, number: int) -> torch.Tensor:
    """(records,) true for those of every third unit; a unit is in one fold with all its records."""
    every = np.arange(len(data.units), dtype=np.int64)
    return torch.from_numpy(unit_records(data.units, every)[1] % FOLDS == number)


def _with_head(state: AdapterState, weights: Weights) -> AdapterState:
    named = dict(state.named())
    names = [each.name for each in state.spec.tensors if each.name.startswith(HEAD_PREFIX)]
    named |= {n: w.cpu().float().numpy() for n, w in zip(names, weights, strict=True)}
    return AdapterState.from_named(state.spec, named)
