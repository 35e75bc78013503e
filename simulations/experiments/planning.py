"""`fedlora-sim plan`: what a run would cost, before anything is spent."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from fedlora.client.training.sampling import micro_batches
from fedlora.client.training.step import ClipGroups
from fedlora.common.config.schema import Config
from fedlora.common.data.records import UnitIndex, unit_groups
from fedlora.common.data.tasks import Encoded
from fedlora.common.manifest.manifest import RunManifest
from fedlora.common.model.compute import threads as with_threads
from fedlora.common.model.features import pooled_features
from fedlora.common.privacy.figures import shown_delta, shown_epsilon
from fedlora.common.privacy.guarantee import Guarantee
from fedlora.common.privacy.modes import guarantee_named, guarantee_of
from fedlora.simulations.begin import Options, federation_of, machine_of, manifest_of
from fedlora.simulations.federation.population import Federation

PROBE_RECORDS = 48  # of the public validation part


@dataclass(frozen=True)
class Speed:
    """Seconds a record, measured on public records: one forward pass, and one training step."""

    forward: float
    step: float


def print_plan(config: Config, console: Console, threads: int = 0) -> None:
    """Print the schedule: noise, ε by round, and the time that it would take on this machine."""
    with with_threads(threads), TemporaryDirectory() as folder:
        federation = federation_of(config, Path(folder), machine_of(config, Options(device="cpu")))
        manifest = manifest_of(config, federation)
        speed = measure(federation, config)
    console.print(_schedule(federation, manifest, speed))
    guarantee = guarantee_of(manifest)
    if guarantee.private:
        console.print(_epsilon_by_round(guarantee))
    size = federation.model.spec.size
    console.print(
        f"{size:,} trainable parameters; {4 * size:,} bytes to each client and back in a round; "
        f"{federation.public.compute.attention} attention, {federation.public.compute.precision}"
    )


def measure(federation: Federation, config: Config) -> Speed:
    """Time a forward pass and a step, as the run would make it, on the public validation part."""
    data = federation.public.validation.data
    rows = np.arange(min(PROBE_RECORDS, len(data)), dtype=np.int64)
    units = unit_groups(None, len(rows))
    forward = step = 0.0
    for _ in range(2):  # the second time is measured
        if config.training.head_rounds:
            forward = _seconds(lambda: pooled_features(federation.model, data, rows))
        step = _seconds(lambda: _step(federation, config, data, units, rows))
    return Speed(forward / len(rows), step / len(rows))


def _step(
    federation: Federation,
    config: Config,
    data: Encoded,
    units: UnitIndex,
    rows: npt.NDArray[np.int64],
) -> None:
    gradients = federation.training.gradients
    tokens = config.training.micro_batch_tokens
    if guarantee_named(config.privacy.mode).noise_in_step:
        gradients.clipped_sum(data, units, rows, ClipGroups.flat(gradients.model.spec, 1.0), tokens)
    else:
        gradients.plain_sum(data, micro_batches(units, rows, data.lengths, tokens))


def _schedule(federation: Federation, manifest: RunManifest, speed: Speed) -> Table:
    table = Table(
        "phase", "rounds", "attempts", "steps", "rate", "σ", "clip", "examples", "minutes", box=None
    )
    units = len(federation.units)
    for phase in manifest.phases:
        examples = phase.rounds * phase.steps * phase.sampling_rate * units * manifest.participation
        seconds = (
            federation.feature_records * speed.forward
            if phase.name == "head"
            else examples * speed.step
        )
        table.add_row(
            phase.name,
            str(phase.rounds),
            str(phase.attempts),
            str(phase.steps),
            f"{phase.sampling_rate:g}",
            f"{phase.noise_multiplier:.4g}",
            f"{phase.clip:g}" + (f" / {phase.head_clip:g}" if phase.head_clip else ""),
            f"{examples:,.0f}",
            f"{seconds / 60:.1f}",
        )
    return table


def _epsilon_by_round(guarantee: Guarantee) -> Table:
    """ε after each tenth of the rounds, and of the whole schedule with its spare attempts."""
    manifest, table = guarantee.manifest, Table("round", "ε", box=None)
    shown = sorted({round(share * manifest.rounds) for share in np.linspace(0.1, 1.0, 10)} - {0})
    for number in shown:
        table.add_row(str(number), shown_epsilon(guarantee.epsilon_of(_taken(manifest, number))))
    whole = shown_epsilon(guarantee.stated_epsilon())
    table.add_row(
        "all attempts", f"{whole} at δ = {shown_delta(manifest.delta)}, for one {guarantee.unit}"
    )
    return table


def _taken(manifest: RunManifest, rounds: int) -> list[int]:
    """Rounds of each phase among the first `rounds`."""
    taken, left = [], rounds
    for phase in manifest.phases:
        taken.append(min(left, phase.rounds))
        left -= taken[-1]
    return taken


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
