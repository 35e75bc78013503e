"""Which records of a private step go through the model together: those that do not notice it.

A record's own shape is that of `RECORDS` others as wide (`common.model.shapes`), and gives what a
clip bounds. Whether it gives the same bits in another shape, of more records as wide or of just as
many as there are, is tried on records of nobody's, with values of nobody's; where it doesn't, its
own shape it is, filled up. So it is in a precision that rounds most differences away: GPT-Neo's
attention adds up otherwise for one record, and 64 tries in bfloat16 did not show it. Widths do not
mix: no try says what padding adds under a coordinator's values (`common.model.shapes`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from fedlora.client.training.sampling import Ints, MicroBatch
from fedlora.common.model.network import AdapterModel
from fedlora.common.model.shapes import Shape, padded, shaped
from fedlora.common.tasks.batch import Encoded

# Of one width that are computed together, as far as a micro-batch's tokens go; and the most, where
# they keep their bits. On a GPU the first are as many already.
RECORDS = {"cpu": 4, "cuda": 512}
MOST = {"cpu": 16, "cuda": 512}
REPAID = 2  # records that another shape must save something for, for each that is tried
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
        self._seen: dict[object, bytes] = {}

    def batches(self, lengths: Ints, tokens: int) -> Iterator[tuple[Ints, Shape]]:
        """Places of `lengths`, each once, in batches of fixed shapes of at most `tokens`."""
        device, values = self.model.device.type, self.model.spec.size

        def records(length: int, full: bool, left: int) -> int:
            fewest, *larger = sizes_of(device, tokens, length, values)
            own = Shape(fewest, length, full)
            if self.records(own) < fewest:
                return 1
            if self.model.precision != torch.float32:
                return fewest
            fitting = [size for size in larger[::-1] if left > size - fewest]
            if device == "cpu":  # a GPU's batch costs its launches, hardly what it holds
                exact = _even(left, (fewest, *larger)[-1])
                fitting = [exact, *(size for size in fitting if size != exact)]  # each asks once
            chosen = (size for size in fitting if size == fewest or self._keeps(own, size))
            return next(chosen, fewest)

        return shaped(lengths, padded(lengths, self.model.longest, device), records)

    def records(self, shape: Shape) -> int:
        """The shape's records together, where each then gets the same bits in any place."""
        if self.alone or self.model.shapes.apart or shape.records <= 1:
            return 1
        return shape.records if self._given(shape) else 1

    def _keeps(self, own: Shape, size: int) -> bool:
        """Whether a record gives among `size` what it gives in its own shape."""
        other = replace(own, records=size)
        saved = own.records - (size if size < own.records else 0)  # by fewer batches, or rows
        return self.model.shapes.keeps(
            (own.records, self._kind(other)),
            saved,
            REPAID * 2 * size,
            lambda: self._given(other) == self._given(own),
        )

    def _given(self, shape: Shape) -> bytes:
        """What one record gives in every place and beside others; b"" where it is not one thing."""
        key = (self._kind(shape), torch.get_num_threads())
        if key not in self._seen:
            rows = np.arange(shape.records)
            batch = MicroBatch(rows, rows, False, (shape.records, shape.tokens))
            # drawn for the largest, so that it is the same record in each
            most = MOST[self.model.device.type]
            one = self.model.tried(shape, lambda nobodys: self._rows(nobodys, batch), most)
            self._seen[key] = b"" if one is None else _digest(one)
        return self._seen[key]

    def _kind(self, shape: Shape) -> tuple[object, ...]:
        return ("gradient", self.model.precision, self.model.attention, shape)


def _even(left: int, most: int) -> int:
    """Records of the next batch, where `left` go into as few as can be, about as many in each."""
    batches = -(-left // most)
    return -(-left // batches)


def _digest(outputs: Sequence[torch.Tensor]) -> bytes:
    """Of a row; 0 and -0 are the same."""
    digest = hashlib.sha256()
    for each in outputs:
        digest.update((each.double() + 0.0).cpu().contiguous().numpy().tobytes())
    return digest.digest()
