"""A run as a person starts it: progress on a terminal, one summary, one report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fedlora.common.config.schema import Config
from fedlora.common.errors import BadInput
from fedlora.common.model.compute import threads as with_threads
from fedlora.common.model.features import PooledTexts
from fedlora.server.rounds.checkpoint import Progress
from fedlora.server.runs.metrics import Observe
from fedlora.server.runs.run import has_result, to_its_end
from fedlora.simulations.engines.sequential import sequential
from fedlora.simulations.experiments.progress import run_progress
from fedlora.simulations.federation.run_folder import Paths, Run, begin, finish, train
from fedlora.simulations.report.pages import write_report

ENGINES = ("sequential", "ray")


def run_to_report(
    config: Config,
    folder: Path,
    console: Console,
    engine: str = "sequential",
    resume: bool = False,
    ledger: Path | None = None,
    device: str = "auto",
    threads: int = 0,
    synthetic: bool = False,
    texts: PooledTexts | None = None,
) -> dict[str, Any]:
    """Train, finish and report; returns the summary.

    A run that ends early leaves its last adapter, and raises why.
    """
    if engine == "batched":
        raise BadInput("--engine batched: not built yet; expected sequential or ray")
    if engine not in ENGINES:
        raise BadInput(f"--engine {engine}: expected one of {', '.join(ENGINES)}")
    paths = Paths.of(folder, ledger)
    with with_threads(threads), run_progress(console, config.federation.rounds) as progress:
        run = begin(config, paths, resume, engine, progress.features, torch_device(device), texts)
        progress.expect_features(run.federation.feature_records)
        done, ended = to_its_end(run.checkpoint, lambda: _trained(run, engine, progress.round))
        if has_result(done, ended):
            summary = finish(run, done, synthetic, str(ended or ""))
            write_report(paths.folder)
    if ended is not None:
        raise ended
    return summary


def _trained(run: Run, engine: str, observe: Observe) -> Progress:
    if engine == "ray":
        from fedlora.simulations.engines.ray import train_on_ray

        return train_on_ray(run, observe)
    return train(run, sequential(run), observe)


def torch_device(name: str) -> torch.device:
    """cpu, cuda, or auto: a GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise BadInput(f"--device {name}: expected cpu, cuda or auto")
    if name == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device cuda: found no GPU")
    return torch.device(name)
