"""Scores of all words only where a word is to be predicted, and for some places at a time.

A language model's last product has a column for each word: for all places of a batch it can be
larger than everything else in a step. Here each chunk of places has its scores, its losses and the
gradient of these at once, and only the gradient by what enters the product is kept.

In a batch of fixed shape a chunk is some columns of all records, whatever they ask for: the shape
of its product says nothing of any record (`common.model.shapes`). A chunk in which no record
predicts anything adds nothing to any, and is left out. Nor may it where it was scored for others'
sake, and a record's own place in it overflowed: that is 0 too, not 0 times what is no number.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from fedlora.common.tasks.batch import Batch

# Bytes of a chunk's scores in float32.
CHUNK = {"cpu": 1 << 26, "cuda": 1 << 29}
_SAME = 1e-5  # of the largest score: what other shapes of a product may lose


@dataclass(frozen=True, eq=False)
class NextWords:
    """A language model in two parts: hidden states, and the product that scores words."""

    backbone: nn.Module
    head: nn.Module
    words: int

    @classmethod
    def of(cls, language_model: Any) -> NextWords | None:
        """None where it has no such parts, or the second is trained: then records need a layout."""
        head, backbone = language_model.get_output_embeddings(), language_model.base_model
        if head is None or backbone is language_model:
            return None
        if any(parameter.requires_grad for parameter in head.parameters()):
            return None
        return cls(backbone, head, int(head.weight.shape[0]))

    def hidden(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(n, length, width) of `ids` and `mask` (n, length)."""
        states: torch.Tensor = self.backbone(input_ids=ids, attention_mask=(mask > 0).long())[0]
        return states

    @torch.no_grad()
    def gives(self, ids: torch.Tensor, mask: torch.Tensor, scores: torch.Tensor) -> bool:
        """Whether the parts give `scores` (n, length, words): some scale or cap them besides."""
        found = self.head(self.hidden(ids, mask))
        if found.shape != scores.shape:
            return False
        return bool((found - scores).abs().max() <= _SAME * scores.abs().max())

    def losses(self, batch: Batch, counted: torch.Tensor) -> torch.Tensor:
        """(n, length - 1) float32 cross entropy of each next word, 0 where it is not `counted`."""
        hidden, places = self.hidden(batch.ids, batch.mask), self._chunks(batch, counted)
        losses: torch.Tensor = _Scored.apply(  # type: ignore[no-untyped-call]
            hidden[:, :-1].flatten(0, 1), batch.ids[:, 1:].flatten(), self.head, list(places)
        )
        return torch.where(counted, losses.reshape(counted.shape), 0.0)

    def _chunks(self, batch: Batch, counted: torch.Tensor) -> Iterator[torch.Tensor]:
        """Places in the flat (n · (length - 1)) that are scored together."""
        most = max(1, CHUNK[counted.device.type] // (4 * self.words))
        if not batch.fixed:
            yield from torch.split(counted.flatten().nonzero().flatten(), most)
            return
        records, length = counted.shape
        every = torch.arange(counted.numel(), device=counted.device).reshape(records, length)
        columns = max(1, most // records)
        for start in range(0, length, columns):
            if bool(counted[:, start : start + columns].any()):
                yield every[:, start : start + columns].flatten()


class _Scored(torch.autograd.Function):
    """(places,) losses of (places, width) hidden states; those of no chunk are 0."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        words: torch.Tensor,
        head: nn.Module,
        chunks: list[torch.Tensor],
    ) -> torch.Tensor:
        losses = torch.zeros(len(hidden), dtype=torch.float32, device=hidden.device)
        needed = ctx.needs_input_grad[0]
        gradient = torch.zeros_like(hidden) if needed else None
        for places in chunks:
            with torch.set_grad_enabled(needed):
                part = hidden[places].detach().requires_grad_(needed)
                scores = head(part).float()
                each = functional.cross_entropy(scores, words[places], reduction="none")
                total = each.sum()
            losses[places] = each.detach()
            if gradient is not None:
                with torch.autocast(hidden.device.type, enabled=False):
                    (gradient[places],) = torch.autograd.grad(total, part)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (gradient,), (factors,) = ctx.saved_tensors, outer
        each = factors[:, None].to(gradient.dtype)
        return torch.where(each == 0, each, gradient * each), None, None, None
