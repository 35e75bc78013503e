"""Which records of a private step go through the model together: those that do not notice it.

A record's own shape is that of `RECORDS` others as wide (`common.model.shapes`), and gives what a
clip bounds. Whether it gives the same bits in a larger shape, of more records as wide, is tried on
records of nobody's, with values of nobody's; where it doesn't, its own shape it is. Widths do not
mix: no try says what padding adds under a coordinator's values (`common.model.shapes`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial

import numpy as np
import torch

from fedlora.client.training.sampling import Ints, MicroBatch
from fedlora.common.model.network import AdapterModel
from fedlora.common.model.shapes import BUCKETS, Shape, alike, padded, probes, shaped
from fedlora.common.tasks.batch import Encoded

# Of one width that are computed together, as far as a micro-batch's tokens go; and the most, where
# they keep their bits. On a GPU the first are as many already.
RECORDS = {"cpu": 4, "cuda": 512}
MOST = {"cpu": 16, "cuda": 512}
WIDTHS = 16  # that a larger shape is tried with, as company
REPAID = 2  # records that a larger shape must save something for, for each that is tried
VALUES = 1 << 26  # of gradients that larger shapes may hold
# (n, …) of a batch's records: all that may not depend on what else is in it
Rows = Callable[[Encoded, MicroBatch], Sequence[torch.Tensor]]


def sizes_of(device: str, tokens: int, length: int, values: int) -> list[int]:
    """Records that may go together, fewest first, where each has `length` tokens and `values`."""
    fewest = min(RECORDS[device], max(1, tokens // length))
    sizes, most = [fewest], min(MOST[device], tokens // length, VALUES // max(1, values))
    while 2 * sizes[-1] <= most:
        sizes.append(2 * sizes[-1])
    return sizes


class Company:
    """Tries one model. `alone`: its records go one by one, whatever is tried."""

    def __init__(self, model: AdapterModel, rows: Rows) -> None:
        self.model = model
        self.alone = False
        self._rows = rows
        self._own: dict[object, bytes] = {}

    def batches(self, lengths: Ints, tokens: int) -> Iterator[tuple[Ints, Shape]]:
        """Places of `lengths`, each once, in batches of fixed shapes of at most `tokens`."""
        device, values = self.model.device.type, self.model.spec.size

        def records(length: int, full: bool) -> int:
            fewest, *_ = sizes_of(device, tokens, length, values)
            return self.records(Shape(fewest, length, full))

        def sizes(length: int) -> list[int]:
            return [] if self.alone else sizes_of(device, tokens, length, values)[::-1]

        keeping = partial(self.keeping, tokens=tokens)
        return shaped(lengths, padded(lengths, self.model.longest, device), records, sizes, keeping)

    def records(self, shape: Shape) -> int:
        """The shape's records together, where each then gets the same bits in any place."""
        if self.alone:
            return 1
        model = self.model

        def try_it() -> bool:
            same, beside = (
                self._tried(each, np.arange(shape.records), shape)
                for each in probes(shape, model.inputs, model.task)
            )
            return alike(same, beside)

        return model.shapes.records(self._kind(shape), shape.records, try_it)

    def keeping(self, shape: Shape, asking: int, tokens: int) -> frozenset[int]:
        """Widths whose records give in `shape` what they give in their own, to the last bit."""
        rows = self._arranged(shape)

        def try_it() -> frozenset[int]:
            moved = {
                width
                for widths in rows
                for width, bits in zip(widths.tolist(), self._bits(widths, shape), strict=True)
                if not bits or bits != self._bits_alone(width, shape.full, tokens)
            }
            kept = frozenset(rows.ravel().tolist()) - moved
            return kept if shape.tokens in kept else frozenset()

        kind = ("mixed", tokens, *self._kind(shape))  # a record's own shape follows from `tokens`
        return self.model.shapes.keeping(kind, asking, REPAID * rows.size, try_it)

    def _arranged(self, shape: Shape) -> Ints:
        """(batches, records) widths to try: its own in every place, then each beside others."""
        fitting = [width for width in self._widths if width <= shape.tokens]
        widths = [shape.tokens] if shape.full else fitting[-1 : -WIDTHS - 1 : -1]
        batches = -(-len(widths) // shape.records)
        rows = np.resize(np.array(widths, dtype=np.int64), batches * shape.records)
        own_width = np.full(shape.records, shape.tokens, dtype=np.int64)
        return np.concatenate([own_width, rows]).reshape(-1, shape.records)

    def _bits_alone(self, width: int, full: bool, tokens: int) -> bytes:
        """What a record gives in its own shape."""
        fewest, *_ = sizes_of(self.model.device.type, tokens, width, self.model.spec.size)
        shape = Shape(self.records(Shape(fewest, width, full)), width, full)
        key = (*self._kind(shape), torch.get_num_threads())
        if key not in self._own:
            self._own[key] = self._bits(np.full(shape.records, width), shape)[0]
        return self._own[key]

    def _bits(self, widths: Ints, shape: Shape) -> list[bytes]:
        """Of each of a batch of records that are as long as fits `widths`."""
        data, last = self._nobodys, len(self._widths)
        places = {width: place for place, width in enumerate(self._widths)}
        rows = np.array([last if shape.full else places[each] for each in widths.tolist()])
        found = self._tried(data, rows, shape)
        return [_digest([each[row] for each in found]) for row in range(len(rows))]

    def _tried(self, data: Encoded, rows: Ints, shape: Shape) -> Sequence[torch.Tensor]:
        batch = MicroBatch(rows, np.arange(len(rows)), False, (shape.records, shape.tokens))
        with self.model.probed():
            return self._rows(data, batch)

    def _kind(self, shape: Shape) -> tuple[object, ...]:
        return ("gradient", self.model.precision, self.model.attention, shape)

    @cached_property
    def _widths(self) -> list[int]:
        """All that a record may be filled up to, with one token of padding at least."""
        bucket, longest = BUCKETS[self.model.device.type], self.model.longest
        return [] if self.model.inputs.one_length else [*range(bucket, longest, bucket), longest]

    @cached_property
    def _nobodys(self) -> Encoded:
        """A record for each of these, and one as long as the model is built for."""
        longest = self.model.longest
        lengths = [*(max(1, width - 1) for width in self._widths), longest]
        rng = np.random.default_rng(0)
        return self.model.inputs.nobodys(self.model.task, np.array(lengths), rng)


def _digest(outputs: Sequence[torch.Tensor]) -> bytes:
    """b"" where something is not finite; 0 and -0 are the same."""
    digest = hashlib.sha256()
    for each in outputs:
        if not bool(torch.isfinite(each).all()):
            return b""
        digest.update((each.double() + 0.0).cpu().contiguous().numpy().tobytes())
    return digest.digest()
