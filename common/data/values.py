"""What the values of a column may be: text, names of units, numbers, labels of a public set.

Every fault names file, row and column. A unit has one spelling: names that differ in white space,
case or Unicode's forms are one unit, of which each would else have had the whole ε.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fedlora.common.codec.invisible import is_invisible
from fedlora.common.config.toml import shown
from fedlora.common.data.formats import Values
from fedlora.common.errors import BadInput

Ints = npt.NDArray[np.int64]
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_WHOLE = re.compile(r"(\d+)(\.0+)?")
_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)


def _no_nulls(values: Values, where: str, column: str) -> None:
    for row, value in enumerate(values, start=1):
        # NaN is how pandas writes a missing value
        if value is None or value == "" or value != value:
            raise BadInput(f"{where} row {row} {column}: found nothing, expected a value")


def strings(values: Values, where: str, column: str) -> list[str]:
    """Text, where an integer stands for its digits. What no file could hold as UTF-8 is refused."""
    for row, value in enumerate(values, start=1):
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole and (found := no_text(value)):
            raise BadInput(
                f"{where} row {row} {column}: found {found}, expected text or an integer"
            )
    return [str(value) for value in values]


def no_text(value: Any) -> str:
    """What stands where text is expected; "" for text that a file of UTF-8 can hold."""
    if not isinstance(value, str):
        return "nothing" if value is None else type(value).__name__
    return "half a surrogate pair" if not value.isascii() and _SURROGATE.search(value) else ""


def a_text(value: Any, place: str) -> str:
    """Text, as somebody asks it; BadInput for anything else."""
    if found := no_text(value):
        raise BadInput(f"{place}: found {found}, expected text")
    return str(value)


def names_of(values: Values, where: str, column: str) -> list[str]:
    """Units or institutions: strings or integers, none missing."""
    _no_nulls(values, where, column)
    return strings(values, where, column)


def one_spelling(name: str) -> str:
    """Of a unit or a label: NFKC, case folded, white space single, nothing invisible."""
    folded, before = name, ""
    while folded != before:  # one step may make room for another: what is canonical stays so
        before = folded
        folded = unicodedata.normalize("NFKC", _visible(folded)).casefold()
    return " ".join(folded.split())


def _visible(name: str) -> str:
    if name.isascii() and name.isprintable():
        return name
    return "".join(char for char in name if not is_invisible(char))


def units_of(values: Values, where: str, column: str) -> tuple[list[str], int]:
    """Units in their one spelling, and how many of them had several."""
    names = names_of(values, where, column)
    spelled = {name: one_spelling(name) for name in dict.fromkeys(names)}
    if "" in spelled.values():
        row = next(row for row, name in enumerate(names, start=1) if not spelled[name])
        raise BadInput(f"{where} row {row} {column}: found nothing visible, expected a value")
    # 7.0 beside 7: a column of numbers was saved while it had a gap
    wholes = {each: m[1] for each in set(spelled.values()) if (m := _WHOLE.fullmatch(each))}
    times = Counter(wholes.values())
    spelled = {
        n: wholes[each] if times[wholes.get(each, "")] > 1 else each for n, each in spelled.items()
    }
    several = sum(count > 1 for count in Counter(spelled.values()).values())
    return [spelled[name] for name in names], several


def numbers(values: Values, where: str, column: str) -> list[float]:
    """Finite numbers."""
    for row, value in enumerate(values, start=1):
        number = isinstance(value, int | float | str) and not isinstance(value, bool)
        if not number or not _is_finite(value):
            found = "nothing" if value is None else shown(value)
            raise BadInput(f"{where} row {row} {column}: found {found}, expected a number")
    return [float(value) for value in values]


def _is_finite(value: str | float) -> bool:
    try:
        return math.isfinite(float(value))
    except (ValueError, OverflowError):
        return False


def lists_of(values: Values, where: str, column: str) -> list[list[str]]:
    """Lists of names, some of them empty, none with a name twice."""
    found = []
    for row, value in enumerate(values, start=1):
        if not isinstance(value, list):
            kind = "nothing" if value is None else type(value).__name__
            raise BadInput(f"{where} row {row} {column}: found {kind}, expected a list of labels")
        names = names_of(value, f"{where} row {row} {column}", "of its list")
        found.append(list(dict.fromkeys(names)))
    return found


def label_lists(
    values: Values, labels: Sequence[str], where: str, column: str
) -> list[tuple[int, ...]]:
    """Places in the public label set."""
    place = {label: index for index, label in enumerate(labels)}
    found = []
    for row, names in enumerate(lists_of(values, where, column), start=1):
        for name in names:
            if name not in place:
                raise unknown_name(name, labels, f"{where} row {row} {column}")
        found.append(tuple(place[name] for name in names))
    return found


def refuse_alike(names: Sequence[str], where: str) -> None:
    """BadInput where two of a public set are one but for white space, case or Unicode's forms.

    Or where nothing of one is seen.
    """
    spelt: dict[str, str] = {}
    for name in names:
        spelling = one_spelling(name)
        if not spelling:
            raise BadInput(f"{where}: found {shown(name)}, expected a name that is seen")
        known = spelt.setdefault(spelling, name)
        if known != name:
            raise BadInput(
                f"{where}: found {shown(known)} and {shown(name)}, which differ in white space,"
                " case or Unicode form only, expected one spelling, or both in [data] labels"
            )


def refuse_fractions(names: Sequence[str], where: str) -> None:
    """BadInput where all are numbers and not all integers: a CSV file has numbers as text."""
    fraction = next((name for name in names if not name.lstrip("-").isdigit()), "")
    if fraction and all(map(_NUMBER.fullmatch, names)):
        raise BadInput(
            f"{where}: found numbers such as {fraction}, expected names or integers; task ="
            ' "regression" learns numbers, and [data] labels may list them as names'
        )


def unknown_name(value: Any, labels: Sequence[str], where: str, kind: str = "labels") -> BadInput:
    """Of a label, or a tag, that is none of the public ones; it names one that is spelt alike."""
    known = ", ".join(labels[:5]) + (", …" if len(labels) > 5 else "")
    near = [each for each in labels if one_spelling(each) == one_spelling(str(value))]
    hint = f"; did you mean {shown(near[0])}?" if near else ""
    return BadInput(
        f"{where}: found {shown(value)}, expected one of the {len(labels)} public {kind} {known}"
        + hint
    )


def labels_of(values: Values, labels: Sequence[str], where: str, column: str) -> Ints:
    """(n,) the place of each label in the public set."""
    if not labels:
        raise BadInput(
            f"{where} {column}: found no public label set, expected one to read labels against"
        )
    _no_nulls(values, where, column)
    place = {label: index for index, label in enumerate(labels)}
    for row, value in enumerate(values, start=1):
        if str(value) not in place:
            raise unknown_name(value, labels, f"{where} row {row} {column}")
    return np.array([place[str(value)] for value in values], dtype=np.int64)
