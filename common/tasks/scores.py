"""Precision, recall and F1 from counts: of what is true, what was given, and what of it is right.

Counts add up over batches, and over institutions; that is why they are counted here and not in a
library, which wants all answers at once. A test compares them with scikit-learn's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedlora.common.tasks.batch import Totals


def f1_of(true: float, given: float, right: float) -> float:
    """0 where nothing is true and nothing was given."""
    return float(2 * right / (true + given)) if true + given else 0.0


def table_of(names: Sequence[str], totals: Totals) -> dict[str, Mapping[str, float]]:
    """By name: precision, recall, F1, and how many there truly are."""
    rows = zip(names, totals["true"], totals["given"], totals["right"], strict=True)
    return {
        name: {
            "precision": float(right / given) if given else 0.0,
            "recall": float(right / true) if true else 0.0,
            "f1": f1_of(true, given, right),
            "true": int(true),
        }
        for name, true, given, right in rows
    }
