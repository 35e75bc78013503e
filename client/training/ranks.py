"""One private step on several devices: one draw, one clip a unit, one noise.

Each rank has the whole network on a device of its own. Rank 0 is the process that draws; it sends
each other rank the state and that rank's share of the drawn units, computes its own share, adds
the clipped sums up in float64, and whoever asked adds noise to that: no rank knows of any. A unit's
records are all on one rank, so that they are clipped once, together.

Processes, and no threads: per-record gradients are taken by hooks in Python, of which one
interpreter runs one at a time. Devices must be of one kind, for a unit's bits must not say on which
it was. Between these processes of one machine goes what Python pickles; nothing from outside does.
"""

from __future__ import annotations

import multiprocessing
import signal
import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fedlora.client.training.step import ClipGroups, GradientSum, PerSampleGradients
from fedlora.common.config.schema import LoraConfig, ModelConfig
from fedlora.common.data.records import UnitIndex
from fedlora.common.errors import BadInput, FedloraError
from fedlora.common.model.network import AdapterModel, build_model
from fedlora.common.model.projection import Projection
from fedlora.common.model.state import AdapterState, Vector
from fedlora.common.tasks.batch import Encoded
from fedlora.common.tasks.task import Task

CLOSING = 5.0  # seconds that a rank has to end by itself


class RankLost(FedloraError):
    """A rank's process ended, or could not compute its share; the others are of no use then."""


@dataclass(frozen=True)
class Recipe:
    """What a rank builds the network from that rank 0 has."""

    model: ModelConfig
    lora: LoraConfig
    task: Task
    seed: int
    checkpointing: bool
    projection: Projection | None

    def build(self, device: torch.device) -> AdapterModel:
        """On `device`; BadInput where the base can't serve."""
        built = build_model(self.model, self.lora, self.task, self.seed, device)
        if self.checkpointing:
            built.recompute()
        if self.projection is not None:
            built.projection = self.projection
        return built


@dataclass(frozen=True)
class _Way:
    """How rank 0 computes, once that is settled."""

    attention: str
    precision: torch.dtype
    threads: int


@dataclass(frozen=True, eq=False)
class _Share:
    """What a rank sums in one step; `of` None: of the same records as before."""

    of: tuple[Encoded, UnitIndex] | None
    state: Vector
    drawn: npt.NDArray[np.int64]
    groups: ClipGroups
    tokens: int
    packed: bool


class Ranks(PerSampleGradients):
    """Clipped sums on `model`, which is rank 0's, and on as many `others` as there are.

    Without a clip, rank 0 computes alone. RankLost from then on where one is lost.
    """

    def __init__(self, model: AdapterModel, recipe: Recipe, others: Sequence[torch.device]) -> None:
        super().__init__(model)
        way = _Way(model.attention, model.precision, torch.get_num_threads())
        self.started = [_started(recipe, way, device) for device in others]
        self._ends = [end for end, _ in self.started]
        self._held: tuple[Encoded, UnitIndex] | None = None
        self.close = weakref.finalize(self, _stop, self.started)

    def clipped_sum(
        self,
        data: Encoded,
        units: UnitIndex,
        drawn: npt.NDArray[np.int64],
        groups: ClipGroups,
        tokens: int,
        packed: bool = False,
    ) -> GradientSum:
        """As one device's, but for the order in which units are added."""
        new = self._held is None or self._held[0] is not data or self._held[1] is not units
        of, state = (data, units) if new else None, self.model.state().vector
        count = 1 + len(self._ends)
        try:
            for rank, end in enumerate(self._ends, start=1):
                end.send(_Share(of, state, drawn[rank::count], groups, tokens, packed))
            self._held = data, units
            own = super().clipped_sum(data, units, drawn[::count], groups, tokens, packed)
            return _added([own, *(_answered(end) for end in self._ends)])
        except BaseException as error:
            self.close()  # what a rank still has in hand would be taken for the next step's
            if isinstance(error, EOFError | OSError):
                raise RankLost("a rank's process ended in the middle of a step") from error
            raise


def of_one_kind(devices: Sequence[torch.device]) -> None:
    """BadInput unless all are one kind of device."""
    kinds = {
        torch.cuda.get_device_name(each) if each.type == "cuda" else each.type for each in devices
    }
    if len(kinds) > 1:
        raise BadInput(
            f"[trainer] device: found {' and '.join(sorted(kinds))}, expected devices of one kind"
        )


def _added(sums: Sequence[GradientSum]) -> GradientSum:
    vector = np.sum([each.vector for each in sums], axis=0)
    units, nonfinite = (
        sum(getattr(each, name) for each in sums) for name in ("units", "nonfinite")
    )
    return GradientSum(vector, units, nonfinite)


def _answered(end: Connection) -> GradientSum:
    answer = end.recv()
    if not isinstance(answer, GradientSum):
        raise RankLost(f"a rank could not compute its share ({answer})")
    return answer


def _started(recipe: Recipe, way: _Way, device: torch.device) -> tuple[Connection, Any]:
    """A rank's process, and the end of the pipe to it."""
    context = multiprocessing.get_context("spawn")
    ours, its = context.Pipe()
    process = context.Process(target=_serve, args=(its, recipe, way, str(device)), daemon=True)
    process.start()
    its.close()  # so that its end is noticed
    return ours, process


def _stop(started: Sequence[tuple[Connection, Any]]) -> None:
    for end, _ in started:
        end.close()
    for _, process in started:
        process.join(CLOSING)
        if process.is_alive():
            process.kill()  # it holds nothing that is not elsewhere
            process.join()


def _serve(end: Connection, recipe: Recipe, way: _Way, device: str) -> None:
    """A rank, until the pipe is closed. It tells a fault by its kind alone: it may quote a text."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 says when it is over
    torch.set_num_threads(way.threads)
    fault, held = "", None
    try:
        model = recipe.build(torch.device(device))
        if way.attention:  # else as it was loaded
            model.set_attention(way.attention)
        model.precision = way.precision
        gradients = PerSampleGradients(model)
    except Exception as error:
        fault = type(error).__name__
    with suppress(EOFError, OSError):  # the pipe was closed
        while True:
            share: _Share = end.recv()
            held = share.of or held
            end.send(fault or _clipped(gradients, held, share))


def _clipped(gradients: PerSampleGradients, held: Any, share: _Share) -> GradientSum | str:
    """The sum of a rank's share, or the kind of what went wrong."""
    (data, units), drawn, groups = held, share.drawn, share.groups
    try:
        gradients.model.load(AdapterState(gradients.model.spec, share.state))
        return gradients.clipped_sum(data, units, drawn, groups, share.tokens, share.packed)
    except Exception as error:
        return type(error).__name__
