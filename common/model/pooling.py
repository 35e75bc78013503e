"""How hidden states become one vector a record, and the classifier on top of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from fedlora.common.model.inputs import Inputs
from fedlora.common.model.projection import Affine, Projection

# What the difference of two means of length 1, their product and their cosine weigh beside one
# another. A cosine is in reach of a linear head of the product, and seldom got by one under noise:
# docs/results.md, "Pairs".
DIFFERENCE, COSINE = 4.0, 3.0


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

    def words(self, hidden: Sequence[torch.Tensor]) -> torch.Tensor:
        """(n, length, layers · width) float32: each token's own, not a mean over any."""
        states = [functional.normalize(hidden[layer].float(), dim=2) for layer in self.layers]
        return torch.cat(states, dim=2)

    def compared(self, means: torch.Tensor) -> torch.Tensor:
        """(n, 2 · width) rows of length 1, of (2 n, width) `means`, two for each record.

        How much the two differ and how far they agree, by coordinate (Conneau et al. 2017; Reimers
        and Gurevych 2019). The product is stretched along its mean, so that two records' rows are
        as alike as if their cosine stood beside it: a width that is not a multiple of a machine's
        own, which one number more would make, rounds by a row's place.
        """
        width = means.shape[1]
        pairs = functional.normalize(means, dim=1).reshape(-1, 2, width)
        one, other = pairs[:, 0], pairs[:, 1]
        product = one * other
        stretch = ((1 + COSINE**2) ** 0.5 - 1) * product.mean(dim=1, keepdim=True)
        parts = [DIFFERENCE * (one - other).abs(), width**0.5 * (product + stretch)]
        return functional.normalize(torch.cat(parts, dim=1), dim=1)

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

    def __init__(
        self,
        backbone: nn.Module,
        pooling: Pooling,
        head: nn.Module,
        inputs: Inputs,
        by_word: bool = False,
        pairs: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.inputs = inputs
        self.by_word = by_word
        self.pairs = pairs
        self.pooling = pooling
        self.head = head

    def pooled(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(n, features) float32 before any projection; `ids` and `mask` are (n, length).

        Where each token is read by itself, (n, length, features). Of pairs each half of a row is a
        text of its own.
        """
        if self.pairs:
            half = ids.shape[1] // 2
            ids, mask = (each[:, : 2 * half].reshape(-1, half) for each in (ids, mask.clamp(max=1)))
        given = self.inputs.read(ids, mask)
        hidden = self.backbone(**given, output_hidden_states=True).hidden_states
        if self.by_word:
            return self.pooling.words(hidden)
        real = given.get("attention_mask")  # without one, no place is padding
        means = self.pooling.means(
            hidden, ids.new_ones(hidden[-1].shape[:2]) if real is None else real
        )
        return self.pooling.compared(means) if self.pairs else means

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(n, labels) or (n, length, labels) logits of `ids` and `mask` (n, length).

        The head computes outside autocast.
        """
        features = self.pooling.features(self.pooled(ids, mask))
        with torch.autocast(features.device.type, enabled=False):
            logits: torch.Tensor = self.head(features)
        return logits


class OwnHead(nn.Module):
    """A transformers model with its own head: sequence classification or language modelling.

    A decoder's classifier scores every word of a text. The last one counts, by the mask:
    transformers goes by the padding's id, which may be a word's.
    """

    def __init__(
        self, model: nn.Module, inputs: Inputs, classifier: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.backbone = model
        self.inputs = inputs
        self.by_word = False  # as the last pass was
        self._scores: list[torch.Tensor] = []
        if classifier is not None:
            classifier.register_forward_hook(lambda _, inputs, output: self._scores.append(output))

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Logits of (n, tokens) ids: (n, classes), or a language model's (n, tokens, words)."""
        self._scores.clear()
        logits: torch.Tensor = self.backbone(**self.inputs.read(ids, mask)).logits
        scores = self._scores.pop() if self._scores else logits
        self.by_word = scores is not logits and scores.ndim == 3
        if not self.by_word:
            return logits
        return scores[torch.arange(len(ids), device=ids.device), (mask > 0).sum(dim=1) - 1]


class Translator(OwnHead):
    """A base that reads a text and writes another, with its own scores of words.

    Both texts of a record are in one row, and so are the scores: those at a place are of the next
    word, from the last one of the first text on.
    """

    def __init__(self, model: nn.Module, inputs: Inputs, start: int) -> None:
        super().__init__(model, inputs)
        self._start = start  # the word that an answer begins with

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(n, tokens, words) of `ids` and `mask` (n, tokens), in which 2 is the second text."""
        places = torch.arange(ids.shape[1], device=ids.device)[None, :]
        source, lengths = (mask == 1).long(), (mask == 1).sum(dim=1, keepdim=True)
        given = (places + lengths - 1).clamp(max=ids.shape[1] - 1)  # the word before each answer's
        words = ids.gather(1, given.clamp(min=0))
        words = torch.where(places == 0, self._start, words)
        answered = (mask == 2).sum(dim=1, keepdim=True)
        scores: torch.Tensor = self.backbone(
            input_ids=ids,
            attention_mask=source,
            decoder_input_ids=words,
            decoder_attention_mask=(places < answered.clamp(min=1)).long(),
        ).logits
        rows = (places - lengths + 1).clamp(min=0)
        return scores.gather(1, rows[:, :, None].expand(-1, -1, scores.shape[2]))


def build_head(width: int, hidden: int, classes: int) -> nn.Sequential:
    """Linear, or linear - GELU - linear."""
    if not hidden:
        return nn.Sequential(nn.Linear(width, classes))
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, classes))
