"""What each section of a report shows, from a run's summary and the lines of its rounds.

Texts of a configuration, a data file or an institution are passed on as they are: the page escapes.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from fedlora.common.errors import BadInput
from fedlora.common.privacy.figures import shown_epsilon
from fedlora.simulations.report import answers, numbers, plots, tables

FEW = 40  # clients that get a row of their own; more are drawn as histograms
NARROW = 12  # labels that fit into a table; more are drawn as a heat map
SHOWN = 15  # rows of lists that could be long
# accuracy, where `fedlora-sim personalise` fitted heads, and trained LoRA's B
OWN = {"own": "with its own head", "adapter": "with its own adapter"}
SHARES = ("accuracy", *OWN.values())
COMPARED = {
    "untrained": ("Before training", "the base model with an untrained head"),
    "non-private": (
        "Trained without privacy",
        "the same schedule without noise, nothing guaranteed",
    ),
    "private": ("Trained with privacy", "what this run releases"),
}
Summary = Mapping[str, Any]
Lines = Sequence[Mapping[str, Any]]


PHASES = {
    "public": "Public records, before the first round",
    "head": "The head alone",
    "adapter": "LoRA and the head",
    "lora": "LoRA below it",
}


def base(summary: Summary) -> str:
    """The base model's name, or the last part of its path."""
    try:
        base = tomllib.loads(summary.get("config", ""))["model"]["base"]
    except (tomllib.TOMLDecodeError, KeyError, TypeError):
        return "the base model"
    return Path(str(base)).name or str(base)


def baseline(summary: Summary) -> float | None:
    """Accuracy of always guessing the most frequent class of the test file."""
    rows = np.array(summary.get("confusion") or [[0]], dtype=np.float64).sum(axis=1)
    return float(rows.max() / rows.sum()) if rows.sum() else None


def comparison(summary: Summary) -> dict[str, Any] | None:
    """The quickstart's three results, and what privacy cost in points of accuracy."""
    found = summary.get("comparison")
    if not found:
        return None
    rows = [(*COMPARED.get(name, (name, "")), name, row) for name, row in found.items()]
    plain, private = (found.get(name, {}).get("accuracy") for name in ("non-private", "private"))
    cost = None if plain is None or private is None else 100 * (plain - private)
    return {"rows": rows, "cost": cost}


def rounds(summary: Summary, lines: Lines) -> dict[str, Any]:
    """The curves over the rounds, each with a sentence that says the same."""
    metric = answers.headline(summary)
    if not any(_finite(line.get(metric)) for line in lines):
        metric = "loss"
    name, share = answers.HEADLINES[metric]
    scored = [(line["round"], line[metric]) for line in lines if _finite(line.get(metric))]
    spent = [(line["round"], line["epsilon"]) for line in lines if _finite(line.get("epsilon"))]
    phases = _phases(lines)
    show, pictures = answers.shown_as(metric), []
    if scored:
        svg = plots.by_round(scored, f"{name} (validation)", share, phases)
        text = (
            f"{name} on the public validation part: {show(scored[0][1])} after round {scored[0][0]}"
        )
        pictures.append((svg, f"{text}, {show(scored[-1][1])} after round {scored[-1][0]}."))
    if spent:
        whole = summary.get("epsilon")
        svg = plots.by_round(spent, "ε of the rounds so far", False, phases, whole, plots.SECOND)
        text = f"ε of the rounds so far: {shown_epsilon(spent[-1][1])} after round {spent[-1][0]}."
        text += f" The dashed line is what the whole schedule reserved, {shown_epsilon(whole)}."
        pictures.append((svg, text))
    pictures += _noise(lines, phases)
    return {"pictures": pictures, "phases": phases, "metric": metric}


def _noise(lines: Lines, phases: Sequence[tuple[str, int]]) -> list[tuple[Markup, str]]:
    """The mean updates' lengths, with that of their noise; nothing where it can't be told."""
    known = [line for line in lines if _finite(line.get("noise_norm"))]
    if not known:
        return []
    updates, noise = (
        [(line["round"], line[name]) for line in known] for name in ("update_norm", "noise_norm")
    )
    svg = plots.by_round(updates, "length of the mean update", False, phases, beside=noise)
    last, noise_alone = known[-1], numbers.number(known[-1]["noise_norm"])
    text = (
        f"Length of the mean update: {numbers.number(last['update_norm'])} in round"
        f" {last['round']}, where its noise alone has about {noise_alone} (dashed). Over the rounds"
        " what institutions agree on adds up, and noise grows by the root of their number alone."
    )
    return [(svg, text)]


def phase_ends(summary: Summary) -> dict[str, Any]:
    """What each phase came to, and in words what LoRA added to the head."""
    found, start = summary.get("phases") or [], summary.get("public_start")
    metric = answers.headline(summary)
    show, name = answers.shown_as(metric), answers.HEADLINES[metric][0]
    before = [{"phase": "public", "rounds": 0, "released": False, **start}] if start else []
    rows = [
        {
            "title": PHASES.get(row["phase"], row["phase"]),
            "rounds": row["rounds"],
            "best_round": row.get("best_round"),  # runs of 0.1 kept the last one
            "validation": show(row["validation"].get(metric)),
            "test": show(row.get("test", {}).get(metric)),
            "released": row["released"],
        }
        for row in before + found
    ]
    if len(found) < 2 or metric != "accuracy":
        return {"rows": rows, "metric": name, "sentence": ""}
    gain = 100 * (found[-1]["test"]["accuracy"] - found[0]["test"]["accuracy"])
    added = f"LoRA {'added' if gain >= 0 else 'cost'} {abs(gain):.1f} points of accuracy"
    seen = "did not do as well, so the head alone is released"
    if start and (start["best_epoch"] or start.get("below_projection")):
        seen = "did not do as well, so the head is released on what public records made of LoRA"
    if found[-1]["released"]:  # of equals, too
        seen = "did at least as well, and is released"
    sentence = f"{added} on the test file. On the validation part it {seen}."
    return {"rows": rows, "metric": name, "sentence": sentence}


def _phases(lines: Lines) -> list[tuple[str, int]]:
    """Each phase with the first round of it that was committed."""
    first: dict[str, int] = {}
    for line in lines:
        first.setdefault(str(line.get("phase", "")), int(line["round"]))
    return list(first.items())


def clients(summary: Summary) -> dict[str, Any]:
    """ε, accuracy and records by client: a row for each, or their spreads where there are many."""
    names, counts = [str(name) for name in summary["partition"]["clients"]], _counts(summary)
    records = counts.sum(axis=1)
    epsilon, accuracy = (
        list(summary.get(key, {}).values()) for key in ("epsilon_by_client", "accuracy_by_client")
    )
    columns: list[tuple[str, Callable[[Any], str], list[Any]]]
    columns = [("records", numbers.number, [int(count) for count in records])]
    columns += [("ε", shown_epsilon, epsilon)] if epsilon else []
    columns += [("accuracy", numbers.percent, accuracy)] if accuracy else []
    personal = summary.get("personal", {}).get("by_client", {}).values()
    for key, title in OWN.items():
        own = [row[key] for row in personal if key in row]
        columns += [(title, numbers.percent, own)] if own else []
    if len(names) <= FEW:
        return {
            "columns": columns,
            "rows": _client_rows(names, columns),
            "pictures": [],
            "spreads": [],
        }
    spreads = [(title, show, tables.spread(values)) for title, show, values in columns]
    drawn = [(title, values) for title, _, values in columns if min(values) < max(values)]
    pictures = [(plots.histogram(values, title, title in SHARES), title) for title, values in drawn]
    return {"columns": columns, "rows": [], "pictures": pictures, "spreads": spreads}


def _client_rows(
    names: Sequence[str], columns: Sequence[Any]
) -> list[tuple[str, list[tuple[str, float]]]]:
    """For each client its figures, as text and as the length of a bar in percent."""
    tops = [1.0 if title in SHARES else max([*values, 1e-12]) for title, _, values in columns]
    return [
        (
            name,
            [
                (
                    (show(values[place]), 100 * min(values[place] / top, 1.0))
                    if place < len(values)
                    else ("–", 0.0)
                )
                for (_, show, values), top in zip(columns, tops, strict=True)
            ],
        )
        for place, name in enumerate(names)
    ]


def partition(summary: Summary) -> dict[str, Any]:
    """Clients by labels: a shaded table, a heat map, or, for many clients, how skewed they are."""
    names, labels = (
        [str(name) for name in summary["partition"][key]] for key in ("clients", "labels")
    )
    counts = _counts(summary)
    found: dict[str, Any] = {"labels": labels, "rows": (), "picture": None, "skew": None}
    if len(labels) < 2:
        return found  # sizes alone stand in the table of clients
    if len(names) > FEW:
        largest = tables.row_shares(counts).max(axis=1)[counts.sum(axis=1) > 0]
        return found | {
            "picture": plots.histogram(list(largest), "share of the most frequent label", True),
            "skew": float(np.median(largest)) if len(largest) else None,
        }
    if len(labels) > NARROW:
        return found | {"picture": plots.heat(counts, names, labels, "institution", "label")}
    return found | {"rows": tables.shaded(counts, names, counts / max(counts.max(initial=0), 1))}


def participation(lines: Lines, clients: Sequence[str]) -> dict[str, Any]:
    """Requests, counted answers, attempts that were repeated, and failures by reason."""
    names = {f"client-{place}": str(name) for place, name in enumerate(clients)}
    reasons: dict[str, list[tuple[str, int]]] = {}
    for line in lines:
        for client, reason in line.get("failures") or ():
            reasons.setdefault(str(reason), []).append(
                (names.get(client, str(client)), int(line["round"]))
            )
    failures = [
        (reason, len(seen), sorted({c for c, _ in seen}), [r for _, r in seen])
        for reason, seen in reasons.items()
    ]
    return {
        "rounds": len(lines),
        "asked": sum(line.get("asked") or 0 for line in lines),
        "replies": sum(line.get("replies") or 0 for line in lines),
        "failed": sum(len(seen) for seen in reasons.values()),
        "repeated": max((line.get("attempt", 0) for line in lines), default=0) - len(lines),
        "failures": sorted(failures, key=lambda failure: -failure[1])[:SHOWN],
        "more": max(len(failures) - SHOWN, 0),
    }


def errors(summary: Summary) -> dict[str, Any] | None:
    """The confusion matrix as table or heat map, the most frequent mistakes, recall by class."""
    if not summary.get("confusion"):
        return None
    labels = [str(label) for label in summary["labels"]]
    counts = np.array(summary["confusion"], dtype=np.float64)
    shares = tables.row_shares(counts)
    small = len(labels) <= NARROW
    recall = sorted(
        zip(labels, shares.diagonal(), counts.sum(axis=1), strict=True),
        key=lambda row: float(row[1]),
    )
    return {
        "labels": labels,
        "rows": tables.shaded(counts, labels, shares) if small else (),
        "picture": (
            None
            if small
            else plots.heat(shares, labels, labels, "true class", "guessed class", True)
        ),
        "frequent": tables.confusions(counts, labels, 8 if small else SHOWN),
        "recall": [
            (label, float(share), int(total)) for label, share, total in recall if total > 0
        ],
    }


def curve(trials: Lines, metric: str) -> Markup | None:
    """The metric over the values of the key: test as a line, validation dashed."""
    numeric = all(_number(trial["value"]) is not None for trial in trials)
    series: dict[str, list[tuple[float | str, float]]] = {"test": [], "validation": []}
    for trial in trials:
        place = _number(trial["value"]) if numeric else str(trial["value"])
        for name, value in (
            ("test", trial.get(metric)),
            ("validation", (trial.get("validation") or {}).get(metric)),
        ):
            if value is not None and _finite(value) and place is not None:
                series[name].append((place, float(value)))
    drawn = {
        name: sorted(points) if numeric else points for name, points in series.items() if points
    }
    if not drawn:
        return None
    places = [_number(trial["value"]) or 0.0 for trial in trials]
    wide = numeric and min(places) > 0 and max(places) / min(places) > 5
    return plots.curve(drawn, str(trials[0]["key"]), metric == "accuracy", wide)


def _counts(summary: Summary) -> tables.Matrix:
    table = summary["partition"]
    try:
        counts = np.array(table["counts"], dtype=np.float64)
        return counts.reshape(len(table["clients"]), len(table["labels"]))
    except (ValueError, TypeError, KeyError) as error:
        raise BadInput(
            "summary.json partition counts: expected a number for each client and label"
        ) from error


def _number(value: Any) -> float | None:
    try:
        found = float(value)
    except (TypeError, ValueError):
        return None
    return found if np.isfinite(found) else None


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and bool(np.isfinite(value))
