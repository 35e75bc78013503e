"""What the report shows as tables: heat-map cells, frequent confusions, spreads over clients.

A table stays readable on a phone and to a screen reader, which a picture does not; pictures are for
what is too large for a table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]

# Black and white: on any ground one of the two has a contrast of at least 4.58; a softer ink would
# not.
PAPER, ACCENT, INK = (255, 255, 255), (15, 92, 115), (0, 0, 0)
QUANTILES = ((0.0, "least"), (0.05, "5 %"), (0.5, "median"), (0.95, "95 %"), (1.0, "most"))


@dataclass(frozen=True)
class Cell:
    """A number on a ground as dark as its share; `style` holds colours only."""

    value: float
    style: str


@dataclass(frozen=True)
class Row:
    """Shaded cells under a name; `total` is the sum of their values."""

    name: str
    cells: tuple[Cell, ...]
    total: float


@dataclass(frozen=True)
class Confusion:
    """`count` records of `true` were taken for `guessed`; `share` of all records of `true`."""

    true: str
    guessed: str
    count: int
    share: float


def shaded(counts: Matrix, names: Sequence[str], shares: Matrix) -> tuple[Row, ...]:
    """Rows of `counts`, each cell shaded by its share in 0..1."""
    return tuple(
        Row(
            name,
            tuple(Cell(float(v), shade(s)) for v, s in zip(row, share, strict=True)),
            float(row.sum()),
        )
        for name, row, share in zip(names, counts, shares, strict=True)
    )


def row_shares(counts: Matrix) -> Matrix:
    """Each cell as a share of its row; rows without records are 0."""
    return np.asarray(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1), dtype=np.float64)


def confusions(counts: Matrix, labels: Sequence[str], most: int) -> list[Confusion]:
    """The most frequent mistakes, the largest count first."""
    wrong = counts * (1 - np.eye(len(counts)))
    shares = row_shares(counts)
    order = np.argsort(-wrong, axis=None, kind="stable")[:most]
    places = [divmod(int(flat), len(counts)) for flat in order]
    return [
        Confusion(labels[true], labels[guess], int(wrong[true, guess]), float(shares[true, guess]))
        for true, guess in places
        if wrong[true, guess] > 0
    ]


def spread(values: Sequence[float]) -> list[tuple[str, float]]:
    """Least, median, most and what lies between, of one figure over many clients."""
    finite = np.asarray([value for value in values if np.isfinite(value)])
    return (
        [(title, float(np.quantile(finite, at))) for at, title in QUANTILES] if len(finite) else []
    )


def shade(share: float) -> str:
    """CSS colours of a cell: ground from paper to accent, and the ink easier to read on it."""
    clamped = min(max(share, 0.0), 1.0) ** 0.7  # small shares can still be told from none
    ground = tuple(
        round(low + (high - low) * clamped) for low, high in zip(PAPER, ACCENT, strict=True)
    )
    ink = max((INK, PAPER), key=lambda color: contrast(color, ground))
    return f"background:{_hex(ground)};color:{_hex(ink)}"


def contrast(one: Sequence[int], other: Sequence[int]) -> float:
    """WCAG 2.2 contrast ratio of two sRGB colours; 4.5 is what text needs."""
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


def _luminance(color: Sequence[int]) -> float:
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
        for c in (part / 255 for part in color)
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _hex(color: Sequence[int]) -> str:
    return "#" + "".join(f"{part:02x}" for part in color)
