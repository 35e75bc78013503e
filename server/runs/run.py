"""One run at the coordinator: the round loop over a cohort, a line a round, what is summed up.

Simulation and deployment conduct a run alike; they differ in the cohort, and in what else they may
know.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from fedlora.common.adapter.peft import export_adapter
from fedlora.common.config.schema import Config
from fedlora.common.errors import FedloraError, QuorumLost, Refused, Spent
from fedlora.common.manifest.manifest import Phase
from fedlora.common.model.state import AdapterState
from fedlora.server.rounds.checkpoint import Checkpoint, Progress
from fedlora.server.rounds.cohort import Cohort
from fedlora.server.rounds.loop import Rules, run_rounds
from fedlora.server.runs.metrics import Conducted, MetricsLog, Observe
from fedlora.server.runs.summary import summary_of
from fedlora.server.strategies.averaging import FedAvg, ServerOptimizer


def conduct(
    run: Conducted, cohort: Cohort, observe: Observe = lambda number, figures: None
) -> Progress:
    """The round loop, with a line of metrics.jsonl for each committed round."""
    config, manifest = run.config, run.manifest

    def validate(state: AdapterState, phase: int) -> Mapping[str, float]:
        return run.public.validation.evaluate(
            state, head_only=manifest.phases[phase].name == "head"
        )

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
        observe=MetricsLog(run, observe).write,
    )


def to_its_end(
    checkpoint: Checkpoint, work: Callable[[], Progress]
) -> tuple[Progress, FedloraError | None]:
    """Where `work` got to, and what it ended with where that is not the last round."""
    try:
        return work(), None
    except (Refused, QuorumLost) as error:
        return checkpoint.load(), error


def has_result(progress: Progress, ended: FedloraError | None) -> bool:
    """Whether there is an adapter to leave.

    Of a run that is done, that has committed a round, or that is over.
    """
    return ended is None or progress.round > 0 or isinstance(ended, Spent)


def conclude(run: Conducted, progress: Progress, reserved: Mapping[str, float]) -> dict[str, Any]:
    """Score the test file, export the adapter; the summary that every run has. `reserved` is the ε
    that each institution's ledger proves.
    """
    started = time.monotonic()
    run.public.features.clear()
    metrics = run.public.test.evaluate(progress.released)
    config = run.config
    export_adapter(
        run.public.model,
        progress.released,
        config.model,
        run.public.model.lora,
        config.seed,
        run.folder / "adapter",
    )
    summary = summary_of(run, progress, metrics, reserved)
    summary["seconds"] += time.monotonic() - started
    return summary


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
