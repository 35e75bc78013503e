"""One pass of the head alone, on cached features.

The clipped sum of units' gradients in closed form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

from fedlora.client.training.step import GradientSum, checked_clip
from fedlora.common.errors import BadInput
from fedlora.common.model.shapes import alike

# A product rounds by how many rows it has. In blocks of one size each row has the same bits
# wherever it stands, and whatever stands beside it: where its columns are filled up too, to what
# machines compute at once. An odd number of them made places differ.
BLOCK, COLUMNS = 256, 16
LARGEST_FEATURE = 2.0**10  # of honest features, by far; a base's own head bounds none
# Of (n, classes) and the targets of the rows: as many losses as there are records.
HeadLosses = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def head_clipped_sum(
    head: nn.Module,
    losses: HeadLosses,
    features: torch.Tensor,
    targets: torch.Tensor,
    owners: npt.NDArray[np.int64],
    bound: float | None,
    rows: int = 2048,
    places: torch.Tensor | None = None,
) -> GradientSum:
    """Clipped sum for a head of linear layers on (n, width) features, without per-sample gradients.

    `places` (n,) are rows of a larger table of features, which is then copied a part at a time.

    For a linear layer with inputs a_r and output gradients b_r, the gradient of a unit is Σ b_r
    a_rᵀ over its rows: its records, or all of their words. Of one row its squared norm with the
    bias is |b|² (|a|² + 1). `owners` is (n,), counts units from 0 and never decreases; a unit that
    has no row adds 0. `bound` None: no clip.

    A row's gradient depends on no other row: a coordinator's weights can cancel what is large, and
    make any rounding as large as a gradient. So products go in blocks (`_product`), and a row that
    has a feature beyond `LARGEST_FEATURE` is divided by a power of two, exactly, until it has none:
    what a loss rounds can then be no gradient. All in float64, for weights can also make b so small
    and a so large that |b|² is 0 in float32, and b aᵀ is not.
    """
    if bound is not None:
        checked_clip(bound)
    size = sum(p.numel() for p in head.parameters())
    total = torch.zeros(size, dtype=torch.float64, device=features.device)
    units = nonfinite = start = 0
    while start < len(owners):
        stop = _unit_end(owners, start + rows)
        seen = features[start:stop] if places is None else features[places[start:stop]]
        local = torch.from_numpy(owners[start:stop] - owners[start]).to(features.device)
        part, bad = _head_part(head, losses, _bounded(seen), targets[start:stop], local, bound)
        total += part
        nonfinite += bad
        units += int(local[-1]) + 1
        start = stop
    return GradientSum(total.cpu().numpy(), units, nonfinite)


def _bounded(features: torch.Tensor) -> torch.Tensor:
    """(n, width) float64, none beyond `LARGEST_FEATURE` where it was finite."""
    wide, largest = features.double(), torch.linalg.vector_norm(features, math.inf, dim=1)
    if bool((largest < LARGEST_FEATURE).all()):
        return wide
    _, exponents = torch.frexp(largest.double() / LARGEST_FEATURE)
    return torch.ldexp(wide, -exponents.clamp(min=0)[:, None])


class _Product(torch.autograd.Function):
    """`_product` of (n, k) rows with a layer's (m, k) weight, on the way back too."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return _product(rows, weight.T)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (weight,) = ctx.saved_tensors
        return _product(gradients[0], weight), None


def _multiplied(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = _Product.apply(rows, weight)  # type: ignore[no-untyped-call]
    return found


def _product(rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """(n, k) rows times a (k, m) matrix, in blocks of `BLOCK` rows, filled up with zeros.

    One row a block on a machine where a try says that places differ all the same.
    """
    width, columns = matrix.shape
    wide = -(-columns // COLUMNS) * COLUMNS
    filled = functional.pad(matrix, (0, wide - columns)).contiguous()
    alike_here = _places_are_alike(width, wide, rows.device, torch.get_num_threads())
    step = BLOCK if alike_here else 1
    blocks = torch.split(functional.pad(rows, (0, 0, 0, -len(rows) % step)), step)
    products = [(block @ filled)[:, :columns] for block in blocks if len(block)]
    return torch.cat([rows.new_zeros((0, columns)), *products])[: len(rows)]


@cache
def _places_are_alike(width: int, columns: int, device: torch.device, threads: int) -> bool:
    """Whether a row gives the same bits in all places of a block, and beside other rows."""
    draw = torch.Generator().manual_seed(0)
    beside = torch.randn((BLOCK, width), generator=draw, dtype=torch.float64).to(device)
    matrix = torch.randn((width, columns), generator=draw, dtype=torch.float64).to(device)
    same = beside[:1].expand(BLOCK, -1).contiguous()
    return alike([same @ matrix], [beside @ matrix])


def _unit_end(owners: npt.NDArray[np.int64], near: int) -> int:
    """The end of the unit that holds row `near - 1`, or of all rows."""
    return (
        len(owners)
        if near >= len(owners)
        else int(np.searchsorted(owners, owners[near - 1], side="right"))
    )


def _head_part(
    head: nn.Module,
    losses: HeadLosses,
    features: torch.Tensor,
    targets: torch.Tensor,
    owners: torch.Tensor,
    bound: float | None,
) -> tuple[torch.Tensor, int]:
    inputs, outputs, value = [], [], features
    for layer in layers_of(head):
        if isinstance(layer, nn.Linear):
            inputs.append(value.detach())
            # not layer(value): Opacus would record it
            value = _multiplied(value, layer.weight.double()) + layer.bias.double()
            outputs.append(value)
        else:
            value = layer(value)
    gradients = torch.autograd.grad(losses(value, targets).sum(), outputs)
    if bool((owners.diff() > 0).all()):
        return _clipped_records(inputs, gradients, bound)
    return _clipped_units(inputs, gradients, owners, bound)


def _clipped_records(
    inputs: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor], bound: float | None
) -> tuple[torch.Tensor, int]:
    """Each row is a unit: its squared norm is |b|² (|a|² + 1), a sum that can't cancel."""
    terms = [
        b.square().sum(1) * (a.square().sum(1) + 1.0)
        for a, b in zip(inputs, gradients, strict=True)
    ]
    norms = torch.stack(terms).sum(dim=0).sqrt()
    finite, weights = _factors(norms, bound)
    flat = []
    for a, b in zip(inputs, gradients, strict=True):
        weighted = torch.where(finite[:, None], b, 0.0) * weights[:, None]
        flat += [(weighted.T @ torch.where(finite[:, None], a, 0.0)).flatten(), weighted.sum(dim=0)]
    return torch.cat(flat), int((~finite).sum())


def _clipped_units(
    inputs: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor],
    owners: torch.Tensor,
    bound: float | None,
) -> tuple[torch.Tensor, int]:
    """Units of several rows, one after the other.

    What is measured is the very tensor that is added.

    A norm from inner products of the rows would cancel where they pull against each other, and
    come out far below that of the gradient.
    """
    sizes = torch.bincount(owners).tolist()
    parts = [
        (torch.split(a, sizes), torch.split(b, sizes))
        for a, b in zip(inputs, gradients, strict=True)
    ]
    total: torch.Tensor | None = None
    bad = 0
    for unit in range(len(sizes)):
        flat = [
            part for a, b in parts for part in ((b[unit].T @ a[unit]).flatten(), b[unit].sum(dim=0))
        ]
        gradient = torch.cat(flat)
        finite, factor = _factors(torch.linalg.vector_norm(gradient)[None], bound)
        if total is None:
            total = torch.zeros_like(gradient)
        if finite[0]:
            total += gradient * factor[0]
        else:
            bad += 1
    if total is None:
        raise BadInput("head: found no unit to clip")
    return total, bad


def _factors(norms: torch.Tensor, bound: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Which norms are finite, and what to multiply by: 0 where they are not."""
    finite = torch.isfinite(norms)
    weights = (
        finite.to(norms.dtype)
        if bound is None
        else torch.where(finite, bound / norms.clamp(min=bound), 0.0)
    )
    return finite, weights


def layers_of(head: nn.Module) -> list[nn.Module]:
    """The head's layers in order; BadInput where a trainable layer is not linear with a bias."""
    layers: list[nn.Module] = [head] if isinstance(head, nn.Linear) else list(head.children())
    for layer in layers:
        trainable = any(True for _ in layer.parameters())
        if trainable and not (isinstance(layer, nn.Linear) and layer.bias is not None):
            raise BadInput(
                f"head: found a trainable {type(layer).__name__}, expected linear layers with a"
                " bias"
            )
    return layers
