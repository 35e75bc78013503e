"""What was understood of a data file, in lines, for whoever owns it; never for anybody else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from fedlora.common.data.records import MEDIA, Records, UnitIndex, unit_groups
from fedlora.common.data.tagged import TAGS
from fedlora.common.tasks.batch import Encoded
from fedlora.common.tasks.multi_label import LABELS
from fedlora.common.tasks.regression import SCORE

SHOWN, SAMPLES, WIDTH = 12, 3, 100


def overview(records: Records, encoded: Encoded, labels: Sequence[str], most: int) -> Iterator[str]:
    """Units, what is to be learnt, lengths beside `most`, what is cut, and samples.

    `labels` is the public label set, `encoded` the same records.
    """
    units = unit_groups(records.units, len(records))
    yield _units(records, units)
    if records.spellings:
        yield records.spellings
    yield from _learnt(records, labels)
    yield encoded.told(most)
    for row in range(min(SAMPLES, len(records))):
        yield f"{records.place(row)}: {_sample(records, row, labels)}"


def listed(names: Sequence[str]) -> str:
    """The first of them."""
    return ", ".join(names[:SHOWN]) + ", …" * (len(names) > SHOWN)


def label_counts(records: Records, labels: Sequence[str]) -> dict[str, int]:
    """How many records, or words, have each label; empty where the task has none."""
    if records.labels is not None:
        places: Iterator[int] = (int(place) for place in records.labels)
    else:
        lists = records.parts.get(LABELS) or records.parts.get(TAGS) or ()
        places = (int(place) for each in lists for place in each)
    counts = Counter(places)
    return {label: counts[place] for place, label in enumerate(labels)} if counts else {}


def _units(records: Records, units: UnitIndex) -> str:
    if records.units is None:
        return "each record is a privacy unit"
    sizes = np.diff(units.offsets)
    return f"{len(units)} privacy units of {sizes.min()} to {sizes.max()} records"


def _learnt(records: Records, labels: Sequence[str]) -> Iterator[str]:
    if SCORE in records.parts:
        scores = records.parts[SCORE]
        yield f"numbers: {min(scores):g} to {max(scores):g}, of a scale {' to '.join(labels)}"
    counts = label_counts(records, labels)
    if not counts:
        return
    often = sorted(counts, key=lambda label: -counts[label])
    told = ", ".join(f"{label} {counts[label]}" for label in often[:SHOWN] if counts[label])
    more = f", and {len(often) - SHOWN} more labels" if len(often) > SHOWN else ""
    yield f"labels: {told}{more}"
    if never := [label for label in labels if not counts[label]]:
        yield f"labels that never occur here: {listed(never)}"


def _sample(records: Records, row: int, labels: Sequence[str]) -> str:
    files = records.parts.get(MEDIA)
    told = [records.texts[row] if files is None else files[row].name]
    if "second" in records.parts:
        told.append(records.parts["second"][row])
    if records.responses is not None:
        told.append(records.responses[row])
    text = " | ".join(each if len(each) <= WIDTH else each[:WIDTH] + "…" for each in told)
    if records.labels is not None:
        return f"{text} -> {labels[int(records.labels[row])]}"
    if SCORE in records.parts:
        return f"{text} -> {records.parts[SCORE][row]:g}"
    lists = records.parts.get(LABELS) or records.parts.get(TAGS)
    return text if lists is None else f"{text} -> {' '.join(labels[each] for each in lists[row])}"
