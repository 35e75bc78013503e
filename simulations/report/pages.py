"""report.html and sweep.html: self-contained pages, from the files of a run's folder alone.

Every text that came from a configuration, a data file or an institution is escaped by the template
engine; what is marked as safe is the SVG that `plots` draws, whose texts matplotlib escapes. There
is no script and no link to anything outside the page.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from fedlora.common.disk.files import lines_of, write_atomically
from fedlora.common.errors import BadInput
from fedlora.common.privacy.figures import shown_epsilon
from fedlora.simulations.report import answers, numbers, plots, sections
from fedlora.simulations.report.hold_outs import hold_outs
from fedlora.simulations.report.sections import Lines, Summary

TEMPLATES = Path(__file__).parent / "templates"
TECHNICAL = (
    ("loss", "Loss on the test file", numbers.number),
    ("macro_f1", "Macro F1 on the test file", numbers.percent),
    ("exact_match", "Records with exactly the right labels", numbers.percent),
    ("entity_precision", "Entities that were given and are right", numbers.percent),
    ("entity_recall", "Entities that were found", numbers.percent),
    ("word_accuracy", "Words with the right tag", numbers.percent),
    ("pearson", "Pearson on the test file", numbers.number),
    ("rmse", "Root of the mean squared error on the test file", numbers.number),
    ("chrf", "chrF of answers to public prompts (of 100)", numbers.number),
    ("bleu", "BLEU of answers to public prompts (of 100)", numbers.number),
    ("trainable_parameters", "Trainable parameters", numbers.number),
    ("strategy", "Strategy", str),
    ("engine", "Engine", str),
    ("secure_aggregation", "Secure aggregation", numbers.number),
    ("secure", "Cohorts and drop-outs", numbers.cohorts),
    ("seconds", "Time until the last round", numbers.duration),
    ("examples_per_second", "Examples a second (by the public normaliser)", numbers.number),
    ("client_rounds_per_second", "Client-rounds a second", numbers.number),
    ("peak_rss_bytes", "Peak memory", numbers.size),
    ("attention", "Attention", str),
    ("precision", "Precision", str),
    ("noise_source", "Noise", str),
    ("base_digest", "Base model", str),
    ("adapter_digest", "Released adapter", str),
)


def write_report(folder: Path) -> Path:
    """Write `folder`/report.html; BadInput where the run has not finished or a file is damaged."""
    summary, lines = _table(folder / "summary.json"), _lines(folder / "metrics.jsonl")
    values = {
        "name": folder.resolve().name,
        "summary": summary,
        "private": summary.get("epsilon") is not None,
        "base": sections.base(summary),
        "tested": int(np.sum(summary["confusion"])) if summary.get("confusion") else None,
        "baseline": sections.baseline(summary),
        "comparison": sections.comparison(summary),
        "title": answers.title(summary),
        "first": answers.first_figure(summary),
        "by_label": answers.by_label(summary),
        "samples": answers.samples(summary),
        "scatter": answers.scatter(summary),
        "rounds": sections.rounds(summary, lines),
        "phases": sections.phase_ends(summary),
        "clients": sections.clients(summary),
        "partition": sections.partition(summary),
        "hold_outs": hold_outs(summary),
        "participation": sections.participation(lines, summary["partition"]["clients"]),
        "errors": sections.errors(summary),
        "technical": [
            (title, show(summary[key]))
            for key, title, show in TECHNICAL
            if summary.get(key) is not None
        ],
    }
    return _write(folder / "report.html", "report.html", values)


def write_sweep_report(folder: Path) -> Path:
    """Write `folder`/sweep.html from sweep.json."""
    trials = _parsed(folder / "sweep.json")
    if not isinstance(trials, list) or not trials:
        raise BadInput(
            f"{folder / 'sweep.json'}: found no trials, expected a list with one object for each"
            " value"
        )
    metric = answers.headline(trials[0])
    values = {
        "trials": trials,
        "metric": metric,
        "key": trials[0]["key"],
        "show": answers.shown_as(metric),
        "picture": sections.curve(trials, metric),
    }
    return _write(folder / "sweep.html", "sweep.html", values)


def write_comparison(folder: Path) -> Path:
    """Write `folder`/compare.html from compare.json."""
    path = folder / "compare.json"
    table = _parsed(path)
    if not isinstance(table, dict) or not table.get("cells"):
        raise BadInput(f"{path}: found no cells, expected one for each method and ε")
    cells = {(cell["method"], cell["epsilon"]): cell for cell in table["cells"]}
    values = {
        "measure": table["measure"],
        "title": answers.HEADLINES[table["measure"]][0],
        "trials": table["trials"],
        "cells": cells,
        "methods": list(dict.fromkeys(method for method, _ in cells)),
        "epsilons": list(dict.fromkeys(epsilon for _, epsilon in cells)),
        "show": answers.shown_as(table["measure"]),
        "picture": plots.methods(table["cells"], *answers.HEADLINES[table["measure"]]),
    }
    return _write(folder / "compare.html", "compare.html", values)


def _write(path: Path, template: str, values: Mapping[str, Any]) -> Path:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined
    )
    shown = (numbers.number, numbers.percent, numbers.delta, numbers.duration, numbers.counted)
    environment.filters.update({show.__name__: show for show in shown}, epsilon=shown_epsilon)
    environment.globals.update(wilson=numbers.wilson, named=plots.NAMED)
    write_atomically(
        path, environment.get_template(template).render(values).encode("utf-8", "replace")
    )
    return path


def _parsed(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"{path}: found no {path.stem}, expected a run that has finished") from error
    except ValueError as error:
        raise BadInput(f"{path}: found bytes that are not JSON ({error})") from error


def _table(path: Path) -> Summary:
    table = _parsed(path)
    if not isinstance(table, dict):
        raise BadInput(f"{path}: found {type(table).__name__}, expected a table")
    missing = [
        name
        for name in ("task", "clients", "rounds", "privacy_statement", "partition")
        if name not in table
    ]
    if missing:
        raise BadInput([f"{path} {name}: missing" for name in missing])
    return table


def _lines(path: Path) -> Lines:
    """The committed rounds; a last line that was cut off by a kill is left out."""
    found = [line for line in lines_of(path) if line.ended or line.value is not None]
    if faulty := [line.number for line in found if line.value is None]:
        raise BadInput(f"{path} line {faulty[0]}: found bytes that are not JSON")
    return [line.value for line in found]
