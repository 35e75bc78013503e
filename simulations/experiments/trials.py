"""Runs that belong together: each in a folder of its own, finished ones kept, begun ones go on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from fedlora.common.config.load import load_config
from fedlora.common.config.schema import Config
from fedlora.common.errors import BadInput
from fedlora.common.model.features import PooledTexts
from fedlora.simulations.chosen import CONFIG, differing
from fedlora.simulations.experiments.simulate import Result, simulate
from fedlora.simulations.options import Options

Summary = Mapping[str, Any]
Run = Callable[[Config, Path, Options], Result]
# of a trial's summary, what a page about many shows
KEPT = (
    *("accuracy", "entity_f1", "micro_f1", "spearman", "macro_f1", "perplexity", "loss"),
    *("epsilon", "delta", "mode", "seconds", "validation"),
)


def run_trials(
    trials: Mapping[str, Config],
    folder: Path,
    options: Options,
    run: Run = simulate,
    workers: int = 1,
) -> Iterator[tuple[str, Summary]]:
    """Each trial's name and what is kept of its summary, as they end; names are paths in `folder`.

    With several `workers` as many run at a time, each in a process of its own; else one after the
    other, by `run`. BadInput where a folder holds a trial of another configuration.
    """
    done = {name: _finished(folder / name, trial) for name, trial in trials.items()}
    left = {name: trial for name, trial in trials.items() if done[name] is None}
    if workers == 1 or len(left) < 2:
        shared = replace(options, texts=PooledTexts())
        for name, trial in trials.items():
            found = done[name] or _summary(trial, folder / name, shared, run)
            yield name, _kept(found)
        return
    yield from ((name, _kept(found)) for name, found in done.items() if found is not None)
    each = replace(options, threads=options.threads or max(1, (os.cpu_count() or 1) // workers))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        running: dict[Future[Summary], str] = {
            pool.submit(_summary, trial, folder / name, each): name for name, trial in left.items()
        }
        try:
            for ended in as_completed(running):
                yield running[ended], _kept(ended.result())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _summary(trial: Config, target: Path, options: Options, run: Run = simulate) -> Summary:
    begun = (target / "checkpoint" / "manifest.json").exists()
    return run(trial, target, replace(options, resume=begun)).summary


def _kept(summary: Summary) -> Summary:
    return {name: summary.get(name) for name in KEPT}


def _finished(target: Path, trial: Config) -> Summary | None:
    """The summary of a trial that was run before; BadInput where it can't stand for this one."""
    if not (target / "summary.json").is_file():
        return None
    if differing(trial, load_config(target / CONFIG)):
        raise BadInput(f"{target}: found a trial of another configuration, expected another --out")
    summary: dict[str, Any] = json.loads((target / "summary.json").read_text(encoding="utf-8"))
    if summary.get("ended"):
        raise BadInput(
            f"{target}: found a trial that ended early ({summary['ended']}), expected another --out"
        )
    return summary
