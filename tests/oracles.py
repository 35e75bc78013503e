"""Slow references that the fast paths are proven equal to."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from fedlora.client.dpsgd import ClipGroups
from fedlora.common.data import UnitIndex
from fedlora.common.model import AdapterModel
from fedlora.common.tasks import Encoded

# --- clipping: one record at a time, one unit at a time, plain autograd, float64 sums --------------------


def clipped_sum_by_ones(
    model: AdapterModel,
    data: Encoded,
    units: UnitIndex,
    drawn: npt.NDArray[np.int64],
    groups: ClipGroups,
) -> npt.NDArray[np.float64]:
    """Σ over the drawn units of the unit's whole gradient, clipped by group."""
    total = np.zeros(model.spec.size, dtype=np.float64)
    for unit in drawn:
        gradient = np.zeros(model.spec.size, dtype=np.float64)
        for row in units.records[units.offsets[unit] : units.offsets[unit + 1]]:
            gradient += _gradient_of_one(model, data, row)
        for group, bound in enumerate(groups.bounds):
            inside = groups.group == group
            norm = float(np.linalg.norm(gradient[inside]))
            total[inside] += gradient[inside] * min(1.0, bound / norm if norm else 1.0)
    return total


def _gradient_of_one(model: AdapterModel, data: Encoded, row: int) -> npt.NDArray[np.float64]:
    batch = data.batch(np.array([row]), model.pad, model.device)
    parameters = list(model.parameters.values())
    loss = model.task.losses(model.logits(batch), batch).sum()
    gradients = torch.autograd.grad(loss, parameters)
    return np.concatenate([g.double().numpy().ravel() for g in gradients])


def head_clipped_sum_by_ones(
    head: torch.nn.Module,
    losses: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    features: torch.Tensor,
    targets: torch.Tensor,
    owners: npt.NDArray[np.int64],
    bound: float,
) -> npt.NDArray[np.float64]:
    """The same for a head alone."""
    parameters = list(head.parameters())
    total = np.zeros(sum(p.numel() for p in parameters), dtype=np.float64)
    for owner in np.unique(owners):
        rows = torch.from_numpy(np.flatnonzero(owners == owner))
        loss = losses(head(features[rows]), targets[rows]).sum()
        flat = np.concatenate([g.double().numpy().ravel() for g in torch.autograd.grad(loss, parameters)])
        norm = float(np.linalg.norm(flat))
        total += flat * min(1.0, bound / norm if norm else 1.0)
    return total


# --- server optimisers: every coordinate by itself, from the whole history, as the paper writes them --------


def server_states(
    name: str,
    rates: list[float],
    beta1: float,
    beta2: float,
    start: list[float],
    means: list[list[float]],
) -> list[list[float]]:
    """The state after each round, by Algorithm 2 of Reddi et al. 2021 (and FedAvgM), a rate for each round.

    Computed in float64; what is remembered from one round to the next is rounded to float32.
    """
    tau = 1e-3
    states = []
    x, m, v = list(start), [0.0] * len(start), [tau**2] * len(start)
    for rate, delta in zip(rates, means, strict=True):
        for i in range(len(x)):
            square = delta[i] ** 2
            if name == "none":
                x[i] += rate * delta[i]
            elif name == "momentum":
                m[i] = beta1 * m[i] + delta[i]
                x[i] += rate * m[i]
            else:
                m[i] = beta1 * m[i] + (1 - beta1) * delta[i]
                if name == "adam":
                    v[i] = beta2 * v[i] + (1 - beta2) * square
                else:
                    v[i] -= (1 - beta2) * square * ((v[i] > square) - (v[i] < square))
                x[i] += rate * m[i] / (v[i] ** 0.5 + tau)
        x, m, v = ([float(np.float32(value)) for value in vector] for vector in (x, m, v))
        states.append(list(x))
    return states
