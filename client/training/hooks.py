"""Opacus' hooks, told how many records a batch has and where each layer sees them.

By themselves they take the first dimension of what enters a layer for the records. Some
architectures put words before records, or lay the words of all records in one row: then what comes
out are gradients of words, or of a mixture, and nothing says so. Here each layer's layout is seen
on a batch whose numbers of records and of words differ, and at every pass a layer has to be given
what was seen. `client.training.step` compares the whole with batches of one before it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import Any

import torch
from opacus.grad_sample import GradSampleHooks
from torch import nn

from fedlora.common.errors import BadInput


class Layout(Enum):
    """Where the records are in what enters a layer."""

    FIRST = "records first"
    SECOND = "words first"  # XLNet, Longformer
    FLAT = "the words of all records in one row"  # OPT, experts
    TEXTS = "several texts of each record"  # pairs that are read apart

    @classmethod
    def of(cls, shape: torch.Size, records: int) -> Layout | None:
        """None where it is neither of these."""
        return next((each for each in cls if each.fits(shape, records)), None)

    def fits(self, shape: torch.Size, records: int) -> bool:
        """Whether a tensor of this shape can hold so many records in this layout."""
        if self is Layout.FIRST:
            return len(shape) > 1 and shape[0] == records
        if self is Layout.SECOND:
            return len(shape) == 3 and shape[1] == records
        whole = shape[0] % records == 0
        return whole and len(shape) == (3 if self is Layout.TEXTS else 2)

    def records_first(self, tensor: torch.Tensor, records: int) -> torch.Tensor:
        """(records, …) of a tensor in this layout."""
        if self is Layout.SECOND:
            return tensor.transpose(0, 1)
        return tensor if self is Layout.FIRST else tensor.reshape(records, -1, tensor.shape[-1])


class RecordHooks(GradSampleHooks):  # type: ignore[misc]  # Opacus has no types
    """Hooks on a network's trainable layers. `records` of the batch are to be set before a pass."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network, loss_reduction="sum")
        self.records = 0
        self.layers = list(self.iterate_submodules(network))
        self._layouts: dict[nn.Module, Layout] = {}
        for layer in self.layers:
            # The network stays in eval mode, where nothing is drawn at random; Opacus records what
            # enters a layer in training mode alone, and these layers compute the same in both.
            layer.training = True
        self.disable_hooks()

    @contextmanager
    def on(self) -> Iterator[None]:
        """Hooks record in here alone: other passes, to measure or to evaluate, are nobody's."""
        self.enable_hooks()
        try:
            yield
        finally:
            self.disable_hooks()

    def learn(self, forward: Callable[[], Any], records: int) -> bool:
        """Whether each layer has a rule for its gradient and sees `forward`'s batch in one layout,
        which is kept.
        """
        seen: dict[nn.Module, set[Layout | None]] = {layer: set() for layer in self.layers}
        with torch.no_grad(), _watched(seen, records):
            forward()
        ruled = all(self._has_rule(layer) for layer in self.layers)
        if not ruled or any(None in each or len(each) > 1 for each in seen.values()):
            return False
        self._layouts = {layer: layout for layer, each in seen.items() for layout in each if layout}
        return True

    def _has_rule(self, layer: nn.Module) -> bool:
        """Opacus' own rule for LayerNorm asks for a bias, which ModernBERT's has not."""
        whole = not isinstance(layer, nn.LayerNorm) or layer.bias is not None
        return whole and type(layer) in self.GRAD_SAMPLERS

    def rearrange_grad_samples(
        self, *, module: nn.Module, backprops: torch.Tensor, **kwargs: Any
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Opacus', records first in the layout that was tried; BadInput where none fits."""
        module.max_batch_len = self.records  # type: ignore[assignment]
        inputs, gradients = super().rearrange_grad_samples(
            module=module, backprops=backprops, **kwargs
        )
        layout = self._layouts.get(module)
        for each in (*inputs, gradients):
            if layout is None or not layout.fits(each.shape, self.records):
                found = f"{type(module).__name__} that sees {tuple(each.shape)}"
                expected = "a layout" if layout is None else layout.value
                raise BadInput(
                    f"adapter: found a {found} of {self.records} records, expected {expected}"
                )
        first = [layout.records_first(each, self.records) for each in inputs]  # type: ignore[union-attr]
        return first, layout.records_first(gradients, self.records)  # type: ignore[union-attr]


def close(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> bool:
    """Whether (m, size) gradients are the same but for rounding, parameter by parameter and record
    by record. A wrong layout is off by about its whole norm.
    """
    norms = torch.stack([each.norm(dim=1) for each in expected])
    apart = torch.stack([(a - b).norm(dim=1) for a, b in zip(found, expected, strict=True)])
    return bool((apart <= 1e-2 * norms + 1e-4 * norms.norm(dim=0)).all())


def unused(name: str) -> BadInput:
    """What is wrong where a parameter of that name had no gradient."""
    return BadInput(
        f"adapter {name}: found no gradient, expected a layer that every text goes through"
    )


@contextmanager
def _watched(seen: dict[nn.Module, set[Layout | None]], records: int) -> Iterator[None]:
    def watch(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        seen[module].add(Layout.of(inputs[0].shape, records))

    handles = [module.register_forward_pre_hook(watch) for module in seen]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
