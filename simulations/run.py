"""One simulated run, from configuration to report: the order of events, and nothing else.

    1. build the federation; make the manifest, or read the one of the run that is resumed
    2. the round loop over a cohort: in this process, or Flower's on Ray
    3. the test file, once; the adapter; the summary; the report

Everything that a later reader needs lies in the run's folder; the report reads only files.
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

import numpy as np
import torch

from fedlora.client.trainer import MomentStore
from fedlora.common.config import Config, config_to_toml
from fedlora.common.errors import BadInput
from fedlora.common.export import export_adapter
from fedlora.common.features import PooledTexts
from fedlora.common.features import Progress as FeatureProgress
from fedlora.common.files import write_atomically
from fedlora.common.ledger import Ledger
from fedlora.common.messages import Phase, RunManifest
from fedlora.common.privacy import Mechanism, default_cache, epsilon_of
from fedlora.common.state import AdapterState
from fedlora.common.statement import NOISE_SOURCE, privacy_statement, secure_statement, secure_summary
from fedlora.server.checkpoint import Checkpoint, Progress
from fedlora.server.rounds import Cohort, RoundRecord, Rules, run_rounds
from fedlora.server.strategies.averaging import FedAvg, ServerOptimizer
from fedlora.simulations.engine import SequentialCohort, secure_cohort
from fedlora.simulations.federation import Federation, client_name

Observe = Callable[[int, Mapping[str, float | None]], None]
OpenCohort = Callable[["Run"], Cohort]


@dataclass(frozen=True)
class Paths:
    """A run's folder, and where its ledger is: shared between runs where `ledger` says so."""

    folder: Path
    ledger: Path
    checkpoint: Path

    @classmethod
    def of(cls, folder: Path, ledger: Path | None = None) -> Paths:
        folder = folder.resolve()
        return cls(folder, (ledger or folder / "ledger.sqlite").resolve(), folder / "checkpoint")

    def open_ledger(self) -> Ledger:
        """The ledger; its signed head lies apart from it, with the run or beside a shared ledger."""
        own = self.ledger.parent == self.folder
        head = self.checkpoint / "ledger-head.json" if own else self.ledger.with_suffix(".head.json")
        key = self.checkpoint / "ledger.key" if own else self.ledger.with_suffix(".key")
        return Ledger.open(self.ledger, head, key)


@dataclass(eq=False)
class Run:
    """A run that was begun or resumed: what a cohort and the round loop need."""

    config: Config
    paths: Paths
    federation: Federation
    checkpoint: Checkpoint
    ledger: Ledger
    engine: str
    began: float = field(default_factory=time.monotonic)

    @property
    def manifest(self) -> RunManifest:
        return self.checkpoint.manifest

    @property
    def moments(self) -> MomentStore:
        return MomentStore(self.paths.folder / "clients")


def begin(
    config: Config,
    paths: Paths,
    resume: bool = False,
    engine: str = "sequential",
    progress: FeatureProgress | None = None,
    device: torch.device | None = None,
    texts: PooledTexts | None = None,
) -> Run:
    """Build everything; `texts` are shared with other runs of this process. BadInput where the folder holds another run, or, with `resume`, none."""
    _check_folder(config, paths, resume)
    if engine == "ray" and config.aggregation.secure:
        raise BadInput(
            "--engine ray: [aggregation] secure = true is not built yet there; expected sequential"
        )
    federation = Federation.build(config, paths.folder, progress, device, texts)
    data = paths.folder / "data.sha256"
    if resume:
        if data.read_text().strip() != federation.data_digest:
            raise BadInput(
                f"{config.data.train}: found other bytes than the run began with, expected the same file"
            )
        checkpoint = Checkpoint.open(paths.checkpoint, federation.model.spec)
    else:
        manifest = federation.manifest(default_cache())
        checkpoint = Checkpoint.create(paths.checkpoint, manifest, federation.initial)
        _write(paths.folder / "config.toml", config_to_toml(config))
        _write(data, federation.data_digest + "\n")
        _write(paths.folder / "manifest.json", manifest.to_bytes().decode() + "\n")
    ledger = paths.open_ledger()
    checkpoint.check_against_ledger(ledger.attempts_used(checkpoint.manifest.digest))
    return Run(config, paths, federation, checkpoint, ledger, engine)


def sequential(run: Run) -> Cohort:
    """The in-process engine; with secure aggregation the coordinator's part of it learns sums only."""
    if run.manifest.secure is not None:
        return secure_cohort(run.federation, run.manifest, run.ledger, run.moments)
    return SequentialCohort(run.federation, run.manifest, run.ledger, run.moments)


def train(run: Run, cohort: Cohort, observe: Observe = lambda number, figures: None) -> Progress:
    """The round loop, with a line of metrics.jsonl for each committed round."""
    federation, config = run.federation, run.config
    log = _MetricsLog(run, observe)

    def validate(state: AdapterState, phase: int) -> Mapping[str, float]:
        return federation.validation.evaluate(state, head_only=run.manifest.phases[phase].name == "head")

    return run_rounds(
        checkpoint=run.checkpoint,
        cohort=cohort,
        strategies=[_strategy(config, phase) for phase in run.manifest.phases],
        rules=Rules(
            quorum=config.federation.quorum,
            average_last=config.server.average_last,
            patience=config.federation.patience,
            evaluate_every=config.federation.evaluate_every,
        ),
        validate=validate,
        observe=log.write,
    )


def finish(run: Run, progress: Progress, synthetic: bool = False) -> dict[str, Any]:
    """Score the test file, export the adapter, write summary.json; what stands in it is returned."""
    run.federation.features.clear()
    metrics = run.federation.test.evaluate(progress.released)
    export_adapter(
        run.federation.model,
        progress.released,
        run.config.model,
        run.config.lora,
        run.config.seed,
        run.paths.folder / "adapter",
    )
    summary = _summary(run, progress, metrics) | {"synthetic": synthetic}
    write_summary(run.paths.folder, summary)
    return summary


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """summary.json, whole or not at all."""
    _write(folder / "summary.json", json.dumps(summary, indent=2) + "\n")


def epsilon_after(manifest: RunManifest, attempts: list[int]) -> float | None:
    """ε of the attempts begun so far, by phase; None where the run is not private."""
    if manifest.mode == "none":
        return None
    done = [
        Mechanism(phase.sampling_rate, phase.noise_multiplier, phase.steps * count)
        for phase, count in zip(manifest.phases, attempts, strict=True)
    ]
    return epsilon_of(done, manifest.delta)


class _MetricsLog:
    """Appends to metrics.jsonl; lines beyond the last commit (killed in between) are dropped first."""

    def __init__(self, run: Run, observe: Observe) -> None:
        self._run = run
        self._observe = observe
        self._path = run.paths.folder / "metrics.jsonl"
        committed = run.checkpoint.load().round
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        kept = [line for line in lines if _round_of(line) <= committed]
        _write(self._path, "".join(line + "\n" for line in kept))
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


def _summary(run: Run, progress: Progress, metrics: Mapping[str, float]) -> dict[str, Any]:
    manifest, config, federation = run.manifest, run.config, run.federation
    private = manifest.mode == "record"
    by_client = _epsilon_by_client(run)
    epsilon = max(by_client.values(), default=0.0) if private else None
    lines = [json.loads(line) for line in (run.paths.folder / "metrics.jsonl").read_text().splitlines()]
    seconds = sum(line["seconds"] for line in lines)
    examples = sum(line["examples_per_second"] * line["seconds"] for line in lines)
    return {
        "task": manifest.task,
        **metrics,
        "epsilon": epsilon,
        "epsilon_by_client": by_client if private else {},
        "delta": manifest.delta if private else None,
        "unit": manifest.unit or "record",
        "mode": manifest.mode,
        "schedule": [
            {
                "phase": phase.name,
                "steps": phase.steps * phase.attempts,
                "sampling_rate": phase.sampling_rate,
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
        "trainable_parameters": federation.model.spec.size,
        "strategy": manifest.strategy,
        "engine": run.engine,
        "secure_aggregation": manifest.secure is not None,
        "secure": secure_summary(manifest, [line["secure"] for line in lines if "secure" in line]),
        "base_digest": manifest.base_digest,
        "adapter_digest": progress.released.digest,
        "attention": federation.compute.attention,
        "precision": federation.compute.precision,
        "truncated": {name: int(count) for name, count in federation.train.truncated.items()},
        "noise_source": NOISE_SOURCE if private else None,
        "privacy_statement": [*privacy_statement(manifest, epsilon), *secure_statement(manifest)],
        "validation": {key: lines[-1][key] for key in metrics if lines and key in lines[-1]},
        **_by_class(run),
        "partition": federation.partition_table(),
        "versions": versions(),
        "config": config_to_toml(config),
    }


def _epsilon_by_client(run: Run) -> dict[str, float]:
    """What the ledger proves: each client's consent to this run covers its whole schedule."""
    result = {}
    for client in run.federation.clients:
        spend = run.ledger.reserved_for(run.federation.budget_name(client), run.manifest.digest)
        result[client_name(client)] = 0.0 if spend is None else spend.epsilon
    return result


def _by_class(run: Run) -> dict[str, Any]:
    """Confusion, recall, and each client's accuracy: the recall of each class, weighted by its label mix."""
    confusion = run.federation.test.totals.get("confusion")
    if confusion is None:
        return {"labels": []}
    total = confusion.sum(axis=1)
    recall = np.divide(np.diag(confusion), total, out=np.zeros(len(total)), where=total > 0)
    labels = list(run.manifest.labels)
    mixes = run.federation.label_counts()
    return {
        "labels": labels,
        "confusion": confusion.astype(int).tolist(),
        "recall_by_class": {label: float(value) for label, value in zip(labels, recall, strict=True)},
        "accuracy_by_client": {
            client_name(client): float(mix @ recall / max(mix.sum(), 1)) for client, mix in enumerate(mixes)
        },
    }


def _check_folder(config: Config, paths: Paths, resume: bool) -> None:
    begun = (paths.checkpoint / "manifest.json").exists()
    if begun and not resume:
        raise BadInput(f"{paths.folder}: found a run, expected an empty folder; --resume goes on with it")
    if not resume:
        return
    if not begun:
        raise BadInput(f"{paths.folder}: found no run to resume")
    before = (paths.folder / "config.toml").read_text()
    if before != config_to_toml(config):
        raise BadInput(
            f"{paths.folder}/config.toml: found another configuration than the one given to --resume"
        )


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


def _round_of(line: str) -> float:
    """The round of a line of metrics.jsonl; infinite where the line was cut off."""
    try:
        return float(json.loads(line)["round"])
    except (ValueError, KeyError):
        return math.inf


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.encode())
