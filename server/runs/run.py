"""One run at the coordinator: the round loop over a cohort, a line a round, what is summed up.

Simulation and deployment conduct a run alike; they differ in the cohort, and in what else they may
know.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedlora.common.adapter.peft import export_adapter
from fedlora.common.config.schema import AggregationConfig, FederationConfig, ServerConfig
from fedlora.common.disk.files import lines_of
from fedlora.common.errors import QuorumLost, Refused, Spent
from fedlora.common.manifest.manifest import Phase, RunManifest
from fedlora.common.model.state import AdapterState
from fedlora.server.rounds.checkpoint import Checkpoint, Progress
from fedlora.server.rounds.cohort import Cohort
from fedlora.server.rounds.counted import count_hold_outs, kept_counts
from fedlora.server.rounds.loop import ALONE, Around, Rules, run_rounds
from fedlora.server.runs.at_institutions import at_institutions
from fedlora.server.runs.metrics import METRICS, MetricsLog, Observe, nobody
from fedlora.server.runs.phases import phase_table
from fedlora.server.runs.public_data import PublicSide
from fedlora.server.runs.summary import doubts, summary_of, write_summary
from fedlora.server.runs.warm_start import records_learnt, scored_start
from fedlora.server.strategies.fedavg import FedAvg, RateSchedule, ServerOptimizer
from fedlora.server.strategies.gathered import Gather, Summed
from fedlora.server.strategies.strategy import Strategy


@dataclass(frozen=True, eq=False, kw_only=True)
class Run:
    """A run that was begun or resumed: all that the round loop needs beside a cohort."""

    folder: Path
    public: PublicSide
    checkpoint: Checkpoint
    strategies: tuple[Strategy, ...]  # one a phase
    rules: Rules
    clients: int
    engine: str
    config: str  # as TOML, for whoever reads the summary
    gather: Gather = Summed  # what becomes of updates in clear
    caveats: tuple[str, ...] = ()  # sentences that the privacy statement ends with
    began: float = field(default_factory=time.monotonic)

    @property
    def manifest(self) -> RunManifest:
        """The checkpoint's."""
        return self.checkpoint.manifest


def conduct(
    run: Run, cohort: Cohort, observe: Observe = nobody, around: Around = ALONE
) -> Progress:
    """The round loop, with a line of metrics.jsonl for each committed round, and of lost.jsonl for
    each attempt that brought none; then the evaluation. Raises what the loop raises.
    """
    manifest = run.manifest

    def validate(state: AdapterState, phase: int) -> Mapping[str, float]:
        head_only = manifest.phases[phase].name == "head"
        return run.public.validation.evaluate(state, head_only=head_only)

    log = MetricsLog(run.folder, run.checkpoint, run.began, observe)
    around = replace(around, lose=log.lose)
    progress = run_rounds(
        run.checkpoint, cohort, run.strategies, run.rules, validate, log.write, around
    )
    count_hold_outs(run.folder, run.checkpoint, cohort, progress.release, run.rules, around)
    return progress


def to_its_end(
    checkpoint: Checkpoint,
    work: Callable[[], Progress],
    finish: Callable[[Progress, str], dict[str, Any]],
) -> dict[str, Any]:
    """The summary that `finish` makes of where `work` got to.

    A run that ends early is finished with the reason, where it has committed a round or is over;
    then what ended it is raised.
    """
    try:
        progress = work()
    except (Refused, QuorumLost) as error:
        reached = checkpoint.load()
        if reached.round > 0 or isinstance(error, Spent):
            finish(reached, str(error))
        raise
    return finish(progress, "")


def conclude(
    run: Run,
    progress: Progress,
    reserved: Mapping[str, float],
    more: Callable[[], Mapping[str, Any]],
) -> dict[str, Any]:
    """Score the test file, export the adapter, write summary.json.

    `reserved` is the ε that each institution's ledger proves. `more` is asked once the test file is
    scored, for what else stands in the summary.
    """
    started = time.monotonic()
    run.public.features.clear()
    lines = [line.value for line in lines_of(run.folder / METRICS)]
    start, taught = scored_start(run.public, run.folder)
    known = [{"round": 0, **start["validation"]}, *lines] if start else lines
    phases = phase_table(run.manifest, progress, run.public.test, known)
    model, recipe = run.public.model, run.public.recipe
    adapter = run.folder / "adapter"
    export_adapter(model, progress.release, recipe.model, model.lora, recipe.seed, adapter)
    summary = summary_of(run.manifest, run.public, run.folder, progress, phases, lines, reserved)
    summary["seconds"] += time.monotonic() - started
    summary["privacy_statement"] += run.caveats
    summary |= {"public_start": start, "public_records": records_learnt(start)}
    summary["evaluation"] = at_institutions(run.manifest, kept_counts(run.folder))
    meant = any(phase.name != "head" for phase in run.manifest.phases)  # that rounds move LoRA
    confusion = run.public.test.totals.get("confusion")
    summary["warnings"] = doubts(confusion, progress.release, taught, meant)
    summary |= {"clients": run.clients, "engine": run.engine, "config": run.config, **more()}
    write_summary(run.folder, summary)
    return summary


def rules_of(
    federation: FederationConfig,
    server: ServerConfig,
    asked: AggregationConfig,
    manifest: RunManifest,
) -> Rules:
    """How the rounds of a run end."""
    return Rules(
        quorum=federation.quorum,
        average_last=server.average_last,
        patience=federation.patience,
        evaluate_every=federation.evaluate_every,
        minimum=max(manifest.minimum_cohort, asked.fewest),
    )


def strategies_of(server: ServerConfig, manifest: RunManifest) -> tuple[FedAvg, ...]:
    """The configured server optimiser of each phase."""
    return tuple(_strategy(server, phase) for phase in manifest.phases)


def _strategy(server: ServerConfig, phase: Phase) -> FedAvg:
    name, rate = (
        (server.head_optimizer, server.head_learning_rate)
        if phase.name == "head"
        else (server.optimizer, server.learning_rate)
    )
    schedule = RateSchedule(
        warmup=0 if phase.name == "head" else round(server.warmup * phase.rounds),
        decay=phase.rounds if server.decay == "linear" else 0,
    )
    return FedAvg(ServerOptimizer(name, rate, server.momentum, server.beta2), schedule)
