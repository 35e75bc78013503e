"""The report's pictures as inline SVG: no network, no scripts, sharp at any size."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

matplotlib.use("svg")

INK, ACCENT, SECOND, SOFT = "#1d2733", "#1f6f8b", "#b4532a", "#c9d3da"
SETTINGS: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fedlora",  # the same figures give the same file
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
MANY = 40  # more clients than this are drawn as a histogram, more classes without their names


def by_round(lines: Sequence[Mapping[str, Any]], metric: str) -> str:
    """The metric on validation and ε so far, by round."""
    with matplotlib.rc_context(SETTINGS):
        figure, axes = _figure(6.4, 3.0)
        scored = [(line["round"], line[metric]) for line in lines if line.get(metric) is not None]
        if scored:
            axes.plot(*zip(*scored, strict=True), color=ACCENT, linewidth=2, marker="o", markersize=3)
        axes.set_xlabel("round")
        axes.set_ylabel(f"{metric} (validation)", color=ACCENT)
        spent = [(line["round"], line["epsilon"]) for line in lines if line.get("epsilon") is not None]
        if spent:
            right = axes.twinx()
            right.plot(*zip(*spent, strict=True), color=SECOND, linewidth=2, linestyle="--")
            right.set_ylabel("ε so far", color=SECOND)
            right.set_ylim(bottom=0)
            right.spines["right"].set_visible(True)
        return _svg(figure)


def by_client(values: Mapping[str, float], title: str) -> str:
    """Bars by client, or a histogram where there are many."""
    with matplotlib.rc_context(SETTINGS):
        few = len(values) <= MANY
        figure, axes = _figure(6.4, 0.9 + 0.26 * len(values) if few else 2.6)
        if few:
            axes.barh(list(values), list(values.values()), color=ACCENT, height=0.65)
            axes.invert_yaxis()
            axes.set_xlabel(title)
        else:
            axes.hist(list(values.values()), bins=30, color=ACCENT)
            axes.set_xlabel(title)
            axes.set_ylabel("clients")
        return _svg(figure)


def partition(table: Mapping[str, Any]) -> str:
    """Which client holds how many records of which label."""
    counts = np.array(table["counts"], dtype=float)
    with matplotlib.rc_context(SETTINGS):
        if len(counts) > MANY:
            figure, axes = _figure(6.4, 2.6)
            axes.hist(counts.sum(axis=1), bins=30, color=ACCENT)
            axes.set_xlabel("records of a client")
            axes.set_ylabel("clients")
            return _svg(figure)
        figure, axes = _figure(6.4, 1.2 + 0.3 * len(counts))
        _heat(
            axes,
            counts,
            [str(c) for c in table["clients"]],
            [str(label) for label in table["labels"]],
            text=True,
        )
        return _svg(figure)


def confusion(matrix: Sequence[Sequence[int]], labels: Sequence[str]) -> str:
    """Rows are true labels, columns guesses; shades are shares of a row."""
    counts = np.array(matrix, dtype=float)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = min(6.4, 2.2 + 0.42 * len(labels))
    with matplotlib.rc_context(SETTINGS):
        figure, axes = _figure(side + 0.8, side)
        _heat(axes, shares, labels, labels, text=len(labels) <= 12, shown=counts)
        axes.set_xlabel("guessed")
        axes.set_ylabel("true")
        return _svg(figure)


def curve(trials: Sequence[Mapping[str, Any]], metric: str) -> str:
    """The metric over the values of a sweep."""
    with matplotlib.rc_context(SETTINGS):
        figure, axes = _figure(6.4, 3.2)
        names = [str(trial["value"]) for trial in trials]
        axes.plot(names, [trial[metric] for trial in trials], color=ACCENT, linewidth=2, marker="o")
        axes.set_xlabel(str(trials[0]["key"]))
        axes.set_ylabel(f"{metric} (test)")
        axes.grid(axis="y", color=SOFT, linewidth=0.6)
        return _svg(figure)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _heat(
    axes: Axes,
    values: npt.NDArray[np.float64],
    rows: Sequence[str],
    columns: Sequence[str],
    text: bool,
    shown: npt.NDArray[np.float64] | None = None,
) -> None:
    axes.imshow(values, cmap="Blues", aspect="auto", vmin=0)
    for ticks, labels, setter in (
        (len(columns), columns, (axes.set_xticks, axes.set_xticklabels)),
        (len(rows), rows, (axes.set_yticks, axes.set_yticklabels)),
    ):
        named = ticks <= MANY
        setter[0](range(ticks) if named else [])
        setter[1]([_short(label) for label in labels] if named else [])
    axes.tick_params(axis="x", rotation=45 if len(columns) > 4 else 0, length=0)
    axes.tick_params(axis="y", length=0)
    if text and values.size <= 150:
        numbers = values if shown is None else shown
        middle = values.max() / 2
        for (row, column), value in np.ndenumerate(numbers):
            color = "white" if values[row, column] > middle else INK
            axes.text(column, row, f"{value:,.0f}", ha="center", va="center", fontsize=8, color=color)


def _short(label: str) -> str:
    return label if len(label) <= 18 else label[:17] + "…"


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
