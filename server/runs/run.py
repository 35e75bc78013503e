"""One run at the coordinator: the round loop over a cohort, a line a round, what is summed up.

Simulation and deployment conduct a run alike; they differ in the cohort, and in what else they may
know.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fedlora.common.adapter.peft import export_adapter
from fedlora.common.config.schema import FederationConfig, ServerConfig
from fedlora.common.disk.files import lines_of, write_text
from fedlora.common.errors import QuorumLost, Refused, Spent
from fedlora.common.manifest.manifest import Phase, RunManifest
from fedlora.common.model.state import AdapterState
from fedlora.common.privacy.modes import guarantee_of
from fedlora.server.rounds.checkpoint import Checkpoint, Progress
from fedlora.server.rounds.cohort import Cohort
from fedlora.server.rounds.loop import RoundRecord, Rules, run_rounds
from fedlora.server.runs.phases import phase_table
from fedlora.server.runs.public_data import PublicSide
from fedlora.server.runs.summary import summary_of, write_summary
from fedlora.server.strategies.averaging import FedAvg, ServerOptimizer
from fedlora.server.strategies.strategy import Strategy

WATCHED = ("accuracy", "loss", "epsilon", "examples_per_second")
# a round's number, and what a person watches
Observe = Callable[[int, Mapping[str, float | None]], None]


def nobody(number: int, figures: Mapping[str, float | None]) -> None:
    """Nobody watches."""


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
    caveats: tuple[str, ...] = ()  # sentences that the privacy statement ends with
    began: float = field(default_factory=time.monotonic)

    @property
    def manifest(self) -> RunManifest:
        """The checkpoint's."""
        return self.checkpoint.manifest


def conduct(run: Run, cohort: Cohort, observe: Observe = nobody) -> Progress:
    """The round loop, with a line of metrics.jsonl for each committed round.

    Raises what the loop raises.
    """
    manifest = run.manifest

    def validate(state: AdapterState, phase: int) -> Mapping[str, float]:
        head_only = manifest.phases[phase].name == "head"
        return run.public.validation.evaluate(state, head_only=head_only)

    log = MetricsLog(run.folder, run.checkpoint, run.began, observe)
    return run_rounds(run.checkpoint, cohort, run.strategies, run.rules, validate, log.write)


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
    lines = [line.value for line in lines_of(run.folder / "metrics.jsonl")]
    phases = phase_table(run.manifest, progress, run.public.test, lines)
    model, recipe = run.public.model, run.public.recipe
    adapter = run.folder / "adapter"
    export_adapter(model, progress.release, recipe.model, model.lora, recipe.seed, adapter)
    summary = summary_of(run.manifest, run.public, run.folder, progress, phases, lines, reserved)
    summary["seconds"] += time.monotonic() - started
    summary["privacy_statement"] += run.caveats
    summary |= {"clients": run.clients, "engine": run.engine, "config": run.config, **more()}
    write_summary(run.folder, summary)
    return summary


def rules_of(federation: FederationConfig, server: ServerConfig, manifest: RunManifest) -> Rules:
    """How the rounds of a run end."""
    return Rules(
        quorum=federation.quorum,
        average_last=server.average_last,
        patience=federation.patience,
        evaluate_every=federation.evaluate_every,
        minimum=manifest.minimum_cohort,
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
    decay = phase.rounds if server.decay == "linear" else 0
    return FedAvg(ServerOptimizer(name, rate, server.momentum, server.beta2), decay)


def epsilon_after(manifest: RunManifest, attempts: list[int]) -> float | None:
    """ε of the attempts begun so far, by phase; None where the run is not private."""
    guarantee = guarantee_of(manifest)
    return guarantee.epsilon_of(attempts) if guarantee.private else None


class MetricsLog:
    """Appends to metrics.jsonl; lines beyond the last commit (killed in between) go first."""

    def __init__(
        self, folder: Path, checkpoint: Checkpoint, began: float, observe: Observe
    ) -> None:
        self._checkpoint = checkpoint
        self._began = began
        self._observe = observe
        self._path = folder / "metrics.jsonl"
        committed = checkpoint.load().round
        lines = self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else []
        kept = [line for line in lines if _round_of(line) <= committed]
        write_text(self._path, "".join(line + "\n" for line in kept))
        self._earlier = max((json.loads(line)["elapsed_seconds"] for line in kept), default=0.0)

    def write(self, record: RoundRecord, progress: Progress) -> None:
        """Append the line of a round that was committed, and tell who watches."""
        line = self._line(record)
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
        self._observe(record.round, {name: line.get(name) for name in WATCHED})

    def _line(self, record: RoundRecord) -> dict[str, Any]:
        checkpoint, manifest = self._checkpoint, self._checkpoint.manifest
        phase = next(phase for phase in manifest.phases if phase.name == record.phase)
        attempts = [checkpoint.attempts_begun(index) for index in range(len(manifest.phases))]
        # by the public normaliser: how many units were really drawn does not leave a node
        examples = record.replies * phase.steps * phase.expected_units
        return {
            "round": record.round,
            "phase": record.phase,
            "attempt": record.attempt,
            "seconds": record.seconds,
            "elapsed_seconds": self._earlier + time.monotonic() - self._began,
            "epsilon": epsilon_after(manifest, attempts),
            "asked": record.asked,
            "replies": record.replies,
            "failures": [[failure.client, failure.reason] for failure in record.failures],
            **({} if record.secure is None else {"secure": asdict(record.secure)}),
            "examples_per_second": examples / max(record.seconds, 1e-9),
            **record.metrics,
        }


def _round_of(line: str) -> float:
    """The round of a line of metrics.jsonl.

    Infinite where the line was cut off, or is none that was written.
    """
    try:
        table = json.loads(line)
        figures = [
            float(table[name])
            for name in ("elapsed_seconds", "seconds", "examples_per_second", "replies")
        ]
        return float(table["round"]) if all(map(math.isfinite, figures)) else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf
