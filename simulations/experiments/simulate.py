"""A run as a person starts it: progress on a terminal, one summary, one report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from fedlora.common.config.schema import Config
from fedlora.common.model.compute import threads as with_threads
from fedlora.server.rounds.checkpoint import Progress
from fedlora.server.runs.metrics import Observe
from fedlora.server.runs.run import conduct, to_its_end
from fedlora.simulations.begin import Options, begin
from fedlora.simulations.engines.sequential import sequential
from fedlora.simulations.experiments.progress import run_progress
from fedlora.simulations.federation.run_folder import SimulatedRun, finish
from fedlora.simulations.report.pages import write_report


def simulate(config: Config, folder: Path, console: Console, options: Options) -> dict[str, Any]:
    """Train, finish and report; returns the summary.

    A run that ends early leaves its last adapter, and raises why.
    """
    with with_threads(options.threads), run_progress(console, config.federation.rounds) as progress:
        run = begin(config, folder, options, progress.features)
        progress.expect_features(run.federation.feature_records)

        def finished(reached: Progress, ended: str) -> dict[str, Any]:
            summary = finish(run, reached, ended)
            write_report(run.folder)
            return summary

        return to_its_end(run.checkpoint, lambda: _trained(run, progress.round), finished)


def _trained(run: SimulatedRun, observe: Observe) -> Progress:
    if run.engine == "ray":
        from fedlora.simulations.engines.ray import train_on_ray

        return train_on_ray(run, observe)
    return conduct(run, sequential(run), observe)
