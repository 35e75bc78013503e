"""The report's pictures as inline SVG: no network, no scripts, no ids that clash on one page.

Texts are never parsed as mathematics, and a letter that the layout's font lacks is drawn by the
reader's.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

INK, MUTED, LINE, ACCENT, SECOND = "#1b2430", "#55616d", "#dfe5e8", "#0f5c73", "#a3441c"
COLORS = (ACCENT, SECOND, "#6b4c9a", "#2f7d4f", "#8a6d1c", "#55616d")
MARKERS = ("o", "s", "^", "D", "v", "P")
SHADES = LinearSegmentedColormap.from_list("shades", ["#ffffff", "#9cc3cf", ACCENT, "#07303d"])
NAMED = 45  # more rows or columns than this are drawn without their names
SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fedlora",  # the same figures give the same file
    "text.parse_math": False,
    "font.size": 9,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid.axis": "y",
    "grid.color": LINE,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "text.color": INK,
}


def by_round(
    points: Sequence[tuple[float, float]],
    name: str,
    percent: bool = False,
    phases: Sequence[tuple[str, int]] = (),
    limit: float | None = None,
    color: str = ACCENT,
    beside: Sequence[tuple[float, float]] = (),
) -> Markup:
    """A figure over rounds; `phases`: names and first rounds, `limit`: a line not to pass,
    `beside`: other points of the same kind, dashed.
    """
    with _figure(4.4, 2.7) as (figure, axes):
        axes.plot(
            *_columns(points),
            color=color,
            linewidth=1.8,
            marker="o" if len(points) <= 40 else "",
            markersize=3,
        )
        if beside:
            axes.plot(*_columns(beside), color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)))
            axes.set_ylim(bottom=0)
        axes.grid(visible=True)
        axes.set_axisbelow(True)
        axes.set_xlabel("round")
        axes.set_ylabel(name)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_formatter(FuncFormatter(_percent if percent else _plain))
        if limit is not None:
            axes.axhline(limit, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
            axes.set_ylim(0, 1.15 * limit if limit > 0 else None)
        for phase, start in phases[1:]:
            axes.axvline(start - 0.5, color=MUTED, linewidth=0.8)
            axes.annotate(
                f" {phase}",
                (start - 0.5, 1.0),
                xycoords=("data", "axes fraction"),
                va="bottom",
                color=MUTED,
            )
        return _svg(figure, f"rounds-{name}")


def histogram(values: Sequence[float], name: str, percent: bool = False) -> Markup:
    """How many clients have which value."""
    found = np.asarray(values, dtype=float)
    with _figure(4.4, 2.4) as (figure, axes):
        axes.hist(found[np.isfinite(found)], bins=30, color=ACCENT)
        axes.grid(visible=True)
        axes.set_axisbelow(True)
        axes.set_xlabel(name)
        axes.set_ylabel("institutions")
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.xaxis.set_major_formatter(FuncFormatter(_percent if percent else _plain))
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        return _svg(figure, f"histogram-{name}")


def heat(
    values: npt.NDArray[np.float64],
    rows: Sequence[str],
    columns: Sequence[str],
    row_title: str,
    column_title: str,
    square: bool = False,
) -> Markup:
    """A heat map, darker for more, small values lifted (square root) so that rare ones show."""
    width, height = 8.6, 8.0 if square else float(np.clip(1.6 + 0.22 * len(rows), 2.4, 8.0))
    with _figure(width, height) as (figure, axes):
        top = max(float(np.nanmax(values, initial=0.0)), 1e-12)
        norm = PowerNorm(0.5, vmin=0.0, vmax=top)
        axes.imshow(values, cmap=SHADES, norm=norm, aspect="auto", interpolation="none")
        for axis, names, title in (
            (axes.xaxis, columns, column_title),
            (axes.yaxis, rows, row_title),
        ):
            named = len(names) <= NAMED
            axis.set_ticks(
                range(len(names)) if named else [],
                labels=[short(n) for n in names] if named else [],
            )
            axis.set_label_text(
                title if named else f"{title} ({len(names)}, in the order of the label set)"
            )
        axes.tick_params(axis="x", rotation=90 if len(columns) > 8 else 0)
        for spine in axes.spines.values():
            spine.set_visible(True)
        return _svg(figure, f"heat-{row_title}-{column_title}")


def curve(
    series: Mapping[str, Sequence[tuple[float | str, float]]], title: str, percent: bool, log: bool
) -> Markup:
    """A sweep's figures over the values of its key; one line for each name in `series`."""
    with _figure(6.2, 3.4) as (figure, axes):
        for (name, points), color, style in zip(
            series.items(), (ACCENT, SECOND), ("-", (0, (4, 3))), strict=False
        ):
            axes.plot(
                *_columns(points),
                color=color,
                linestyle=style,
                linewidth=1.8,
                marker="o",
                markersize=4,
                label=name,
            )
        if log:
            axes.set_xscale("log")
        ticks = sorted(
            {
                point[0]
                for points in series.values()
                for point in points
                if not isinstance(point[0], str)
            }
        )
        if ticks:
            axes.set_xticks(ticks, labels=[f"{tick:g}" for tick in ticks])
            axes.minorticks_off()
        axes.grid(visible=True)
        axes.set_axisbelow(True)
        axes.set_xlabel(title)
        axes.yaxis.set_major_formatter(FuncFormatter(_percent if percent else _plain))
        axes.legend(frameon=False, loc="best")
        return _svg(figure, f"curve-{title}")


def scatter(points: Sequence[tuple[float, float]], ends: tuple[float, float]) -> Markup:
    """True numbers and the answers to them, on one scale; the diagonal is right."""
    with _figure(4.4, 4.0) as (figure, axes):
        axes.plot(*_columns(points), linestyle="", marker="o", markersize=2.5, color=ACCENT)
        axes.plot(ends, ends, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        axes.grid(visible=True)
        axes.set_axisbelow(True)
        axes.set_xlabel("true")
        axes.set_ylabel("answered")
        return _svg(figure, "scatter")


def methods(cells: Sequence[Mapping[str, Any]], measure: str, percent: bool) -> Markup:
    """A line for each method over the ε of its cells, no privacy last; bars are spreads."""
    places = sorted({math.inf if cell["epsilon"] is None else cell["epsilon"] for cell in cells})
    names = list(dict.fromkeys(cell["method"] for cell in cells))
    with _figure(6.2, 3.6) as (figure, axes):
        for number, name in enumerate(names):
            mine = [cell for cell in cells if cell["method"] == name]
            where = [
                places.index(math.inf if cell["epsilon"] is None else cell["epsilon"])
                for cell in mine
            ]
            axes.errorbar(
                # beside one another, so that no bar hides another
                [place + 0.06 * (number - (len(names) - 1) / 2) for place in where],
                [cell["mean"] for cell in mine],
                yerr=[cell["spread"] or 0.0 for cell in mine],
                color=COLORS[number % len(COLORS)],
                marker=MARKERS[number % len(MARKERS)],
                markersize=5,
                linewidth=1.6,
                capsize=3,
                label=short(name),
            )
        shown = ["no privacy" if place == math.inf else f"{place:g}" for place in places]
        axes.set_xticks(range(len(places)), labels=shown)
        axes.grid(visible=True)
        axes.set_axisbelow(True)
        axes.set_xlabel("ε")
        axes.set_ylabel(measure)
        axes.yaxis.set_major_formatter(FuncFormatter(_percent if percent else _plain))
        axes.legend(frameon=False, loc="best")
        return _svg(figure, f"methods-{measure}")


def short(name: str, limit: int = 22) -> str:
    """A name that fits beside a picture; letters that can't be printed are replaced."""
    clean = "".join(letter if letter.isprintable() else "�" for letter in name)
    return clean if len(clean) <= limit else clean[: limit - 1] + "…"


@contextmanager
def _figure(width: float, height: float) -> Iterator[tuple[Figure, Axes]]:
    with matplotlib.rc_context(SETTINGS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph \d+", category=UserWarning)
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.subplots()


def _svg(figure: Figure, name: str) -> Markup:
    buffer = io.StringIO()
    empty = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=empty)
    text = buffer.getvalue()
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text[text.index("<svg") :])
    prefix = re.sub(r"[^a-z0-9]+", "-", name.lower())
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", text)
    return Markup(text)  # noqa: S704  (our own SVG: matplotlib has escaped the texts in it)


def _columns(points: Sequence[tuple[Any, float]]) -> tuple[list[Any], list[float]]:
    return [point[0] for point in points], [point[1] for point in points]


def _percent(value: float, _place: object) -> str:
    return f"{100 * value:.4g}\N{NO-BREAK SPACE}%"


def _plain(value: float, _place: object) -> str:
    return f"{value:,.4g}" if abs(value) < 10_000 else f"{value:,.0f}"
