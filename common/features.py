"""What a head sees of each record while everything below it stands still, computed once and kept in memory.

Pooled features are as private as the text they come from: they live in this process only, never on a disk.
They stay valid as long as the LoRA coordinates of the state do not change, which is what the key checks.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from fedlora.common.model import AdapterModel
from fedlora.common.state import AdapterState
from fedlora.common.tasks import Encoded

FEATURE_TOKENS = 8192  # padded tokens of a forward pass without gradients
Progress = Callable[[int], None]  # called with the number of records done since the last call


class FeatureCache:
    """Pooled features by owner, least recently used first out once `limit_bytes` are passed."""

    def __init__(
        self, model: AdapterModel, limit_bytes: int = 6 << 30, progress: Progress | None = None
    ) -> None:
        self._model = model
        self._limit = limit_bytes
        self._progress = progress
        self._below = ""
        self._kept: OrderedDict[str, torch.Tensor] = OrderedDict()

    def get(
        self, owner: str, data: Encoded, rows: npt.NDArray[np.int64], state: AdapterState
    ) -> torch.Tensor:
        """(len(rows), width) float32 features of `rows`, under the LoRA coordinates of `state`."""
        self._forget_unless(_below_head(state))
        if owner not in self._kept:
            self._model.load(state)
            self._kept[owner] = pooled_features(self._model, data, rows, self._progress)
            self._shrink()
        self._kept.move_to_end(owner)
        return self._kept[owner]

    def clear(self) -> None:
        """Give the memory back: the head phase is over."""
        self._kept.clear()

    def _forget_unless(self, below: str) -> None:
        if below != self._below:
            self._kept.clear()
            self._below = below

    def _shrink(self) -> None:
        while len(self._kept) > 1 and sum(t.nbytes for t in self._kept.values()) > self._limit:
            self._kept.popitem(last=False)


def pooled_features(
    model: AdapterModel, data: Encoded, rows: npt.NDArray[np.int64], progress: Progress | None = None
) -> torch.Tensor:
    """(len(rows), width) float32, in the order of `rows`; computed in batches of similar length."""
    lengths = data.lengths[rows]
    result: torch.Tensor | None = None
    for chosen in length_batches(lengths, FEATURE_TOKENS):
        part = model.features(data.batch(rows[chosen], model.pad, model.device))
        if result is None:
            result = torch.empty(len(rows), part.shape[1], dtype=torch.float32, device=model.device)
        result[torch.from_numpy(chosen)] = part
        if progress is not None:
            progress(len(chosen))
    return torch.empty(0, 0) if result is None else result


def length_batches(lengths: npt.NDArray[np.int64], tokens: int) -> list[npt.NDArray[np.int64]]:
    """Positions sorted by length and cut so that each batch holds at most `tokens` padded tokens."""
    order = np.argsort(lengths, kind="stable")
    batches, start = [], 0
    for stop in range(1, len(order) + 1):
        if stop == len(order) or lengths[order[stop]] * (stop + 1 - start) > tokens:
            batches.append(order[start:stop])
            start = stop
    return batches


def _below_head(state: AdapterState) -> str:
    return hashlib.sha256(state.vector[~state.spec.head_mask()].tobytes()).hexdigest()
