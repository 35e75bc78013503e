"""Slow references that the fast paths are proven equal to."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

# --- clipping: one record at a time, one unit at a time, plain autograd, float64 sums --------------------


def clipped_sum_by_ones(model, data, units, drawn, groups):  # type: ignore[no-untyped-def]
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


def _gradient_of_one(model, data, row):  # type: ignore[no-untyped-def]
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
