"""What a run would cost, before anything is spent."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import ceil, inf
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from rich.console import Console, ConsoleOptions
from rich.table import Table as Printed

from fedlora.client.training.memory import Memory
from fedlora.client.training.timing import record_seconds
from fedlora.common.config.schema import Config, open_fields
from fedlora.common.data.free_memory import shown
from fedlora.common.manifest.counts import Cells
from fedlora.common.manifest.manifest import Phase, RunManifest
from fedlora.common.manifest.turns import BY_TURNS, most_moved
from fedlora.common.model.compute import threads
from fedlora.common.model.features import pooled_features
from fedlora.common.model.state import AdapterSpec
from fedlora.common.privacy.figures import shown_delta, shown_epsilon
from fedlora.common.privacy.guarantee import Guarantee
from fedlora.common.privacy.modes import guarantee_of
from fedlora.common.protocol.vectors import BYTES
from fedlora.server.runs.noise import signal_to_noise
from fedlora.simulations.begin import checked, federation_of, machine_of, manifest_of, sources_of
from fedlora.simulations.chosen import decided_for
from fedlora.simulations.experiments.given import Table, with_records
from fedlora.simulations.experiments.progress import as_printed
from fedlora.simulations.federation.population import Federation
from fedlora.simulations.federation.public_part import choice_for
from fedlora.simulations.options import DEFAULTS, Options

FAINT = 1.0  # the most that a phase can move, in lengths of its noise, where nothing is learnt
PROBE_RECORDS = 256  # of the public validation part, for a forward pass


@dataclass(frozen=True)
class PhasePlan:
    """What a phase would do; `minutes` on this machine, `examples` as its rounds expect them, and
    `signal` the most that its updates can come to, as a multiple of their noise, if that is told.

    Minutes are of training and scoring: not of what comes before the first round.
    """

    phase: Phase  # its noise calibrated
    examples: float
    minutes: float
    signal: float | None


@dataclass(frozen=True)
class Start:
    """What public records teach before the first round."""

    epochs: int
    records: int
    minutes: float


NO_START = Start(0, 0, 0.0)
# passes' worth of time: one forward, and at most two for the way back
LEARNT = 3


@dataclass(frozen=True)
class Plan:
    """What a run would cost. Printed, it is two tables and a line."""

    phases: tuple[PhasePlan, ...]
    epsilon_by_round: Mapping[int, float]  # after each tenth of the rounds; empty without privacy
    epsilon: float | None  # of all attempts, for one `unit`
    delta: float
    unit: str
    parameters: int  # float32 numbers of an adapter
    leaving: int  # of them, how many come back in a round, at most
    attention: str
    precision: str
    dtype: str
    memory: Memory  # of a step of an adapter phase, on this machine
    micro_batch_tokens: int
    wire: str  # what an update is rounded to
    counts: str = ""  # what an evaluation's noise is beside its hold-outs
    start: Start = NO_START
    unheard: bool = False  # whether rules left LoRA without rounds

    @property
    def minutes(self) -> float:
        """Of training and scoring, on this machine."""
        return self.start.minutes + sum(each.minutes for each in self.phases)

    @property
    def bytes_a_round(self) -> int:
        """To each client."""
        return BYTES["float32"] * self.parameters

    @property
    def bytes_back(self) -> int:
        """From each client in a round."""
        return BYTES[self.wire] * self.leaving

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[Printed | str]:
        yield _schedule(self)
        if self.epsilon is not None:
            yield _epsilon_by_round(self)
        yield (
            f"{self.parameters:,} trainable parameters; {self.bytes_a_round:,} bytes to each client"
            f" and {self.bytes_back:,} back in a round; {self.attention} attention,"
            f" {self.precision}, {self.micro_batch_tokens:,} tokens at once"
        )
        if self.start.epochs:
            yield (
                f"before the first round, {self.start.epochs} epochs over"
                f" {self.start.records:,} public records: {self.start.minutes:.1f} minutes"
            )
        if self.counts:
            yield self.counts
        if self.unheard:
            yield (
                "the head alone has all rounds and all of ε: LoRA's would cost more, by their"
                ' noise, than they give ([training] moves = "lora" asks for them)'
            )
        drowned = [each.phase.name for each in self.phases if (each.signal or inf) < FAINT]
        if drowned:
            yield (
                f"noise drowns what phase {' and '.join(drowned)} would learn: more units, a larger"
                " ε, fewer rounds, or fewer coordinates ([lora] rank, layers) would help"
            )
        memory = self.memory
        yield (
            f"memory at the peak of a step {shown(memory.peak)}: held {shown(memory.held)}, of it"
            f" weights in {self.dtype} {shown(memory.weights)}; activations"
            f" {shown(memory.activations)}, gradients {shown(memory.gradients)}, scores of words"
            f" {shown(memory.scores)}"
        )

    def __str__(self) -> str:
        return as_printed(self)


@dataclass(frozen=True)
class Speed:
    """Seconds a record, measured on public records."""

    features: float  # a forward pass in batches of fixed shapes, once before a head phase
    step: float
    scored: float  # of a state that moved more than the head


def plan(
    config: Config,
    options: Options = DEFAULTS,
    *,
    train: Table | None = None,
    test: Table | None = None,
) -> Plan:
    """The schedule with its noise, ε by round, and the time that it would take on this machine.

    The data are read and the model is built; nothing is trained, and no budget is charged. `train`
    and `test` are records given instead of files.
    """
    config = checked(config)
    with threads(options.threads), TemporaryDirectory() as folder:
        config = with_records(config, Path(folder), train, test)
        sources = sources_of(config, choice_for(config.data, Path(folder)))
        left_open = "training.head_rounds" in open_fields(config)
        config = decided_for(config, sources)
        machine = machine_of(config, options)
        federation = federation_of(config, sources, Path(folder), machine)
        manifest = manifest_of(config, federation)
        federation.check_memory(head=config.training.head_rounds > 0)
        memory = federation.memory()
        speed = measure(federation, config)
    guarantee, compute = guarantee_of(manifest), federation.public.compute
    every = config.federation.evaluate_every
    return Plan(
        phases=tuple(
            _phase_plan(federation, manifest, phase, speed, ceil(phase.rounds / every))
            for phase in manifest.phases
        ),
        epsilon_by_round=_tenths(guarantee) if guarantee.private else {},
        epsilon=guarantee.stated_epsilon() if guarantee.private else None,
        delta=manifest.delta,
        unit=guarantee.unit,
        parameters=federation.model.spec.size,
        leaving=_leaving(federation.model.spec, manifest),
        attention=compute.attention,
        precision=compute.precision,
        dtype=compute.dtype,
        memory=memory,
        micro_batch_tokens=federation.training.tokens,
        wire=manifest.wire,
        counts=_counts(manifest, len(federation.clients)),
        start=_start(federation, speed),
        unheard=left_open and all(phase.name == "head" for phase in manifest.phases),
    )


def measure(federation: Federation, config: Config) -> Speed:
    """Time a forward pass and a step, as the run would make them, on the public validation part."""
    public, training = federation.public, federation.training
    data, features, steps = public.validation.data, 0.0, federation.steps
    rows = np.resize(np.arange(len(data), dtype=np.int64), PROBE_RECORDS)
    if config.training.head_rounds:
        features = _seconds(lambda: pooled_features(federation.model, data, rows)) / len(rows)
    some = replace(public.validation, rows=rows)
    scored = _seconds(lambda: some.evaluate(public.initial)) / len(rows)
    if not steps.drawn:
        return Speed(features, 0.0, scored)
    drawn = config.training.sampling_rate * len(federation.units) / len(federation.clients)
    step = record_seconds(training.gradients, data, replace(steps, drawn=drawn), training.tokens)
    return Speed(features, step, scored)


def _phase_plan(
    federation: Federation, manifest: RunManifest, phase: Phase, speed: Speed, looks: int
) -> PhasePlan:
    """With `looks` at the validation part, and one at the test part when the run is over."""
    public, units = federation.public, federation.units
    drawn = phase.rounds * phase.steps * phase.sampling_rate * manifest.participation
    seconds = len(public.test.rows) * speed.scored
    if phase.name == "head":  # once; its steps and looks cost next to nothing
        seconds += federation.feature_records * speed.features
    else:
        seconds += drawn * len(units.records) * speed.step
        seconds += looks * len(public.validation.rows) * speed.scored
    members = manifest.participation * len(federation.clients)
    signal = signal_to_noise(manifest, phase, federation.model.spec, members)
    return PhasePlan(phase, drawn * len(units), seconds / 60, signal)


def _start(federation: Federation, speed: Speed) -> Start:
    public = federation.public
    epochs, records, scoring = public.recipe.public_epochs, len(public.learnt_rows), 0
    passes = epochs * records * LEARNT
    if epochs:
        scoring = (epochs + 1) * len(public.validation.rows)
    if epochs and public.recipe.model.projection:  # then the head alone, on what LoRA made
        passes, scoring = passes + epochs * records, 2 * scoring
    return Start(epochs, records, (passes + scoring) * speed.scored / 60)


def _counts(manifest: RunManifest, institutions: int) -> str:
    """How far noise moves a count, beside the hold-out of an institution of middling size."""
    terms, cost = manifest.evaluation, guarantee_of(manifest).evaluation_epsilon()
    if terms is None:
        return ""
    noise, units = (
        terms.noise_multiplier / Cells.of(manifest).weight,
        terms.expected_units / institutions,
    )
    price = "" if cost is None else f"; ε {shown_epsilon(cost)} by itself"
    return (
        f"evaluation: a count is noised by {noise:.3g}, of about {units:,.0f} units held out at"
        f" each institution{price}"
    )


def _tenths(guarantee: Guarantee) -> dict[int, float]:
    """ε after each tenth of the rounds."""
    manifest = guarantee.manifest
    shown = sorted({round(share * manifest.rounds) for share in np.linspace(0.1, 1.0, 10)} - {0})
    return {number: guarantee.epsilon_of(_taken(manifest, number)) for number in shown}


def _leaving(spec: AdapterSpec, manifest: RunManifest) -> int:
    """Coordinates of the largest update that a round of the run asks for."""
    variant = manifest.network.variant
    if variant != BY_TURNS:
        return spec.size
    return max(most_moved(spec, phase.name, variant) for phase in manifest.phases)


def _schedule(plan: Plan) -> Printed:
    """A column for each phase: a terminal is rarely as wide as all that is said of one."""
    columns = [_shown(each) for each in plan.phases]
    table = Printed("phase", *(each.phase.name for each in plan.phases), box=None)
    for name in columns[0]:
        table.add_row(name, *(column[name] for column in columns))
    return table


def _shown(each: PhasePlan) -> dict[str, str]:
    phase = each.phase
    return {
        "rounds": str(phase.rounds),
        "attempts": str(phase.attempts),
        "steps": str(phase.steps),
        "rate": f"{phase.sampling_rate:g}",
        "σ": f"{phase.noise_multiplier:.4g}",
        "clip": f"{phase.clip:g}" + (f" / {phase.head_clip:g}" if phase.head_clip else ""),
        "signal / noise": "–" if each.signal is None else f"≤ {each.signal:.3g}",
        "examples": f"{each.examples:,.0f}",
        "minutes": f"{each.minutes:.1f}",
    }


def _epsilon_by_round(plan: Plan) -> Printed:
    """ε after each tenth of the rounds, and of the whole schedule with its spare attempts."""
    table = Printed("round", "ε", box=None)
    for number, epsilon in plan.epsilon_by_round.items():
        table.add_row(str(number), shown_epsilon(epsilon))
    whole, delta = shown_epsilon(plan.epsilon), shown_delta(plan.delta)
    table.add_row("all attempts", f"{whole} at δ = {delta}, for one {plan.unit}")
    return table


def _taken(manifest: RunManifest, rounds: int) -> list[int]:
    """Rounds of each phase, and of the evaluation, among the first `rounds`."""
    taken, left = [], rounds
    for phase in manifest.accounted:
        taken.append(min(left, phase.rounds))
        left -= taken[-1]
    return taken


def _seconds(work: Callable[[], object]) -> float:
    """Of the second time: shapes are tried in the first."""
    work()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
