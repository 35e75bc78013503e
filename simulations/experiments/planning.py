"""What a run would cost, before anything is spent."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt
from rich.console import Console, ConsoleOptions
from rich.table import Table

from fedlora.client.training.memory import Memory
from fedlora.client.training.sampling import micro_batches
from fedlora.client.training.step import ClipGroups
from fedlora.common.config.schema import Config
from fedlora.common.data.records import UnitIndex, unit_groups
from fedlora.common.manifest.manifest import Phase, RunManifest
from fedlora.common.model.compute import threads
from fedlora.common.model.features import pooled_features
from fedlora.common.model.machine import shown
from fedlora.common.privacy.figures import shown_delta, shown_epsilon
from fedlora.common.privacy.guarantee import Guarantee
from fedlora.common.privacy.modes import guarantee_named, guarantee_of
from fedlora.common.tasks.batch import Encoded
from fedlora.simulations.begin import (
    DEFAULTS,
    Options,
    checked,
    federation_of,
    machine_of,
    manifest_of,
    sources_of,
)
from fedlora.simulations.chosen import decided_for
from fedlora.simulations.federation.population import Federation

PROBE_RECORDS = 48  # of the public validation part


@dataclass(frozen=True)
class PhasePlan:
    """What a phase would do; `minutes` on this machine, `examples` as its rounds expect them."""

    phase: Phase  # its noise calibrated
    examples: float
    minutes: float


@dataclass(frozen=True)
class Plan:
    """What a run would cost. Printed, it is two tables and a line."""

    phases: tuple[PhasePlan, ...]
    epsilon_by_round: Mapping[int, float]  # after each tenth of the rounds; empty without privacy
    epsilon: float | None  # of all attempts, for one `unit`
    delta: float
    unit: str
    parameters: int  # float32 numbers of an update
    attention: str
    precision: str
    dtype: str
    memory: Memory  # of a step of an adapter phase, on this machine

    @property
    def minutes(self) -> float:
        """Of training, on this machine."""
        return sum(each.minutes for each in self.phases)

    @property
    def bytes_a_round(self) -> int:
        """To each client, and back."""
        return 4 * self.parameters

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table | str]:
        yield _schedule(self)
        if self.epsilon is not None:
            yield _epsilon_by_round(self)
        yield (
            f"{self.parameters:,} trainable parameters; {self.bytes_a_round:,} bytes to each client"
            f" and back in a round; {self.attention} attention, {self.precision}"
        )
        memory = self.memory
        yield (
            f"memory at the peak of a step {shown(memory.peak)}: held {shown(memory.held)}, of it"
            f" weights in {self.dtype} {shown(memory.weights)}; activations"
            f" {shown(memory.activations)}, gradients {shown(memory.gradients)}, scores of words"
            f" {shown(memory.scores)}"
        )

    def __str__(self) -> str:
        console = Console(width=100, highlight=False, color_system=None)
        with console.capture() as printed:
            console.print(self)
        return printed.get().rstrip()


@dataclass(frozen=True)
class Speed:
    """Seconds a record, measured on public records: one forward pass, and one training step."""

    forward: float
    step: float


def plan(config: Config, options: Options = DEFAULTS) -> Plan:
    """The schedule with its noise, ε by round, and the time that it would take on this machine.

    The data are read and the model is built; nothing is trained, and no budget is charged.
    """
    config = checked(config)
    with threads(options.threads), TemporaryDirectory() as folder:
        sources = sources_of(config)
        config = decided_for(config, sources)
        machine = machine_of(config, options)
        federation = federation_of(config, sources, Path(folder), machine)
        manifest = manifest_of(config, federation)
        in_step = guarantee_named(config.privacy.mode).noise_in_step
        memory = federation.memory(config.training, in_step)
        speed = measure(federation, config)
    guarantee, compute = guarantee_of(manifest), federation.public.compute
    return Plan(
        phases=tuple(_phase_plan(federation, manifest, phase, speed) for phase in manifest.phases),
        epsilon_by_round=_tenths(guarantee) if guarantee.private else {},
        epsilon=guarantee.stated_epsilon() if guarantee.private else None,
        delta=manifest.delta,
        unit=guarantee.unit,
        parameters=federation.model.spec.size,
        attention=compute.attention,
        precision=compute.precision,
        dtype=compute.dtype,
        memory=memory,
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


def _phase_plan(
    federation: Federation, manifest: RunManifest, phase: Phase, speed: Speed
) -> PhasePlan:
    drawn = phase.rounds * phase.steps * phase.sampling_rate * len(federation.units)
    examples = drawn * manifest.participation
    computed = federation.feature_records * speed.forward  # once; its steps cost next to nothing
    seconds = computed if phase.name == "head" else examples * speed.step
    return PhasePlan(phase, examples, seconds / 60)


def _tenths(guarantee: Guarantee) -> dict[int, float]:
    """ε after each tenth of the rounds."""
    manifest = guarantee.manifest
    shown = sorted({round(share * manifest.rounds) for share in np.linspace(0.1, 1.0, 10)} - {0})
    return {number: guarantee.epsilon_of(_taken(manifest, number)) for number in shown}


def _schedule(plan: Plan) -> Table:
    table = Table(
        "phase", "rounds", "attempts", "steps", "rate", "σ", "clip", "examples", "minutes", box=None
    )
    for each in plan.phases:
        phase = each.phase
        table.add_row(
            phase.name,
            str(phase.rounds),
            str(phase.attempts),
            str(phase.steps),
            f"{phase.sampling_rate:g}",
            f"{phase.noise_multiplier:.4g}",
            f"{phase.clip:g}" + (f" / {phase.head_clip:g}" if phase.head_clip else ""),
            f"{each.examples:,.0f}",
            f"{each.minutes:.1f}",
        )
    return table


def _epsilon_by_round(plan: Plan) -> Table:
    """ε after each tenth of the rounds, and of the whole schedule with its spare attempts."""
    table = Table("round", "ε", box=None)
    for number, epsilon in plan.epsilon_by_round.items():
        table.add_row(str(number), shown_epsilon(epsilon))
    whole, delta = shown_epsilon(plan.epsilon), shown_delta(plan.delta)
    table.add_row("all attempts", f"{whole} at δ = {delta}, for one {plan.unit}")
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
