"""What is printed: a line is a line, whatever somebody else's name holds."""

from __future__ import annotations

import io
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.common.errors import BadInput, Refused
from fedlora.common.terminal import bear_any_letter, fault_lines, printable


@given(st.text())
def test_what_is_printable_has_one_line_and_as_many_letters(text: str) -> None:
    shown = printable(text)
    assert len(shown) == len(text) and shown.isprintable() and printable(shown) == shown


def test_a_fault_has_one_line() -> None:
    assert fault_lines(BadInput(["a\nb", "ε\x1b[8m"])) == ["a b", "ε [8m"]
    assert fault_lines(Refused("a\nb\x1b")) == ["a", "b "]


def test_a_terminal_without_the_letter_shows_another(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="latin-1"))
    bear_any_letter()
    print("ε = 1, é")
    sys.stdout.flush()
    assert written.getvalue().decode("latin-1") == "? = 1, é\n"
