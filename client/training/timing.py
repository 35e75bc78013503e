"""What a step takes, found by making it on public texts; and how many tokens go in at once.

The size of a micro-batch changes speed, memory and, where batches are packed, the last bits. So
what was found lies in the run's folder beside attention and precision: a resumed run, and every
process of it, has the same. Nothing here follows from a private record.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fedlora.client.training.company import MOST
from fedlora.client.training.memory import Activations, memory_of_step
from fedlora.client.training.sampling import micro_batches
from fedlora.client.training.step import ClipGroups, PerSampleGradients
from fedlora.common.config.schema import PrivacyConfig, TrainingConfig
from fedlora.common.data.records import UnitIndex
from fedlora.common.manifest.manifest import RunManifest
from fedlora.common.model.compute import measured_once
from fedlora.common.model.machine import available
from fedlora.common.model.network import AdapterModel
from fedlora.common.privacy.modes import guarantee_asked, guarantee_of
from fedlora.common.tasks.batch import Encoded

SMALLEST, LARGEST = 512, 1 << 17  # tokens of a micro-batch that is chosen here
GAIN = 1.05  # how many times as fast a size must be to be worth twice the memory
ROOM = 0.5  # of the free memory that it may fill
TIMED = {"cpu": 4096, "cuda": 1 << 18}  # tokens that a step is timed on, at most
REPEATS = 3


@dataclass(frozen=True)
class Steps:
    """What is public about a run's steps. `drawn`: units that one is expected to draw; `grouped`: a
    unit may have several records.
    """

    drawn: float
    packed: bool
    private: bool
    grouped: bool = False

    @classmethod
    def of(cls, training: TrainingConfig, rounds: int, privacy: PrivacyConfig, unit: str) -> Steps:
        """Of the rounds in a simulation that move more than the head; none drawn where there are
        none. `unit` is the column that names privacy's, "" for records.
        """
        adapted = rounds > training.head_rounds
        return cls(
            drawn=training.expected_units if adapted else 0.0,
            packed=training.batches != "fixed",
            private=guarantee_asked(privacy).clip_in_step,
            grouped=bool(unit),
        )

    @classmethod
    def promised(cls, manifest: RunManifest) -> Steps:
        """Of a run's rounds that move more than the head; none drawn where there are none."""
        drawn = [each.expected_units for each in manifest.phases if each.name != "head"]
        return cls(
            drawn=max(drawn, default=0.0),
            packed=manifest.batches == "packed",
            private=guarantee_of(manifest).clip_in_step,
            grouped=bool(manifest.unit),
        )


def tokens_of_run(
    asked: int, gradients: PerSampleGradients, texts: Encoded, steps: Steps, folder: Path
) -> int:
    """`asked`, or, where it is left open, what was measured once for the run in `folder`."""
    if asked > 0:
        return asked
    device = gradients.model.device
    return measured_once(
        folder, device, "micro_batch_tokens", lambda: best_tokens(gradients, texts, steps)
    )


def best_tokens(gradients: PerSampleGradients, texts: Encoded, steps: Steps) -> int:
    """The smallest power of two, from `SMALLEST`, that twice as many tokens are not faster than."""
    model, longest = gradients.model, gradients.model.longest
    most = _largest(model.device.type, texts, steps)
    if most < 2 * SMALLEST:
        return SMALLEST
    kept, free = Activations.of(model), available(model.device)
    best = size = SMALLEST
    fastest = float("inf")
    while size <= most:
        needed = memory_of_step(model, size, longest, steps.packed, steps.private, kept).step
        if size > SMALLEST and free is not None and needed > ROOM * free:
            break
        seconds = record_seconds(gradients, texts, steps, size)
        if seconds * GAIN > fastest:
            break
        best, fastest, size = size, seconds, 2 * size
    return best


def record_seconds(
    gradients: PerSampleGradients, texts: Encoded, steps: Steps, tokens: int
) -> float:
    """Seconds that a step takes for each record, as the run would make it: the median of a few."""
    units = _units(texts, steps, gradients.model.device.type)
    _seconds(gradients, texts, units, steps, tokens)
    return statistics.median(
        _seconds(gradients, texts, units, steps, tokens) for _ in range(REPEATS)
    ) / len(units)


def nobodys_texts(model: AdapterModel) -> Encoded:
    """Drawn records of a quarter of the longest to all of it, where none may be read."""
    rng, most = np.random.default_rng(0), model.longest
    lengths = np.maximum(np.linspace(most / 4, most, 12).astype(np.int64), 1)
    if model.inputs.one_length:
        lengths = np.full(len(lengths), most, dtype=np.int64)
    return model.inputs.nobodys(model.task, lengths, rng)


def _seconds(
    gradients: PerSampleGradients, texts: Encoded, units: UnitIndex, steps: Steps, tokens: int
) -> float:
    drawn, start = np.arange(len(units), dtype=np.int64), time.perf_counter()
    if steps.private:
        groups = ClipGroups.flat(gradients.model.spec, 1.0)
        together = steps.packed or steps.grouped  # records of one unit share a batch in any case
        gradients.clipped_sum(texts, units, drawn, groups, tokens, together)
    else:
        gradients.plain_sum(texts, micro_batches(units, drawn, texts.lengths, tokens))
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _units(texts: Encoded, steps: Steps, device: str) -> UnitIndex:
    """As many units of one text as a step draws, or as `TIMED` allows; texts come again."""
    fitting = TIMED[device] // int(np.ceil(texts.lengths.mean()))
    count = max(1, min(round(steps.drawn), fitting))
    rows = np.linspace(0, len(texts), count, endpoint=False).astype(np.int64)
    return UnitIndex(np.arange(count + 1, dtype=np.int64), rows)


def _largest(device: str, texts: Encoded, steps: Steps) -> int:
    """Tokens beyond which no batch of the timed ones gets larger."""
    most, longest = len(_units(texts, steps, device)), int(texts.lengths.max())
    if steps.private and not (steps.packed or steps.grouped):
        most = min(most, MOST[device])
    return min(LARGEST, max(SMALLEST, 2 * most * longest))
