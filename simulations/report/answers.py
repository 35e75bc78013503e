"""How good answers are, by the task: the figure that is named first, tables and pictures of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from markupsafe import Markup

from fedlora.simulations.report import numbers, plots

Summary = Mapping[str, Any]
# The figures that a run may be judged by, the first that it has; and whether they are shares.
HEADLINES = {
    "accuracy": ("Accuracy", True),
    "entity_f1": ("Entity F1", True),
    "micro_f1": ("Micro F1", True),
    "spearman": ("Spearman", False),
    "perplexity": ("Perplexity", False),
    "loss": ("Loss", False),
}
TITLES: dict[str, Callable[[int], str]] = {
    "sequence-classification": lambda n: (
        f"A classifier for {numbers.counted(n, 'class', 'classes')}"
    ),
    "multi-label": lambda n: f"A classifier for {numbers.counted(n, 'label')}, any number at once",
    "token-classification": lambda n: f"A tagger of words with {numbers.counted(n, 'tag')}",
    "regression": lambda n: "A regression on a public scale",
}


def title(summary: Summary) -> str:
    """What was trained."""
    labels = len(summary.get("labels") or ())
    if not labels:
        return "A language model"
    return TITLES.get(str(summary.get("task")), TITLES["sequence-classification"])(labels)


def headline(found: Summary) -> str:
    """The name of the figure that a run, or a round of it, is judged by."""
    return next((name for name in HEADLINES if found.get(name) is not None), "loss")


def shown_as(metric: str) -> Callable[[Any], str]:
    """How that figure is written."""
    return numbers.percent if HEADLINES[metric][1] else numbers.number


def first_figure(summary: Summary) -> tuple[str, str] | None:
    """Title and value of the headline; None where there is none but a loss."""
    metric = headline(summary)
    if metric == "loss":
        return None
    return HEADLINES[metric][0], shown_as(metric)(summary[metric])


def by_label(summary: Summary) -> list[tuple[str, Mapping[str, float]]]:
    """Precision, recall and F1 of each label or type of entity, the lowest F1 first."""
    found = summary.get("by_label") or {}
    rows = [(str(name), row) for name, row in found.items() if row.get("true")]
    return sorted(rows, key=lambda row: float(row[1]["f1"]))


def samples(summary: Summary) -> list[tuple[str, str, str]]:
    """Prompts of public records, what stands there, and what the model says."""
    found = summary.get("samples") or []
    return [(str(row["prompt"]), str(row["expected"]), str(row["answer"])) for row in found]


def scatter(summary: Summary) -> Markup | None:
    """The answers of a regression against the truth."""
    pairs, scale = summary.get("answers"), summary.get("scale")
    if not pairs or not scale:
        return None
    return plots.scatter([(float(a), float(b)) for a, b in pairs], (scale[0], scale[1]))
