"""Words with tags, as files hold them: a list of words beside one of BIO tags, or spans of a text.

A span is `{"start", "end", "label"}`, in characters. Every word that it touches is of its entity.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from fedlora.common.config.toml import shown
from fedlora.common.data.data_file import columns_of
from fedlora.common.data.formats import Values
from fedlora.common.data.values import no_text, refuse_alike, unknown_name
from fedlora.common.errors import BadInput

WORDS, TAGS = "tokens", "tags"  # of `Records.parts`
OUTSIDE = "O"  # the tag of a word that is of no entity
_JOINERS = "\u200c\u200d"  # invisible, within words of Persian and of Indian scripts
_TAG = re.compile(r"O|[BI]-.+")


def words_of(text: str) -> tuple[list[str], list[tuple[int, int]]]:
    """Words and marks of a text, and where each begins and ends."""
    found = list(_word().finditer(text))
    return [each[0] for each in found], [each.span() for each in found]


@cache
def _word() -> re.Pattern[str]:
    """Letters and digits, or one mark; with what is combined with them: an accent, a vowel sign."""
    every = (chr(number) for number in range(0x300, sys.maxunicode + 1))
    combined = _JOINERS + "".join(each for each in every if unicodedata.category(each)[0] == "M")
    return re.compile(rf"\w[\w{combined}]*|[^\w\s][{combined}]*")


def read_tag_set(path: Path, column: str) -> tuple[str, ...]:
    """ "O", and "B-" and "I-" of each type of entity that occurs in a *public* file."""
    where = path.name
    types: set[str] = set()
    for row, value in enumerate(columns_of(path, (column,), None)[column], start=1):
        for each in _list(value, where, row, column):
            label = each.get("label") if isinstance(each, Mapping) else each
            if no_text(label) or not label:
                raise BadInput(f"{where} row {row} {column}: found {shown(label)}, expected a tag")
            if isinstance(each, Mapping):
                types.add(label)
            elif _checked_tag(label, where, row, column) != OUTSIDE:
                types.add(label[2:])
    if not types:
        raise BadInput(f"{where} {column}: found no entity, expected at least one")
    refuse_alike(sorted(types), f"{where} {column}")
    return (OUTSIDE, *(f"{mark}-{kind}" for kind in sorted(types) for mark in "BI"))


def tagged_words(
    words: Values, tags: Values, labels: Sequence[str], where: str, columns: tuple[str, str]
) -> dict[str, Sequence[Any]]:
    """Words of each record and the places of their tags in the public set, as `Records.parts`.

    `words` are lists of words, or texts whose `tags` are spans. BadInput names the row.
    """
    places = {tag: place for place, tag in enumerate(labels)}
    found: dict[str, Sequence[Any]] = {WORDS: [], TAGS: []}
    for row, (given, marks) in enumerate(zip(words, tags, strict=True), start=1):
        marked = _list(marks, where, row, columns[1])
        if isinstance(given, str):
            own, named = _spans(given, marked, where, row, columns[1])
        else:
            own = [*_list(given, where, row, columns[0])]
            named = [_checked_tag(tag, where, row, columns[1]) for tag in marked]
        if any(map(no_text, own)) or len(own) != len(named):
            raise BadInput(
                f"{where} row {row}: found {len(own)} words and {len(named)} tags, expected a tag"
                " for each word, which is text"
            )
        for tag in named:
            if tag not in places:
                raise unknown_name(tag, labels, f"{where} row {row} {columns[1]}", "tags")
        found[WORDS].append(own)  # type: ignore[attr-defined]
        found[TAGS].append([places[tag] for tag in named])  # type: ignore[attr-defined]
    return found


def _spans(
    text: str, spans: Sequence[Any], where: str, row: int, column: str
) -> tuple[list[str], list[str]]:
    words, places = words_of(text)
    tags = [OUTSIDE] * len(words)
    for span in spans:
        fields = span if isinstance(span, Mapping) else {}
        start, end, label = (fields.get(name) for name in ("start", "end", "label"))
        whole = isinstance(start, int) and isinstance(end, int) and isinstance(label, str)
        if not whole or not 0 <= start < end <= len(text):  # type: ignore[operator]
            raise BadInput(
                f"{where} row {row} {column}: found {shown(span)} from {start} to {end}, expected"
                f" start, end and label within the {len(text)} characters of its text"
            )
        inside = [n for n, (a, b) in enumerate(places) if a < end and b > start]  # type: ignore[operator]
        if not inside or any(tags[place] != OUTSIDE for place in inside):
            found = "no word in it" if not inside else "a word of another span in it"
            raise BadInput(
                f"{where} row {row} {column}: found {found} from {start} to {end}, expected words"
                " of its own: BIO says one entity of a word"
            )
        for place in inside:
            tags[place] = f"{'B' if place == inside[0] else 'I'}-{label}"
    return words, tags


def _checked_tag(tag: Any, where: str, row: int, column: str) -> str:
    if not isinstance(tag, str) or not _TAG.fullmatch(tag):
        raise BadInput(
            f'{where} row {row} {column}: found {shown(tag)}, expected "O", "B-" or "I-" and a type'
        )
    return tag


def _list(value: Any, where: str, row: int, column: str) -> Sequence[Any]:
    if not isinstance(value, list):
        found = "nothing" if value is None else type(value).__name__
        raise BadInput(f"{where} row {row} {column}: found {found}, expected a list")
    return value
