"""One private step: per-unit clipped sum, Gaussian noise, public normaliser.

    g = ( Σ_u clip(∇ Σ_{r in u} loss_r) + N(0, s²) ) / expected_units  (Abadi et al. 2016, per unit)

Per-sample gradients are Opacus' `hooks`; norms, clip and sum are float32 outside autocast, noise is
drawn and added in float64 from the operating system's generator. A head of linear layers on cached
features needs no hooks: its per-sample gradient is an outer product, whose norm is a product of
norms (Goodfellow 2015). Both paths are proven equal to a batch-of-one loop in tests/oracles.py.

The L2 sensitivity of the sum to adding or removing one unit is the clip of its group; over groups
the scales obey Σ (C_g / s_g)² = 1 / noise_multiplier².
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fedlora.client.training.company import Company
from fedlora.client.training.hooks import RecordHooks, close, unused
from fedlora.client.training.sampling import MicroBatch, micro_batches, private_batches
from fedlora.common.data.records import UnitIndex
from fedlora.common.errors import BadInput
from fedlora.common.model.elementwise import by_record
from fedlora.common.model.network import AdapterModel
from fedlora.common.model.shapes import Shape, probes
from fedlora.common.model.state import AdapterSpec
from fedlora.common.privacy.accountant import SMALLEST_CLIP, group_scales
from fedlora.common.privacy.randomness import Random, gaussian
from fedlora.common.tasks.batch import Encoded
from fedlora.common.tasks.task import RECORD, WORD


@dataclass(frozen=True, eq=False)
class ClipGroups:
    """L2 bounds of disjoint coordinate groups of the flat vector.

    `group` is (size,) int, `bounds` (groups,). A coordinate of group -1 stands still: nothing of
    it enters a norm or a sum, and it gets no noise.
    """

    group: npt.NDArray[np.int64]
    bounds: tuple[float, ...]

    @classmethod
    def flat(cls, spec: AdapterSpec, clip: float, moves: str = "adapter") -> ClipGroups:
        """One bound for all coordinates that a phase or round of that name moves."""
        group = np.where(spec.moved_by(moves), 0, -1)
        return cls(group.astype(np.int64), (checked_clip(clip),))

    @classmethod
    def split(
        cls, spec: AdapterSpec, clip: float, head_clip: float, moves: str = "adapter"
    ) -> ClipGroups:
        """LoRA coordinates that move clipped to `clip`, head coordinates to `head_clip`."""
        group = np.where(spec.moved_by(moves), spec.head_mask(), -1)
        return cls(group.astype(np.int64), (checked_clip(clip), checked_clip(head_clip)))

    def noise_std(self, noise_multiplier: float) -> npt.NDArray[np.float64]:
        """(size,) standard deviation of the noise on each coordinate of the sum."""
        scales = [*group_scales(noise_multiplier, self.bounds), 0.0]  # the last one is group -1's
        return np.asarray(scales, dtype=np.float64)[self.group]


@dataclass(frozen=True, eq=False)
class GradientSum:
    """Sum of the units' (clipped) gradients, (size,) float64. The counts never leave the node."""

    vector: npt.NDArray[np.float64]
    units: int
    nonfinite: int


def private_mean(
    total: GradientSum,
    groups: ClipGroups,
    noise_multiplier: float,
    expected_units: float,
    source: Random,
) -> npt.NDArray[np.float64]:
    """(size,) float64: the noised sum over the public normaliser."""
    if noise_multiplier <= 0:
        raise BadInput(
            f"noise_multiplier: found {noise_multiplier}, expected > 0 where privacy is on"
        )
    scale = groups.noise_std(noise_multiplier)
    noised = total.vector + gaussian(source, len(scale), 1.0) * scale
    return noised / expected_units


class PerSampleGradients:
    """Each record's gradient on one resident model; sums of gradients with and without a clip.

    By hooks where they give what batches of one give, which is tried here on texts of nobody's;
    else one by one. Hooking a model twice is an error of Opacus, so this object lives as long as
    its model.
    """

    def __init__(self, model: AdapterModel) -> None:
        self.model = model
        self._hooks = RecordHooks(model.network)
        self._names = tuple(model.parameters)
        self._hooked = [
            parameter for parameter in model.network.parameters() if parameter.requires_grad
        ]
        if {id(p) for p in self._hooked} != {id(p) for p in model.parameters.values()}:
            raise BadInput("adapter: the trainable parameters are not the exported ones")
        self.company = Company(model, self._rows)
        self._tried = False  # on texts of nobody's: what is wrong with the base shows there
        self.one_by_one = not self._hooks_are_right()
        self.company.alone = self.one_by_one
        self._tried = True

    def clipped_sum(
        self,
        data: Encoded,
        units: UnitIndex,
        drawn: npt.NDArray[np.int64],
        groups: ClipGroups,
        tokens: int,
        packed: bool = False,
    ) -> GradientSum:
        """Σ over the drawn units of a unit's gradient, clipped per group over all its records.

        What a unit adds depends on no other unit, to the last bit before the sum; where batches are
        `packed`, but for rounding. `tokens` bounds a micro-batch.
        """
        total = _UnitSum(self.model.spec, groups, self.model.device)
        for batch in self.batches(data, units, drawn, tokens, packed):
            total.add(self._samples(data, batch), batch)
        return total.result()

    def batches(
        self,
        data: Encoded,
        units: UnitIndex,
        drawn: npt.NDArray[np.int64],
        tokens: int,
        packed: bool = False,
    ) -> Iterator[MicroBatch]:
        """The micro-batches of a private step: of fixed shapes, or as a step without privacy's."""
        if packed:
            return micro_batches(units, drawn, data.lengths, tokens)

        fixed = partial(self.company.batches, tokens=tokens)
        return private_batches(units, drawn, data.lengths, tokens, fixed)

    def _rows(self, data: Encoded, batch: MicroBatch) -> list[torch.Tensor]:
        """(m, …) all that must not depend on a record's company."""
        return [*self._samples(data, batch), *self._scores(data, batch)]

    def _samples(self, data: Encoded, batch: MicroBatch) -> list[torch.Tensor]:
        """(m, size) per-sample gradients of each parameter, of the batch's own records."""
        if self.one_by_one:
            return self._ones(data, batch)
        with self._hooks.on():
            self._backward(data, batch)
        return [self._take(name)[: len(batch.rows)] for name in self._names]

    @torch.no_grad()
    def _scores(self, data: Encoded, batch: MicroBatch) -> list[torch.Tensor]:
        """(m, …) of a head, where one answers: a loss may round away by what its rows differ."""
        if self.model.task.reads not in (RECORD, WORD):
            return []
        inputs = data.batch(batch.rows, self.model.pad, self.model.device, batch.shape)
        with self._by_record(batch):
            return [self.model.logits(inputs)[: len(batch.rows)]]

    def _ones(self, data: Encoded, batch: MicroBatch) -> list[torch.Tensor]:
        """The same without hooks: as many passes as there are records."""
        tokens = None if batch.shape is None else (1, batch.shape[1])
        each = []
        for row in batch.rows:
            alone = np.array([row])
            self._backward(data, MicroBatch(alone, np.zeros_like(alone), False, tokens))
            each.append([self._gradient(name) for name in self._names])
        return [torch.cat(rows) for rows in zip(*each, strict=True)]

    def _hooks_are_right(self) -> bool:
        """Whether hooks give each record of a batch what it has alone."""
        model, shape = self.model, Shape(3, min(8, self.model.longest), False)
        _, texts = probes(shape, model.inputs, model.task)
        every = np.arange(shape.records, dtype=np.int64)
        batch = MicroBatch(every, every, False, (shape.records, shape.tokens))
        inputs = texts.batch(every, model.pad, model.device, batch.shape)
        precision, model.precision = model.precision, torch.float32
        self.one_by_one = False
        try:
            with model.probed():
                alone = self._ones(texts, batch)
                if model.shapes.routed:
                    return False
                if not self._hooks.learn(lambda: model.logits(inputs), shape.records):
                    return False
                return close(self._samples(texts, batch), alone)
        finally:
            model.precision = precision

    def plain_sum(self, data: Encoded, batches: Iterable[MicroBatch]) -> GradientSum:
        """Σ of gradients without a clip: training without privacy, and at its cost."""
        units = 0
        for batch in batches:
            self._backward(data, batch)
            units += len(np.unique(batch.owners)) - batch.unfinished
        vector = np.zeros(self.model.spec.size, dtype=np.float64)
        for (_, place), name in zip(self.model.spec.slices(), self._names, strict=True):
            parameter = self.model.parameters[name]
            if parameter.grad is not None:
                vector[place] = parameter.grad.detach().float().cpu().numpy().ravel()
                parameter.grad = None
        return GradientSum(vector, units, 0)

    def _backward(self, data: Encoded, batch: MicroBatch) -> None:
        inputs = data.batch(batch.rows, self.model.pad, self.model.device, batch.shape)
        self._hooks.records = len(inputs.ids)
        try:
            with self._by_record(batch), warnings.catch_warnings():
                # Opacus registers full backward hooks on modules whose inputs are frozen: expected
                # with LoRA
                warnings.filterwarnings("ignore", message="Full backward hook is firing")
                total = self.model.losses(inputs).sum()
                if total.requires_grad:  # else no trained layer saw anything of it
                    total.backward()  # type: ignore[no-untyped-call]
        except BaseException:
            self._forget()
            raise

    def _by_record(self, batch: MicroBatch) -> AbstractContextManager[Any]:
        """Kernels that go by place have a record of a fixed shape alone."""
        return by_record(0 if batch.shape is None else batch.shape[0], self.model.device)

    def _forget(self) -> None:
        """A pass cut off, for lack of memory say, leaves in the hooks what spoils later ones."""
        for module in self.model.network.modules():
            for name in ("activations", "max_batch_len"):
                module.__dict__.pop(name, None)
        for parameter in self._hooked:
            parameter.__dict__.pop("_current_grad_sample", None)
            parameter._forward_counter = 0  # type: ignore[attr-defined]
            parameter.grad_sample = parameter.grad = None  # type: ignore[attr-defined]

    def _take(self, name: str) -> torch.Tensor:
        """(m, size) float32 per-sample gradients of one parameter, taken off the model."""
        parameter = self.model.parameters[name]
        sample = getattr(parameter, "grad_sample", None)
        if not isinstance(sample, torch.Tensor):
            raise unused(name)
        parameter.grad_sample = None  # type: ignore[attr-defined]  # Opacus' own
        parameter.grad = None
        return sample.detach().float().flatten(start_dim=1)

    def _gradient(self, name: str) -> torch.Tensor:
        """(1, size) float32 gradient of one parameter from a pass without hooks, taken off the
        model; 0 where the record's words went by other experts: a failure would tell.
        """
        parameter = self.model.parameters[name]
        gradient, parameter.grad = parameter.grad, None
        if gradient is None and not self._tried:
            raise unused(name)
        gradient = torch.zeros_like(parameter) if gradient is None else gradient
        return gradient.detach().float().reshape(1, -1)


class _UnitSum:
    """Adds per-sample gradients up to units, clips each unit once, and sums."""

    def __init__(self, spec: AdapterSpec, groups: ClipGroups, device: torch.device) -> None:
        places = [place for _, place in spec.slices()]
        self._moving = [n for n, place in enumerate(places) if groups.group[place][0] >= 0]
        self._places = [places[n] for n in self._moving]
        self._groups = [int(groups.group[place][0]) for place in self._places]
        self._bounds = torch.tensor(groups.bounds, dtype=torch.float64, device=device)
        self._total = torch.zeros(spec.size, dtype=torch.float64, device=device)
        # the unit that goes on in the next micro-batch
        self._open: list[torch.Tensor] | None = None
        self._units = 0
        self._nonfinite = 0

    def add(self, samples: Sequence[torch.Tensor], batch: MicroBatch) -> None:
        owners = torch.from_numpy(batch.owners - batch.owners[0]).to(self._total.device)
        units = int(owners[-1]) + 1
        moving = [samples[n] for n in self._moving]
        sums = moving if units == len(owners) else [_by_owner(s, owners, units) for s in moving]
        if self._open is not None:
            for each, begun in zip(sums, self._open, strict=True):
                each[0] += begun
        self._open = [each[-1].clone() for each in sums] if batch.unfinished else None
        whole = units - batch.unfinished
        if whole:
            self._clip_and_sum([each[:whole] for each in sums])

    def _clip_and_sum(self, sums: Sequence[torch.Tensor]) -> None:
        squares = torch.zeros(
            len(self._bounds), len(sums[0]), dtype=torch.float64, device=self._total.device
        )
        for each, group in zip(sums, self._groups, strict=True):
            squares[group] += each.double().square().sum(dim=1)
        finite = torch.isfinite(squares).all(dim=0)
        norms = squares.sqrt()
        # min(1, C / norm): never above the bound, and 0 where anything of the unit is not finite
        factors = torch.where(
            finite, self._bounds[:, None] / norms.clamp(min=self._bounds[:, None]), 0.0
        )
        all_finite = bool(finite.all())
        for each, group, place in zip(sums, self._groups, self._places, strict=True):
            safe = each if all_finite else torch.where(finite[:, None], each, 0.0)
            self._total[place] += factors[group] @ safe.double()
        self._units += len(finite)
        self._nonfinite += int((~finite).sum())

    def result(self) -> GradientSum:
        if self._open is not None:
            raise BadInput("micro-batches: found an unfinished unit at the end of a draw")
        return GradientSum(self._total.cpu().numpy(), self._units, self._nonfinite)


def _by_owner(samples: torch.Tensor, owners: torch.Tensor, units: int) -> torch.Tensor:
    summed = torch.zeros(units, samples.shape[1], dtype=samples.dtype, device=samples.device)
    return summed.index_add_(0, owners, samples)


def checked_clip(clip: float) -> float:
    """The same; BadInput unless float32 can square what it bounds."""
    if not SMALLEST_CLIP <= clip < float("inf"):
        raise BadInput(
            f"clip: found {clip}, expected a finite number of at least {SMALLEST_CLIP:g}"
        )
    return clip
