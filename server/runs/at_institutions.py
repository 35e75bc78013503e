"""What noisy counts tell of an adapter at the institutions: accuracy, the worst of them, spread.

All of it follows from counts that are noised already, so that it costs no privacy. Beside each
figure stands its standard error, of the noise and of how few units were counted. With r right
and w wrong of n = r + w, and noise of deviation s on each:

    accuracy a = r / n        error² = s² (a² + (1 - a)²) / n²  +  a (1 - a) / n

The spread is the institutions' own: the variance of their figures less what their errors explain.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fedlora.common.manifest.counts import CLASSES, CONFUSION, EDGES, GROUPS, LOSS, RIGHT, Cells
from fedlora.common.manifest.manifest import RunManifest
from fedlora.common.privacy.modes import guarantee_of

Floats = npt.NDArray[np.float64]
Kinds = Mapping[str, Floats]
# deviations of its own noise that a number of units must be above, or nothing is told of it
LEAST = 3.0
OTHERS = "all others"  # whose group is none of those that are named


def at_institutions(manifest: RunManifest, kept: Mapping[str, Any]) -> dict[str, Any] | None:
    """A summary's part about the hold-outs; None where the run has no evaluation."""
    terms = manifest.evaluation
    if terms is None:
        return None
    asked = {
        "hold_out": terms.hold_out,
        "counts": list(terms.counts),
        "epsilon": guarantee_of(manifest).evaluation_epsilon(),
    }
    if "total" not in kept:
        return asked | {"lost": kept.get("lost", "the run ended before it")}
    cells = Cells.of(manifest)
    noise = terms.noise_multiplier / cells.weight
    together = _named(cells, kept["total"], terms.expected_units)
    every = {
        name: _named(cells, counts, terms.expected_units) for name, counts in kept["each"].items()
    }
    rows = {name: figures(kinds, noise) for name, kinds in every.items()}
    summed = noise * math.sqrt(max(1, kept["replies"]))
    found = asked | {"noise": noise, "replies": kept["replies"]}
    found |= {"together": figures(together, summed), "institutions": rows, **_spread(rows)}
    return found | _parts(manifest, together, summed) | {"failures": kept["failures"]}


def _parts(manifest: RunManifest, together: Kinds, noise: float) -> dict[str, Any]:
    """Over all institutions: by class, by group, by the size of the loss, as far as counted."""
    found: dict[str, Any] = {}
    if CLASSES in together or CONFUSION in together:
        found["classes"] = _classes(together, noise, manifest.labels)
    if GROUPS in together and manifest.groups is not None:
        rows = [_share(wrong, right, noise, noise) for wrong, right in together[GROUPS].tolist()]
        found["groups"] = dict(zip((*manifest.groups.values, OTHERS), rows, strict=True))
    if LOSS in together:
        bins = [f"to {edge:g}" for edge in EDGES] + [f"above {EDGES[-1]:g}"]
        found["loss"] = dict(zip(bins, together[LOSS].tolist(), strict=True))
    return found


def figures(kinds: Kinds, noise: float) -> dict[str, float | None]:
    """Units, and the accuracy among them with its standard error; `noise` is of each count.

    None where the units are not clearly more than their noise, or records have no class.
    """
    kind = next((each for each in (RIGHT, CLASSES, CONFUSION, GROUPS) if each in kinds), None)
    if kind is None:
        counts = next(iter(kinds.values()))
        return {"units": float(counts.sum()), "accuracy": None, "error": None}
    wrong, right, cells = _right_of(kind, kinds[kind])
    return _share(wrong, right, noise * math.sqrt(cells[0]), noise * math.sqrt(cells[1]))


def _right_of(kind: str, counts: Floats) -> tuple[float, float, tuple[int, int]]:
    """Wrong and right in all, and how many cells each is a sum of."""
    if kind == CONFUSION:
        right, size = float(np.trace(counts)), len(counts)
        return float(counts.sum()) - right, right, (size * size - size, size)
    pairs = counts.reshape(-1, 2)
    wrong, right = (float(each) for each in pairs.sum(axis=0))
    return wrong, right, (len(pairs), len(pairs))


def _share(
    wrong: float, right: float, wrong_noise: float, right_noise: float
) -> dict[str, float | None]:
    units = wrong + right
    if units <= max(LEAST * math.hypot(wrong_noise, right_noise), 0.0):
        return {"units": units, "accuracy": None, "error": None}
    share = min(1.0, max(0.0, right / units))
    noise = math.hypot(share * wrong_noise, (1 - share) * right_noise) / units
    return {
        "units": units,
        "accuracy": share,
        "error": math.hypot(noise, math.sqrt(share * (1 - share) / units)),
    }


def _classes(kinds: Kinds, noise: float, labels: tuple[str, ...]) -> dict[str, Any]:
    """Of each true class, over all institutions: how many units of it were labelled right."""
    if CLASSES in kinds:
        rows = [_share(wrong, right, noise, noise) for wrong, right in kinds[CLASSES].tolist()]
    else:
        confusion = kinds[CONFUSION]
        right, all_of = np.diag(confusion), confusion.sum(axis=1)
        others = noise * math.sqrt(max(1, len(labels) - 1))
        pairs = zip((all_of - right).tolist(), right.tolist(), strict=True)
        rows = [_share(wrong, true, others, noise) for wrong, true in pairs]
    return dict(zip(labels, rows, strict=True))


def _spread(rows: Mapping[str, Mapping[str, float | None]]) -> dict[str, Any]:
    """The worst institution of those that can be told apart, and how far apart they are."""
    known = {
        name: (row["accuracy"], row["error"])
        for name, row in rows.items()
        if row["accuracy"] is not None and row["error"] is not None
    }
    if len(known) < 2:
        return {"worst": None, "lowest": None, "spread": None}
    shares, errors = np.array(list(known.values()), dtype=np.float64).T
    within = float(shares.var(ddof=1) - (errors**2).mean())
    worst = min(known, key=lambda name: known[name][0])
    return {"worst": worst, "lowest": dict(rows[worst]), "spread": math.sqrt(max(0.0, within))}


def _named(cells: Cells, counts: list[float], expected: float) -> Kinds:
    return cells.named(np.array(counts, dtype=np.float64) * expected)
