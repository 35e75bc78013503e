"""Layers computed a second time on the way back, instead of their activations being kept.

Each layer of the transformer goes forward without a graph; when its gradient is due it goes forward
again, with one, and at once backward. So Opacus' hooks see each layer's input and gradient exactly
once, in the second pass: what they record in the first, they record where gradients are on. That is
PyTorch's reentrant checkpointing. The other kind would show hooks both passes, and a layer whose
input needs no gradient its gradient before its input.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from fedlora.common.errors import BadInput


def recompute(network: nn.Module) -> None:
    """Keep what enters a layer, and nothing in it; BadInput where the base has no such layers.

    A layer below the lowest adapted one keeps nothing in any case.
    """
    layers = [each for each in network.modules() if isinstance(each, GradientCheckpointingLayer)]
    if not layers:
        raise BadInput(
            "[training] checkpointing = true: found no layers in the base that can be computed"
            " again, expected false"
        )
    for layer in layers:
        trained = any(parameter.requires_grad for parameter in layer.parameters())
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(_again, trained)  # type: ignore[assignment]
        # asked for by transformers; nothing in a layer draws, and its parts stay in eval mode
        layer.training = True


def _again(trained: bool, forward: Callable[..., Any], *inputs: Any) -> Any:
    """What `forward` gives, computed again when its gradient is due."""
    others = getattr(forward, "keywords", {}).values()
    needed = trained or any(map(_needs_gradient, inputs))
    if not torch.is_grad_enabled() or not needed or any(map(_needs_gradient, others)):
        return forward(*inputs)
    # autograd comes back to a pass only if something that entered it asks for a gradient
    asks = torch.empty(0, requires_grad=True)
    return checkpoint(
        lambda _, *given: forward(*given),
        asks,
        *inputs,
        use_reentrant=True,
        preserve_rng_state=False,
    )


def _needs_gradient(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return any(map(_needs_gradient, value))
    return isinstance(value, torch.Tensor) and value.requires_grad
