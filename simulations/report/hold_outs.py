"""What a report says of the institutions' noisy counts: all, the worst, how far apart they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedlora.common.privacy.figures import shown_epsilon
from fedlora.simulations.report import numbers

SHOWN = 15  # classes
Row = tuple[str, str, str]


def hold_outs(summary: Mapping[str, Any]) -> dict[str, Any] | None:
    """Sentences, and rows of institutions and of classes; None of a run without an evaluation."""
    found = summary.get("evaluation")
    if not found:
        return None
    cost = "" if found["epsilon"] is None else f" By itself it costs ε {_cost(found)}."
    asked = (
        "After the last round each institution counted how the released adapter does on units that"
        f" this run did not train on, about {numbers.percent(found['hold_out'])} of its own.{cost}"
    )
    if "lost" in found:
        return {"sentences": [asked, f"They were not counted: {found['lost']}."], "rows": []}
    names = _names(summary)
    rows = {names.get(name, name): row for name, row in found["institutions"].items()}
    worst = names.get(found["worst"], found["worst"])
    sentences = [asked, *_told(found, len(rows)), *_apart(found, rows, worst)]
    return {
        "sentences": sentences,
        "rows": [(name, *_shown(row)) for name, row in rows.items()],
        "classes": [(label, *_shown(row)) for label, row in _lowest(found)],
        "groups": [(name, *_shown(row)) for name, row in found.get("groups", {}).items()],
        "loss": [(size, numbers.number(count)) for size, count in found.get("loss", {}).items()],
    }


def _told(found: Mapping[str, Any], apart: int) -> list[str]:
    together, share = found["together"], ""
    if together["accuracy"] is not None:
        share = f"; {_shown(together)[1]} of them are labelled right"
    units = f"{numbers.counted(found['replies'], 'institution')} answered, with about"
    counted = f"{units} {together['units']:,.0f} units{share}."
    noise = f"Each institution's noise moves each of its counts by about {found['noise']:.3g}."
    masked = "Under masks the counts are told only in sum: no institution's by itself."
    return [counted, noise] if apart else [counted, noise, masked]


def _apart(found: Mapping[str, Any], rows: Mapping[str, Any], worst: str | None) -> list[str]:
    """The worst, and what is left of the spread; nothing where they can't be told apart."""
    if worst is None:
        return []
    return [
        f"Worst is {worst} with {_shown(rows[worst])[1]}. The lowest of several figures that"
        " scatter is on average lower than it would be without noise.",
        "Beyond what noise and few units explain, the institutions' figures have a standard"
        f" deviation of {100 * found['spread']:.1f} points.",
    ]


def _shown(row: Mapping[str, Any]) -> tuple[str, str]:
    """Units, and the share of them that is right with its 95 % interval."""
    units = f"{row['units']:,.0f}"
    if row["accuracy"] is None:
        return units, "too few to tell"
    return units, f"{numbers.percent(row['accuracy'])} ± {196 * row['error']:.1f}"


def _lowest(found: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    known = [each for each in found.get("classes", {}).items() if each[1]["accuracy"] is not None]
    return sorted(known, key=lambda each: float(each[1]["accuracy"]))[:SHOWN]


def _names(summary: Mapping[str, Any]) -> dict[str, str]:
    """As the partition calls its clients."""
    clients = summary.get("partition", {}).get("clients", ())
    return {f"client-{place}": str(name) for place, name in enumerate(clients)}


def _cost(found: Mapping[str, Any]) -> str:
    return shown_epsilon(found["epsilon"])
