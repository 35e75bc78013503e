"""One run for each value of a key, and the privacy-utility curve over them.

Choosing the best of several trials leaks something about the data that no trial's ε covers: the
page says that the trials were not accounted together.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedlora.common.config.load import load_config
from fedlora.common.config.schema import Config
from fedlora.common.disk.files import write_atomically
from fedlora.common.errors import BadInput
from fedlora.common.model.features import PooledTexts
from fedlora.server.runs.rules import agree
from fedlora.simulations.begin import DEFAULTS, Options
from fedlora.simulations.chosen import CONFIG
from fedlora.simulations.experiments.configuration import changed, override
from fedlora.simulations.experiments.simulate import Result, simulate
from fedlora.simulations.report.pages import write_sweep_report

KEPT = (
    "accuracy",
    "entity_f1",
    "micro_f1",
    "spearman",
    "macro_f1",
    "perplexity",
    "loss",
    "epsilon",
    "delta",
    "mode",
    "seconds",
    "validation",
)
Run = Callable[[Config, Path, Options], Result]


@dataclass(frozen=True)
class Sweep:
    """The trials in the order of their values, and the page that draws them."""

    trials: tuple[Mapping[str, Any], ...]
    page: Path


def sweep(
    config: Config,
    key: str,
    values: Sequence[object],
    folder: Path | str,
    options: Options = DEFAULTS,
    run: Run = simulate,
) -> Sweep:
    """`run` the configuration once for each value of `key`, which is "section.key".

    sweep.json and sweep.html under `folder`, a folder for each trial; finished ones are kept, begun
    ones go on.
    """
    if "." not in key or not values:
        raise BadInput(f"sweep over {key!r}: expected section.key, and values")
    # all of them first: a bad value is named before anything runs
    settings = {override(key, value): changed(config, override(key, value)) for value in values}
    trials, options = [], replace(options, texts=PooledTexts())
    for setting, trial in settings.items():
        target = Path(folder) / setting.replace("/", "_")
        resume = (target / "checkpoint" / "manifest.json").exists()
        summary = (
            _finished(target, trial) or run(trial, target, replace(options, resume=resume)).summary
        )
        value = setting.partition("=")[2]
        trials.append({"key": key, "value": value, **{name: summary.get(name) for name in KEPT}})
        written = (json.dumps(trials, indent=2) + "\n").encode()
        write_atomically(Path(folder) / "sweep.json", written)
    return Sweep(tuple(trials), write_sweep_report(Path(folder)))


def _finished(target: Path, trial: Config) -> Mapping[str, Any] | None:
    """The summary of a trial that was run before; BadInput where it can't stand for this one."""
    if not (target / "summary.json").is_file():
        return None
    if not agree(trial, load_config(target / CONFIG)):
        raise BadInput(f"{target}: found a trial of another configuration, expected another --out")
    summary: dict[str, Any] = json.loads((target / "summary.json").read_text(encoding="utf-8"))
    if summary.get("ended"):
        raise BadInput(
            f"{target}: found a trial that ended early ({summary['ended']}), expected another --out"
        )
    return summary
