"""How much memory a step will take at its peak, before it is made.

    activations   what autograd keeps, counted on texts of nobody's of three lengths: a part that
                  is there once (matrices that autocast narrowed), one that grows with a record's
                  tokens, and one with their square (attention), these two times a micro-batch's
                  records; twice the largest tensor on top, for what is computed and not kept;
                  and `ALLOCATOR` times the whole
    gradients     float32 of each record of a micro-batch, the largest matrix once more in float64,
                  and six float64 vectors of the adapter: sum, noise, optimiser
    scores        of words: `SCORES` times a chunk of them (`common.model.next_words`)

What the process holds already, its libraries and the weights, is measured and not estimated.
"""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fedlora.client.training.company import sizes_of
from fedlora.common.data.free_memory import shown
from fedlora.common.errors import BadInput
from fedlora.common.model.machine import available, held
from fedlora.common.model.network import AdapterModel
from fedlora.common.model.next_words import CHUNK
from fedlora.common.model.pooling import PooledClassifier
from fedlora.common.model.shapes import BUCKETS

LENGTHS = (16, 32, 48)  # tokens of the texts that are counted
ALLOCATOR = 1.25  # what was measured on CPUs beside what is kept: gradients on the way, freed parts
SCORES = 4  # scores, their logarithms, and the gradients of both
VECTORS = 6


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a step, by what they are for; `held` is there before it."""

    weights: int
    held: int  # by the process, weights included; on a GPU, on it
    activations: int
    gradients: int
    scores: int

    @property
    def step(self) -> int:
        """What a step adds to what is held."""
        return self.activations + self.gradients + self.scores

    @property
    def peak(self) -> int:
        """Of the process, or on the GPU."""
        return self.held + self.step


@dataclass(frozen=True)
class Activations:
    """Bytes that autograd keeps: `once`, whatever the records, and of each record `linear` a token
    and `square` a pair of tokens; `largest` a token is of the largest tensor.
    """

    once: float
    linear: float
    square: float
    largest: float

    @classmethod
    def of(cls, model: AdapterModel) -> Activations:
        """Counted on one record of each of `LENGTHS`, shorter where the model reads less.

        Where all records have one length, on that: then what is there once counts for each.
        """
        if model.inputs.one_length:
            peak, widest = _kept(model, model.longest)
            return cls(0.0, peak / model.longest, 0.0, widest / model.longest)
        longest = max(3, min(LENGTHS[-1], model.longest))
        lengths = [longest * length // LENGTHS[-1] for length in LENGTHS]
        kept = [_kept(model, length) for length in lengths]
        square, linear, once = np.polyfit(lengths, [peak for peak, _ in kept], 2)
        if square < 0:
            square, (linear, once) = 0.0, np.polyfit(lengths, [peak for peak, _ in kept], 1)
        return cls(max(0.0, float(once)), float(linear), float(square), kept[-1][1] / lengths[-1])

    def bytes(self, records: int, tokens: int) -> int:
        """Of a micro-batch, with what an allocator needs beside it."""
        record = self.linear * tokens + self.square * tokens**2 + 2 * self.largest * tokens
        return int(ALLOCATOR * (self.once + records * record))


def memory_of_step(
    model: AdapterModel,
    tokens: int,
    longest: int,
    packed: bool,
    private: bool = True,
    kept: Activations | None = None,
) -> Memory:
    """The most that a micro-batch of up to `tokens` takes, of records of up to `longest`.

    `kept` is the model's, counted before; None: counted here.
    """
    kept, device = kept or Activations.of(model), model.device.type
    longest = min(model.longest, longest // BUCKETS[device] * BUCKETS[device] + BUCKETS[device])

    def records(length: int) -> int:
        if packed or not private:
            return max(1, tokens // length)
        return max(sizes_of(device, tokens, length, model.spec.size))

    lengths = [*range(BUCKETS[device], longest, BUCKETS[device]), longest]
    most = max(lengths, key=lambda length: kept.bytes(records(length), length))
    together = max(records(length) for length in lengths if 2 * length >= longest)
    sizes = [parameter.numel() for parameter in model.parameters.values()]
    samples = together * (4 * sum(sizes) + 16 * max(sizes)) if private else 4 * sum(sizes)
    scores = 0
    if model.next_words is not None:
        places = records(most) * most
        scores = SCORES * min(CHUNK[device], 4 * model.next_words.words * places)
    return Memory(
        weights=sum(each.nbytes for each in model.network.parameters()),
        held=held(model.device),
        activations=kept.bytes(records(most), most),
        gradients=samples + 8 * VECTORS * sum(sizes),
        scores=scores,
    )


def check_fits(
    model: AdapterModel,
    tokens: int,
    longest: int,
    packed: bool,
    private: bool = True,
    section: str = "[training]",
) -> Memory:
    """The memory of a step; BadInput where the machine has not that much, with what to change.

    `section`: where a configuration or a policy says how many tokens a micro-batch has.
    """
    kept = Activations.of(model)
    needed = memory_of_step(model, tokens, longest, packed, private, kept)
    free = available(model.device)
    if free is None or needed.step <= free:
        return needed
    smaller = tokens
    while smaller > 1:
        smaller //= 2
        if memory_of_step(model, smaller, longest, packed, private, kept).step <= free:
            advice = f"micro_batch_tokens = {smaller} fits"
            break
    else:
        advice = "checkpointing = true or a shorter [model] max_length may fit"
    raise BadInput(
        f"{section} micro_batch_tokens = {tokens}: a step needs about {shown(needed.step)} beside"
        f" the {shown(needed.held)} that are held, found {shown(free)} free; {advice}"
    )


def _kept(model: AdapterModel, length: int) -> tuple[int, int]:
    """Bytes that a pass over one text keeps at its peak, and those of the largest tensor."""
    lengths, network = np.array([length]), model.network
    nobodys = model.inputs.nobodys(model.task, lengths, np.random.default_rng(0))
    batch = nobodys.batch(np.zeros(1, dtype=np.int64), model.pad, model.device)
    ids, mask = batch.ids, batch.mask
    ledger = _Kept({each.untyped_storage().data_ptr() for each in network.parameters()})
    with ledger.counting(), model.autocast():
        if model.next_words is not None:
            result = model.next_words.hidden(ids, mask)
        elif isinstance(network, PooledClassifier):
            result = network.pooled(ids, mask)
        else:
            result = network(ids, mask)
        with warnings.catch_warnings():  # of hooks on modules whose inputs are frozen
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            result.float().square().sum().backward()  # type: ignore[no-untyped-call]
    for parameter in model.parameters.values():
        parameter.grad = None
        parameter.grad_sample = None  # type: ignore[attr-defined]
    return ledger.peak, ledger.largest


class _Kept:
    """Counts the storages that autograd keeps, each once, for as long as it keeps them."""

    def __init__(self, known: set[int]) -> None:
        self._known, self._users = known, Counter[int]()
        self._now = self.peak = self.largest = 0

    def counting(self) -> Any:
        """A context: what is kept in it is counted."""
        return torch.autograd.graph.saved_tensors_hooks(self._keep, lambda each: each.tensor)

    def _keep(self, tensor: torch.Tensor) -> _One:
        return _One(self, tensor)

    def add(self, storage: int, size: int) -> None:
        """One more that holds a storage."""
        self._users[storage] += 1
        if self._users[storage] == 1 and storage not in self._known:
            self._now += size
            self.peak, self.largest = max(self.peak, self._now), max(self.largest, size)

    def drop(self, storage: int, size: int) -> None:
        """One less."""
        self._users[storage] -= 1
        if self._users[storage] == 0 and storage not in self._known:
            self._now -= size


class _One:
    """A kept tensor; forgotten with it."""

    def __init__(self, ledger: _Kept, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        self.tensor, self._ledger = tensor, ledger
        self._key, self._size = storage.data_ptr(), storage.nbytes()
        ledger.add(self._key, self._size)

    def __del__(self) -> None:
        self._ledger.drop(self._key, self._size)
