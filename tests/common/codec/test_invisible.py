"""What shows nothing is known as such, and nothing else is."""

from __future__ import annotations

import sys
import unicodedata

import pytest

from fedlora.common.codec.invisible import is_invisible

# One of each kind: control, format, marks, fillers, a blank, selectors, tags, the unassigned.
NOTHING = (
    *("\x00\x07\x7f\u00ad\u061c\u200b\u200e\u2060\ufeff\ufff9\U0001d173"),
    *("\u034f\u17b4\u17b5\u180b\u180e\u180f\u115f\u1160\u3164\uffa0\u2800"),
    *("\ufe00\ufe0f\U000e0000\U000e0020\U000e0100\U000e0fff\u2065\ufff0"),
)


@pytest.mark.parametrize("char", NOTHING, ids=ascii)
def test_what_shows_nothing_is_invisible(char: str) -> None:
    assert is_invisible(char)


@pytest.mark.parametrize("char", "a\u0431\u4e2d\u0301 \t\n\u00a0\u3000-\u200a\ufffd", ids=ascii)
def test_letters_marks_and_white_space_are_not(char: str) -> None:
    assert not is_invisible(char)


def test_no_letter_but_the_fillers_is_invisible() -> None:
    every = map(chr, range(sys.maxunicode + 1))
    found = {each for each in every if unicodedata.category(each)[0] == "L" and is_invisible(each)}
    assert found == set("\u115f\u1160\u3164\uffa0")
