"""Several methods at several ε with several seeds: one table, means with spreads, one picture.

Choosing the best of several trials leaks something about the data that no trial's ε covers: the
page says that the trials were not accounted together.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rich.console import Console, ConsoleOptions
from rich.table import Table as Printed

from fedlora.common.config.schema import Config
from fedlora.common.disk.files import write_text
from fedlora.common.errors import BadInput
from fedlora.common.libraries import library
from fedlora.simulations.begin import checked
from fedlora.simulations.experiments.given import Table, with_records
from fedlora.simulations.experiments.methods import method_named
from fedlora.simulations.experiments.simulate import simulate
from fedlora.simulations.experiments.trials import Run, Summary, run_trials
from fedlora.simulations.options import DEFAULTS, Options
from fedlora.simulations.report.answers import headline
from fedlora.simulations.report.pages import write_comparison

TABLE = "compare.json"


@dataclass(frozen=True)
class Cell:
    """A method at an ε, over all seeds; `epsilon` None: without privacy."""

    method: str
    epsilon: float | None
    mean: float
    spread: float | None  # the standard deviation of seeds; None of a single one
    seeds: int
    minutes: float  # of a run
    validation: float | None  # the mean on public validation records, by which to choose


@dataclass(frozen=True)
class Comparison:
    """What was measured: `cells` by method and ε, `trials` each by itself."""

    measure: str
    cells: tuple[Cell, ...]
    trials: tuple[Mapping[str, Any], ...]
    page: Path

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Printed]:
        epsilons = list(dict.fromkeys(cell.epsilon for cell in self.cells))
        named = ("no privacy" if each is None else f"ε ≤ {each:g}" for each in epsilons)
        table = Printed(self.measure, *named, box=None)
        for method in dict.fromkeys(cell.method for cell in self.cells):
            mine = {cell.epsilon: cell for cell in self.cells if cell.method == method}
            table.add_row(method, *(_shown(mine.get(epsilon)) for epsilon in epsilons))
        yield table

    def frame(self) -> Any:
        """`cells` as a frame of pandas; BadInput where pandas is missing."""
        return library("pandas", "frames").DataFrame([asdict(cell) for cell in self.cells])


@dataclass(frozen=True)
class _Place:
    """Where a trial stands in the table."""

    method: str
    epsilon: float | None
    seed: int

    @property
    def folder(self) -> str:
        return f"{self.method}/{_named(self.epsilon)}/seed-{self.seed}"


def compare(
    config: Config,
    folder: Path | str,
    options: Options = DEFAULTS,
    *,
    methods: Sequence[str] = ("head", "lora", "head+lora"),
    epsilons: Sequence[float | None] = (1.0, 3.0, 8.0, None),
    seeds: int | Sequence[int] = 3,
    workers: int = 1,
    train: Table | None = None,
    test: Table | None = None,
    run: Run = simulate,
    on_trial: Callable[[str, Summary], None] = lambda name, summary: None,
) -> Comparison:
    """Run each of `methods` at each ε with each seed; a number of seeds counts from the config's.

    compare.json and compare.html under `folder`, a folder for each trial; finished ones are kept,
    begun ones go on. With several `workers` as many run at a time, in processes of their own.
    `train` and `test` are records given instead of files. BadInput before anything runs.
    """
    if isinstance(methods, str):
        raise BadInput(f"methods: found {methods!r}, expected a list of names")
    folder = Path(folder)
    config = with_records(checked(config), folder, train, test)
    given = range(config.seed, config.seed + seeds) if isinstance(seeds, int) else seeds
    asked = [None if each is None else _number(each) for each in epsilons]
    places = [_Place(*each) for each in product(methods, asked, given)]
    if not places or workers < 1:
        raise BadInput("compare: expected a method, an ε, a seed and a worker, at least")
    settings = {place.folder: _setting(config, place) for place in places}
    found: dict[str, Summary] = {}
    for name, summary in run_trials(settings, folder, options, run, workers):
        found[name] = summary
        on_trial(name, summary)
        trials = [_line(place, found) for place in places if place.folder in found]
        write_text(folder / TABLE, json.dumps(_table(trials), indent=2) + "\n")
    measure, cells = headline(trials[0]), _cells(trials)
    return Comparison(measure, cells, tuple(trials), write_comparison(folder))


def _setting(config: Config, place: _Place) -> Config:
    """A trial's configuration; BadInput where method and configuration don't go together."""
    privacy = (
        replace(config.privacy, mode="none")
        if place.epsilon is None
        else replace(config.privacy, epsilon=place.epsilon)
    )
    changed, method = replace(config, seed=place.seed, privacy=privacy), method_named(place.method)
    try:
        return checked(method(changed))
    except BadInput as error:
        raise BadInput([f"{place.method}: {fault}" for fault in error.faults]) from error


def _line(place: _Place, found: Mapping[str, Summary]) -> dict[str, Any]:
    kept = found[place.folder]
    asked = {"method": place.method, "asked": place.epsilon, "seed": place.seed}
    return {**asked, "folder": place.folder, **kept}


def _table(trials: Sequence[Summary]) -> dict[str, Any]:
    return {
        "measure": headline(trials[0]),
        "cells": [asdict(cell) for cell in _cells(trials)],
        "trials": list(trials),
    }


def _cells(trials: Sequence[Summary]) -> tuple[Cell, ...]:
    """A cell for each method and ε that has a trial, in their order."""
    name = headline(trials[0])
    groups: dict[tuple[str, float | None], list[Summary]] = {}
    for trial in trials:
        groups.setdefault((trial["method"], trial["asked"]), []).append(trial)
    return tuple(_cell(*key, group, name) for key, group in groups.items())


def _cell(method: str, epsilon: float | None, group: Sequence[Summary], name: str) -> Cell:
    values = [float(each[name]) for each in group]
    chosen = [(each.get("validation") or {}).get(name) for each in group]
    known = [float(value) for value in chosen if value is not None]
    return Cell(
        method=method,
        epsilon=epsilon,
        mean=fmean(values),
        spread=stdev(values) if len(values) > 1 else None,
        seeds=len(values),
        minutes=fmean(float(each["seconds"]) for each in group) / 60,
        validation=fmean(known) if known else None,
    )


def _shown(cell: Cell | None) -> str:
    if cell is None:
        return ""
    return f"{cell.mean:.4f}" + ("" if cell.spread is None else f" ± {cell.spread:.4f}")


def _number(epsilon: float) -> float:
    try:
        return float(epsilon)
    except (TypeError, ValueError) as error:
        raise BadInput(f"epsilons: found {epsilon!r}, expected numbers, or None") from error


def _named(epsilon: float | None) -> str:
    return "none" if epsilon is None else f"epsilon-{epsilon:g}"
