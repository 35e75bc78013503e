"""One run at the coordinator: the round loop over a cohort, a line for each round, and what is summed up at its end.

Simulation and deployment conduct a run alike; they differ in the cohort, and in what else they may know.
"""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fedlora.common.config import Config, config_to_toml
from fedlora.common.errors import FedloraError, QuorumLost, Refused, Spent
from fedlora.common.export import export_adapter
from fedlora.common.files import write_atomically
from fedlora.common.messages import Phase, RunManifest
from fedlora.common.privacy import charged_epsilon, epsilon_of_attempts
from fedlora.common.state import AdapterState
from fedlora.common.statement import (
    noise_source,
    privacy_statement,
    secure_statement,
    secure_summary,
    unit_of,
)
from fedlora.server.checkpoint import Checkpoint, Progress
from fedlora.server.public import PublicSide
from fedlora.server.rounds import Cohort, RoundRecord, Rules, run_rounds
from fedlora.server.secure_log import liars_in, sums_of
from fedlora.server.strategies.averaging import FedAvg, ServerOptimizer

Observe = Callable[[int, Mapping[str, float | None]], None]  # a round's number, and what a person watches


@dataclass(frozen=True, eq=False)
class Conducted:
    """A run that is under way: its configuration, its folder, what scores it, and where it stands."""

    config: Config
    folder: Path
    public: PublicSide
    checkpoint: Checkpoint
    engine: str
    began: float = field(default_factory=time.monotonic)

    @property
    def manifest(self) -> RunManifest:
        return self.checkpoint.manifest


def conduct(run: Conducted, cohort: Cohort, observe: Observe = lambda number, figures: None) -> Progress:
    """The round loop, with a line of metrics.jsonl for each committed round."""
    config, manifest = run.config, run.manifest

    def validate(state: AdapterState, phase: int) -> Mapping[str, float]:
        return run.public.validation.evaluate(state, head_only=manifest.phases[phase].name == "head")

    return run_rounds(
        checkpoint=run.checkpoint,
        cohort=cohort,
        strategies=[_strategy(config, phase) for phase in manifest.phases],
        rules=Rules(
            quorum=config.federation.quorum,
            average_last=config.server.average_last,
            patience=config.federation.patience,
            evaluate_every=config.federation.evaluate_every,
            minimum=manifest.minimum_cohort,
        ),
        validate=validate,
        observe=_MetricsLog(run, observe).write,
    )


def to_its_end(checkpoint: Checkpoint, work: Callable[[], Progress]) -> tuple[Progress, FedloraError | None]:
    """Where `work` got to, and what it ended with where that is not the last round."""
    try:
        return work(), None
    except (Refused, QuorumLost) as error:
        return checkpoint.load(), error


def has_result(progress: Progress, ended: FedloraError | None) -> bool:
    """Whether there is an adapter to leave: of a run that is done, that has committed a round, or that is over."""
    return ended is None or progress.round > 0 or isinstance(ended, Spent)


def conclude(run: Conducted, progress: Progress, epsilon_by_client: Mapping[str, float]) -> dict[str, Any]:
    """Score the test file, export the adapter; the summary that every run has."""
    started = time.monotonic()
    run.public.features.clear()
    metrics = run.public.test.evaluate(progress.released)
    config = run.config
    export_adapter(
        run.public.model,
        progress.released,
        config.model,
        config.lora,
        config.seed,
        run.folder / "adapter",
    )
    summary = _summary(run, progress, metrics, epsilon_by_client)
    summary["seconds"] += time.monotonic() - started
    return summary


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """summary.json, whole or not at all."""
    write_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")


def epsilon_after(manifest: RunManifest, attempts: list[int]) -> float | None:
    """ε of the attempts begun so far, by phase; None where the run is not private."""
    return None if manifest.mode == "none" else epsilon_of_attempts(manifest, attempts)


class _MetricsLog:
    """Appends to metrics.jsonl; lines beyond the last commit (killed in between) are dropped first."""

    def __init__(self, run: Conducted, observe: Observe) -> None:
        self._run = run
        self._observe = observe
        self._path = run.folder / "metrics.jsonl"
        committed = run.checkpoint.load().round
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        kept = [line for line in lines if _round_of(line) <= committed]
        write_text(self._path, "".join(line + "\n" for line in kept))
        self._earlier = max((json.loads(line)["elapsed_seconds"] for line in kept), default=0.0)

    def write(self, record: RoundRecord, progress: Progress) -> None:
        run = self._run
        phase = next(phase for phase in run.manifest.phases if phase.name == record.phase)
        attempts = [run.checkpoint.attempts_begun(index) for index in range(len(run.manifest.phases))]
        line = {
            "round": record.round,
            "phase": record.phase,
            "attempt": record.attempt,
            "seconds": record.seconds,
            "elapsed_seconds": self._earlier + time.monotonic() - run.began,
            "epsilon": epsilon_after(run.manifest, attempts),
            "asked": record.asked,
            "replies": record.replies,
            "failures": [[failure.client, failure.reason] for failure in record.failures],
            **({} if record.secure is None else {"secure": asdict(record.secure)}),
            # by the public normaliser: how many units were really drawn does not leave a node
            "examples_per_second": record.replies
            * phase.steps
            * phase.expected_units
            / max(record.seconds, 1e-9),
            **dict(record.metrics.items()),
        }
        with self._path.open("a") as stream:
            stream.write(json.dumps(line) + "\n")
        self._observe(
            record.round,
            {name: line.get(name) for name in ("accuracy", "loss", "epsilon", "examples_per_second")},  # type: ignore[misc]
        )


def _strategy(config: Config, phase: Phase) -> FedAvg:
    server = config.server
    head = phase.name == "head"
    name, rate = (
        (server.head_optimizer, server.head_learning_rate)
        if head
        else (server.optimizer, server.learning_rate)
    )
    decay = phase.rounds if server.decay == "linear" else 0
    return FedAvg(ServerOptimizer(name, rate, server.momentum, server.beta2), decay)


def _summary(
    run: Conducted,
    progress: Progress,
    metrics: Mapping[str, float],
    by_client: Mapping[str, float],
) -> dict[str, Any]:
    manifest, config, public = run.manifest, run.config, run.public
    private, whole = manifest.mode != "none", manifest.mode == "client"
    epsilon = max(by_client.values(), default=0.0) if private else None
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    seconds = sum(line["seconds"] for line in lines)
    examples = sum(line["examples_per_second"] * line["seconds"] for line in lines)
    return {
        "task": manifest.task,
        **metrics,
        "epsilon": epsilon,
        "epsilon_by_client": dict(by_client) if private else {},
        "delta": manifest.delta if private else None,
        "epsilon_charged": charged_epsilon(manifest) if whole else epsilon,
        "unit": unit_of(manifest),
        "mode": manifest.mode,
        "schedule": [
            {
                "phase": phase.name,
                "steps": phase.attempts if whole else phase.steps * phase.attempts,
                "sampling_rate": 1.0 if whole else phase.sampling_rate,
                "noise_multiplier": phase.noise_multiplier,
            }
            for phase in manifest.phases
        ],
        "rounds": progress.round,
        "clients": config.federation.clients,
        "seconds": (lines[-1]["elapsed_seconds"] if lines else 0.0),
        "training_seconds": seconds,
        "examples_per_second": examples / seconds if seconds else 0.0,
        "client_rounds_per_second": sum(line["replies"] for line in lines) / seconds if seconds else 0.0,
        "peak_rss_bytes": peak_rss_bytes(),
        "trainable_parameters": public.model.spec.size,
        "strategy": manifest.strategy,
        "engine": run.engine,
        "secure_aggregation": manifest.secure is not None,
        "secure": secure_summary(manifest, sums_of(run.folder), liars_in(run.folder)),
        "base_digest": manifest.base_digest,
        "adapter_digest": progress.released.digest,
        "attention": public.compute.attention,
        "precision": public.compute.precision,
        "noise_source": noise_source(manifest),
        "privacy_statement": [*privacy_statement(manifest, epsilon), *secure_statement(manifest)],
        "validation": {key: lines[-1][key] for key in metrics if lines and key in lines[-1]},
        "versions": versions(),
        "config": config_to_toml(config),
    }


def versions() -> dict[str, str]:
    """Of everything that can change a result."""
    from importlib.metadata import version

    names = ("fedlora", "torch", "transformers", "peft", "opacus", "numpy", "flwr")
    return {"python": sys.version.split()[0]} | {name: version(name) for name in names}


def peak_rss_bytes() -> int:
    """The most memory that this program held; getrusage would count what its parent held before it."""
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.encode())


def _round_of(line: str) -> float:
    """The round of a line of metrics.jsonl; infinite where the line was cut off, or is none that was written."""
    try:
        table = json.loads(line)
        figures = [
            float(table[name]) for name in ("elapsed_seconds", "seconds", "examples_per_second", "replies")
        ]
        return float(table["round"]) if all(map(math.isfinite, figures)) else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf
