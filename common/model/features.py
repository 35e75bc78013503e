"""What a head sees of each record while all below it stands still: computed once, in memory.

A row of features for each record, or for each of its words that has a target (`Encoded.scored`).

Pooled features are as private as the text they come from: they live in this process only, never on
a disk. They stay valid as long as the LoRA coordinates of the state do not change, which is what
the key checks.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from fedlora.common.data.free_memory import shown
from fedlora.common.data.records import UnitIndex
from fedlora.common.errors import BadInput
from fedlora.common.model.elementwise import Watch, by_record
from fedlora.common.model.machine import available
from fedlora.common.model.network import AdapterModel
from fedlora.common.model.shapes import Shape, alike, padded, shaped
from fedlora.common.model.state import AdapterState
from fedlora.common.tasks.batch import IGNORED, Batch, Encoded

FEATURE_TOKENS = {"cpu": 1024, "cuda": 16384}  # padded tokens of a forward pass without gradients
FEATURE_ROWS = 64  # that are projected together
Rows = npt.NDArray[np.int64]
Progress = Callable[[int], None]  # called with the number of records done since the last call


class PooledTexts:
    """What one frozen transformer made of each text, for the runs of one process that ask again.

    By content, so that runs which deal the same texts out differently share them: the trials of a
    sweep, and the private run of a quickstart beside the one without privacy.
    """

    def __init__(self) -> None:
        self._model = ""
        # by digest of the tokens: rows of the table of its call
        self._kept: dict[bytes, torch.Tensor] = {}

    def get(
        self, model: str, data: Encoded, rows: Rows, compute: Callable[[Rows], torch.Tensor]
    ) -> torch.Tensor:
        """(scored, width): kept where `model` saw the text before, else computed and kept."""
        if model != self._model:
            self._kept.clear()
            self._model = model
        digests = [_digest(data, int(row)) for row in rows]
        fresh = np.array(
            [place for place, digest in enumerate(digests) if digest not in self._kept],
            dtype=np.int64,
        )
        if len(fresh):
            sizes = np.diff(data.scored(rows[fresh]).offsets).tolist()
            parts = torch.split(compute(rows[fresh]), sizes)
            self._kept.update(zip([digests[place] for place in fresh], parts, strict=True))
        return (
            torch.cat([self._kept[digest] for digest in digests]) if digests else torch.empty(0, 0)
        )


class FeatureCache:
    """Features by owner, least recently used first out once `limit_bytes` are passed."""

    def __init__(
        self,
        model: AdapterModel,
        limit_bytes: int = 6 << 30,
        progress: Progress | None = None,
        texts: PooledTexts | None = None,
    ) -> None:
        self._model = model
        self._limit = limit_bytes
        self._progress = progress
        self._texts = texts
        self._below = ""
        self._kept: OrderedDict[str, torch.Tensor] = OrderedDict()

    def get(self, owner: str, data: Encoded, rows: Rows, state: AdapterState) -> torch.Tensor:
        """(scored, width) float32 features of `rows`, under the LoRA coordinates of `state`."""
        self._forget_unless(_below_head(state))
        if owner not in self._kept:
            self._model.load(state)
            self._kept[owner] = pooled_features(
                self._model, data, rows, self._progress, self._texts
            )
            self._shrink()
        self._kept.move_to_end(owner)
        return self._kept[owner]

    def check_room(self, example: Encoded, sizes: Sequence[int]) -> None:
        """BadInput where the features of owners with so many rows each are more than is free.

        How wide a row is, the first record of `example` shows.
        """
        pooled = _pooled(self._model, example, np.zeros(1, dtype=np.int64), None).shape[1]
        projection = self._model.projection
        kept = pooled if projection is None else projection.width
        _check_room(max(sizes), pooled, self._model.device)
        _check_room(min(sum(sizes), self._limit // (4 * kept)), kept, self._model.device)

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
    model: AdapterModel,
    data: Encoded,
    rows: Rows,
    progress: Progress | None = None,
    texts: PooledTexts | None = None,
) -> torch.Tensor:
    """(scored, width) float32, in the order of `rows`, under the state that the model holds."""
    if not len(rows):
        return torch.empty(0, 0)
    if texts is None:
        return _projected(model, _pooled(model, data, rows, progress))
    arithmetic = f"{model.precision} {model.attention}"
    frozen = f"{model.base_digest} {model.pooled_layers} {arithmetic} {_below_head(model.state())}"
    pooled = texts.get(frozen, data, rows, lambda fresh: _pooled(model, data, fresh, progress))
    return _projected(model, pooled)


def _pooled(
    model: AdapterModel, data: Encoded, rows: Rows, progress: Progress | None
) -> torch.Tensor:
    """Forward passes in batches of fixed shapes: what comes of a record depends on it alone."""
    result: torch.Tensor | None = None
    offsets = data.scored(rows).offsets
    places = UnitIndex(offsets, np.arange(offsets[-1]))
    lengths = padded(data.lengths[rows], model.longest, model.device.type)
    for chosen, shape in shaped(data.lengths[rows], lengths, partial(_records, model)):
        part = _seen(model, data, rows[chosen], shape)
        if result is None:
            size = len(places.records), part.shape[1]
            _check_room(*size, model.device)
            result = torch.empty(size, dtype=torch.float32, device=model.device)
        result[torch.from_numpy(places.take(chosen).records)] = part
        if progress is not None:
            progress(len(chosen))
    return torch.empty(0, 0) if result is None else result


def _check_room(rows: int, width: int, device: torch.device) -> None:
    """BadInput where so many features are more than is free: a process that is killed says less."""
    free, needed = available(device), 4 * rows * width
    if free is not None and needed > free:
        raise BadInput(
            f"[training] head_rounds: {rows} rows of {width} features take {shown(needed)}, found"
            f" {shown(free)} free; fewer [model] pooled_layers take less"
        )


def _seen(model: AdapterModel, data: Encoded, rows: Rows, shape: Shape) -> torch.Tensor:
    """(scored, width): of a pass, what a head answers."""
    batch = _batch(model, data, rows, shape)
    found = _given(model, batch)
    return found[batch.targets != IGNORED] if data.by_token else found[: len(rows)]


def _batch(model: AdapterModel, data: Encoded, rows: Rows, shape: Shape) -> Batch:
    return data.batch(rows, model.pad, model.device, (shape.records, shape.tokens))


def _records(model: AdapterModel, tokens: int, full: bool, _: int) -> int:
    """Records of a forward pass, by their length."""
    shape = Shape(FEATURE_TOKENS[model.device.type] // tokens, tokens, full)

    def give(nobodys: Encoded) -> list[torch.Tensor]:
        every = np.arange(shape.records, dtype=np.int64)
        return [_given(model, _batch(model, nobodys, every, shape))]

    return model.shapes.records(
        ("pooled", model.precision, model.attention, shape),
        shape.records,
        lambda: model.tried(shape, give) is not None,
    )


def _given(model: AdapterModel, batch: Batch) -> torch.Tensor:
    """What the model pools of a batch, no record beside another in a kernel that goes by place."""
    with by_record(len(batch.ids), model.device):
        return model.pooled(batch)


def _projected(model: AdapterModel, pooled: torch.Tensor) -> torch.Tensor:
    """What the head sees of each row, in blocks of one size, for the same reason."""
    if model.projection is None or not len(pooled):
        return model.features(pooled)

    def block(part: torch.Tensor, rows: int) -> torch.Tensor:
        filled = torch.cat([part, part[:1].expand(rows - len(part), -1)])
        return project(filled)[: len(part)]

    def project(filled: torch.Tensor) -> torch.Tensor:
        with by_record(len(filled), model.device):
            return model.features(filled)

    def try_it() -> bool:
        rows = (
            np.random.default_rng(0)
            .normal(0, 1, (FEATURE_ROWS, pooled.shape[1]))
            .astype(np.float32)
        )
        beside = torch.from_numpy(rows).to(pooled.device)
        same = beside[:1].expand(FEATURE_ROWS, -1).contiguous()
        with model.probed(), Watch(FEATURE_ROWS) as watch:
            return alike([project(same)], [project(beside)]) and not watch.beside

    kind = ("projected", model.projection.shapes)
    rows = model.shapes.records(kind, FEATURE_ROWS, try_it)
    starts = range(0, len(pooled), rows)
    return torch.cat([block(pooled[start : start + rows], rows) for start in starts])


def length_batches(lengths: Rows, tokens: int) -> list[Rows]:
    """Positions sorted by length and cut: a batch holds at most `tokens` padded tokens."""
    order = np.argsort(lengths, kind="stable")
    batches, start = [], 0
    for stop in range(1, len(order) + 1):
        if stop == len(order) or lengths[order[stop]] * (stop + 1 - start) > tokens:
            batches.append(order[start:stop])
            start = stop
    return batches


def _digest(data: Encoded, row: int) -> bytes:
    return hashlib.blake2b(data.content(row), digest_size=16).digest()


def _below_head(state: AdapterState) -> str:
    """Digest of the LoRA coordinates; "" where they change nothing."""
    if not state.moves_base:
        return ""
    return hashlib.sha256(state.vector[~state.spec.head_mask()].tobytes()).hexdigest()
