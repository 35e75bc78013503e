"""One run for each value of a key, and the privacy-utility curve over them.

Choosing the best of several trials leaks something about the data that no trial's ε covers: the
page says that the trials were not accounted together.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.common.config.schema import Config
from fedlora.common.disk.files import write_text
from fedlora.common.errors import BadInput
from fedlora.simulations.experiments.configuration import changed, override
from fedlora.simulations.experiments.simulate import simulate
from fedlora.simulations.experiments.trials import Run, run_trials
from fedlora.simulations.options import DEFAULTS, Options
from fedlora.simulations.report.pages import write_sweep_report


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
    values = [] if isinstance(values, str) else list(values)
    if "." not in key or not values:
        raise BadInput(f"sweep over {key!r}: expected section.key, and a list of values")
    settings = _settings(config, [override(key, value) for value in values])
    named = {setting.replace("/", "_"): setting for setting in settings}
    trials: list[Mapping[str, Any]] = []
    runs = {name: settings[setting] for name, setting in named.items()}
    for name, summary in run_trials(runs, Path(folder), options, run):
        trials.append({"key": key, "value": named[name].partition("=")[2], **summary})
        write_text(Path(folder) / "sweep.json", json.dumps(trials, indent=2) + "\n")
    return Sweep(tuple(trials), write_sweep_report(Path(folder)))


def _settings(config: Config, overrides: Sequence[str]) -> dict[str, Config]:
    """The configuration of each trial; before anything runs BadInput names every bad value."""
    settings, faults = dict[str, Config](), dict[str, None]()
    for each in overrides:
        try:
            settings[each] = changed(config, each)
        except BadInput as error:
            faults |= dict.fromkeys(_of_sweep(fault, each) for fault in error.faults)
    if faults:
        raise BadInput([*faults])
    return settings


def _of_sweep(fault: str, setting: str) -> str:
    """A fault of a value alone names the key itself; one of several fields does not."""
    rest = fault.removeprefix("--set ")
    return f"--over {rest}" if rest != fault else f"--over {setting}: {fault}"
