"""Frozen matrices of linear layers kept in 8 or 4 bits, and multiplied as any other.

    int8    each row as whole numbers of -127 to 127 times its largest size over 127
    nf4     each value of a block of 64 as one of 16, times the block's largest size (QLoRA:
            Dettmers et al. 2023, appendix E)

The codes are bitsandbytes', to the bit, and its library is not needed: where it is installed, each
process loads it with PEFT, and it fetches and runs kernels from a hub where it finds how to.

The matrix alone is quantised, never what it is multiplied with: a product is that of the run's
`precision` with the matrix widened, for as long as it takes. Rows of a batch stay apart, which
8-bit products that look for large columns in the whole batch do not promise. Embeddings, the scores
of words, norms, adapters, heads, clip and sums are as they are without it.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from fedlora.common.errors import BadInput
from fedlora.common.model.stored import QUANTISED, StoredConv1D, StoredLinear

BLOCK = 64
# quantiles of a normal distribution, as QLoRA's authors published them
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
    *(0.7229568362236023, 1.0),
)
_TINY = 1e-30  # of a row or block of zeros


class QuantisedLinear(nn.Linear):
    """A frozen linear layer: `weight` holds codes of a matrix of `shape`, `scale` their unit."""

    scale: nn.Parameter
    shape: tuple[int, int]

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """(…, out) of `rows` (…, in), in their own type, or in autocast's."""
        device = rows.device.type
        narrow = torch.is_autocast_enabled(device)
        wanted = torch.get_autocast_dtype(device) if narrow else rows.dtype
        bias = None if self.bias is None else self.bias.to(wanted)
        flat = rows.to(wanted).reshape(-1, rows.shape[-1])
        product: torch.Tensor = _Product.apply(flat, self.weight, self.scale, self.shape, bias)  # type: ignore[no-untyped-call]
        return product.reshape(*rows.shape[:-1], self.shape[0])


class _Product(torch.autograd.Function):
    """(n, out) of (n, in): the matrix is widened on the way there, and again on the way back."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        codes: torch.Tensor,
        scale: torch.Tensor,
        shape: tuple[int, int],
        bias: Any,
    ) -> torch.Tensor:
        ctx.save_for_backward(codes, scale)
        ctx.shape = shape
        return functional.linear(rows, widened(codes, scale, shape, rows.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = gradients
        codes, scale = ctx.saved_tensors
        matrix = widened(codes, scale, ctx.shape, gradient.dtype)
        return gradient @ matrix, None, None, None, None


def quantise(network: Any, kind: str) -> None:
    """Keep the frozen matrices of an adapted base's linear layers as `kind`, one after the other.

    BadInput where the network has none that nothing else reads.
    """
    # its own: PEFT's layers show that of the layer within
    users = Counter(id(each._parameters.get("weight")) for each in network.modules())
    scores = network.get_output_embeddings()
    apart = set() if scores is None else set(scores.modules())
    found = [
        module
        for module in network.modules()
        if type(module) in (StoredLinear, StoredConv1D)
        and not module.weight.requires_grad
        and users[id(module.weight)] == 1
        and module not in apart
    ]
    if not found:
        raise BadInput(
            f'[model] dtype = "{kind}": found no matrices in the base that can be kept so, expected'
            " float32 or bfloat16"
        )
    for module in found:
        _pack(module, kind)


def quantised_as(network: nn.Module) -> str:
    """The kind that a network's matrices are kept as; "" where they are not quantised."""
    first = next((each for each in network.modules() if type(each) is QuantisedLinear), None)
    return "" if first is None else QUANTISED[int(first.weight.dtype == torch.uint8)]


def packed(matrix: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of an (out, in) matrix, and their scale.

    int8: (out, in) int8 and (out, 1) float32. nf4: uint8, two codes each, the first above the
    second, and a float32 for each of `BLOCK` values. ValueError for any other kind.
    """
    wide = matrix.detach().float()
    if kind == "int8":
        scale = wide.abs().amax(dim=1, keepdim=True) / 127
        return (wide / scale.clamp(min=_TINY)).round().to(torch.int8), scale
    if kind != "nf4":
        raise ValueError(f"expected one of {', '.join(QUANTISED)}, found {kind!r}")
    blocks = functional.pad(wide.flatten(), (0, -wide.numel() % BLOCK)).reshape(-1, BLOCK)
    scale = blocks.abs().amax(dim=1)
    values = torch.tensor(NF4, device=wide.device)
    between = (values[1:] + values[:-1]) / 2
    codes = torch.bucketize(blocks / scale.clamp(min=_TINY)[:, None], between).to(torch.uint8)
    codes = codes.flatten()
    return codes[0::2] << 4 | codes[1::2], scale


def widened(
    codes: torch.Tensor, scale: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype
) -> torch.Tensor:
    """The (out, in) matrix of its codes."""
    if codes.dtype == torch.int8:
        return (codes * scale).to(dtype)
    values = torch.tensor(NF4, device=codes.device)
    pairs = torch.cartesian_prod(values, values)  # (256, 2): what a byte stands for
    blocks = functional.embedding(codes.int(), pairs).reshape(-1, BLOCK)
    return (blocks * scale[:, None]).to(dtype).flatten()[: shape[0] * shape[1]].reshape(shape)


def _pack(module: Any, kind: str) -> None:
    """Make a frozen layer one whose matrix is quantised; the wide matrix is let go."""
    matrix = module.weight.data
    if type(module) is StoredConv1D:
        matrix = matrix.t()
    codes, scale = packed(matrix, kind)
    module.shape = tuple(matrix.shape)
    module.out_features, module.in_features = module.shape
    module.weight = nn.Parameter(codes, requires_grad=False)
    module.scale = nn.Parameter(scale, requires_grad=False)
    module.__class__ = QuantisedLinear
