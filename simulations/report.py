"""report.html: one self-contained page, written from the files of a run's folder and nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from fedlora.common.errors import BadInput
from fedlora.common.files import write_atomically
from fedlora.simulations import plots

TEMPLATES = Path(__file__).parent / "templates"
SHOWN_FAILURES = 20
FIGURES = (
    ("loss", "loss on the test file"),
    ("macro_f1", "macro F1 on the test file"),
    ("rounds", "rounds"),
    ("clients", "institutions"),
    ("seconds", "seconds from start to the last round"),
    ("examples_per_second", "examples a second, by the public normaliser"),
    ("client_rounds_per_second", "client-rounds a second"),
    ("peak_rss_bytes", "peak memory, bytes"),
    ("trainable_parameters", "trainable parameters"),
    ("strategy", "strategy"),
    ("engine", "engine"),
    ("attention", "attention"),
    ("precision", "precision"),
    ("secure_aggregation", "secure aggregation"),
    ("base_digest", "base model"),
    ("adapter_digest", "adapter"),
)


def write_report(folder: Path) -> Path:
    """Write `folder`/report.html; BadInput where the run has not finished."""
    summary = _summary(folder)
    lines = _metrics(folder)
    metric = "accuracy" if "accuracy" in summary else "loss"
    page = (
        _environment()
        .get_template("report.html")
        .render(
            name=folder.resolve().name,
            summary=summary,
            headline=_headline(summary),
            pictures=_pictures(summary, lines, metric),
            figures=[(title, _shown(summary[key])) for key, title in FIGURES if summary.get(key) is not None],
            failures=_failures(lines),
            asked=sum(line["asked"] for line in lines),
            replies=sum(line["replies"] for line in lines),
            recall=sorted(summary.get("recall_by_class", {}).items(), key=lambda pair: pair[1]),
        )
    )
    path = folder / "report.html"
    write_atomically(path, page.encode())
    return path


def write_sweep_report(folder: Path) -> Path:
    """Write `folder`/sweep.html from sweep.json."""
    trials = json.loads((folder / "sweep.json").read_text())
    metric = "accuracy" if trials[0].get("accuracy") is not None else "perplexity"
    page = (
        _environment()
        .get_template("sweep.html")
        .render(
            trials=trials, metric=metric, picture=Markup(plots.curve(trials, metric)), key=trials[0]["key"]
        )
    )
    path = folder / "sweep.html"
    write_atomically(path, page.encode())
    return path


def _environment() -> Environment:
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined)
    environment.filters["number"] = _shown
    return environment


def _summary(folder: Path) -> dict[str, Any]:
    path = folder / "summary.json"
    try:
        summary: dict[str, Any] = json.loads(path.read_text())
    except OSError as error:
        raise BadInput(f"{path}: found no summary, expected a run that has finished") from error
    except ValueError as error:
        raise BadInput(f"{path}: found bytes that are not JSON ({error})") from error
    return summary


def _metrics(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _headline(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The numbers of the first screen."""
    found = []
    if "accuracy" in summary:
        found.append((f"{100 * summary['accuracy']:.1f} %", "accuracy on the test file"))
    if "perplexity" in summary:
        found.append((f"{summary['perplexity']:.2f}", "perplexity on the test file"))
    if summary.get("epsilon") is not None:
        unit = "a record" if summary["unit"] == "record" else f"one {summary['unit']}"
        found.append((f"ε = {summary['epsilon']:.3g}", f"δ = {summary['delta']:g}, for {unit}"))
    else:
        found.append(("no privacy", "nothing is guaranteed"))
    found.append((f"{summary['clients']:,}", "institutions"))
    found.append((f"{summary['rounds']:,}", "rounds"))
    return found


def _pictures(summary: Mapping[str, Any], lines: list[dict[str, Any]], metric: str) -> dict[str, Markup]:
    drawn = {"rounds": plots.by_round(lines, metric), "partition": plots.partition(summary["partition"])}
    if summary.get("epsilon_by_client"):
        drawn["epsilon"] = plots.by_client(summary["epsilon_by_client"], "ε reserved in the ledger")
    if summary.get("confusion"):
        drawn["confusion"] = plots.confusion(summary["confusion"], summary["labels"])
        drawn["accuracy"] = plots.by_client(
            summary["accuracy_by_client"], "test accuracy, weighted by the client's labels"
        )
    return {name: Markup(svg) for name, svg in drawn.items()}  # our own SVG: matplotlib escapes its texts


def _failures(lines: list[dict[str, Any]]) -> list[tuple[int, str, str]]:
    found = [(line["round"], client, reason) for line in lines for client, reason in line["failures"]]
    return found[:SHOWN_FAILURES]


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.4g}" if isinstance(value, float) else str(value)
