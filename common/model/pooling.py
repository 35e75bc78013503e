"""How hidden states become one vector a record, and the classifier on top of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from fedlora.common.model.projection import Affine, Projection


@dataclass(eq=False)
class Pooling:
    """Mean over real tokens of the hidden states `layers` (0 is the embeddings).

    Each is L2-normalised and concatenated; projected and normalised again where there is a
    projection; multiplied by `scale`.
    """

    layers: tuple[int, ...]
    scale: float
    projection: Projection | None = None

    def means(self, hidden: Sequence[torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
        """(n, layers · width) float32 from the model's hidden states, each (n, length, width)."""
        weights = mask[:, :, None].float()
        total = weights.sum(dim=1)
        means = [(hidden[layer].float() * weights).sum(dim=1) / total for layer in self.layers]
        return torch.cat([functional.normalize(mean, dim=1) for mean in means], dim=1)

    def features(self, means: torch.Tensor) -> torch.Tensor:
        """What the head receives for `means`."""
        rows = means if self.projection is None else _projected(means, self.projection)
        return rows * self.scale


def _projected(features: torch.Tensor, projection: Projection) -> torch.Tensor:
    """(n, projection.width) rows of length 1."""
    rows = functional.normalize(_affine(features, projection.whiten), dim=1)
    if projection.kernel is None:
        return rows
    landmarks = torch.from_numpy(projection.kernel.landmarks).to(rows.device)
    similar = torch.exp(projection.kernel.gamma * (rows @ landmarks.T - 1.0))
    return functional.normalize(_affine(similar, projection.kernel.affine), dim=1)


def _affine(rows: torch.Tensor, affine: Affine) -> torch.Tensor:
    matrix, shift = (
        torch.from_numpy(part).to(rows.device) for part in (affine.matrix, affine.shift)
    )
    return rows @ matrix - shift


class PooledClassifier(nn.Module):
    """A backbone, pooled hidden states, and a head: a linear layer, or two with a GELU between."""

    def __init__(self, backbone: nn.Module, pooling: Pooling, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.pooling = pooling
        self.head = head

    def pooled(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(n, features) float32 before any projection; `ids` and `mask` are (n, length)."""
        output = self.backbone(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        return self.pooling.means(output.hidden_states, mask)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(n, labels) logits of `ids` and `mask` (n, length); the head outside autocast."""
        features = self.pooling.features(self.pooled(ids, mask))
        with torch.autocast(features.device.type, enabled=False):
            logits: torch.Tensor = self.head(features)
        return logits


class OwnHead(nn.Module):
    """A transformers model with its own head: sequence classification or language modelling.

    A decoder's classifier scores every word of a text. The last one counts, by the mask:
    transformers goes by the padding's id, which may be a word's.
    """

    def __init__(self, model: nn.Module, classifier: nn.Module | None = None) -> None:
        super().__init__()
        self.backbone = model
        self.by_word = False  # as the last pass was
        self._scores: list[torch.Tensor] = []
        if classifier is not None:
            classifier.register_forward_hook(lambda _, inputs, output: self._scores.append(output))

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Logits of (n, tokens) ids: (n, classes), or a language model's (n, tokens, words)."""
        self._scores.clear()
        logits: torch.Tensor = self.backbone(input_ids=ids, attention_mask=mask).logits
        scores = self._scores.pop() if self._scores else logits
        self.by_word = scores is not logits and scores.ndim == 3
        if not self.by_word:
            return logits
        return scores[torch.arange(len(ids), device=ids.device), mask.sum(dim=1) - 1]


def build_head(width: int, hidden: int, classes: int) -> nn.Sequential:
    """Linear, or linear - GELU - linear."""
    if not hidden:
        return nn.Sequential(nn.Linear(width, classes))
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, classes))
