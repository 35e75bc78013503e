"""What is printed: a line is a line, whatever somebody else's name holds."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Annotated, Any

import click
import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from fedlora.common.errors import BadInput, QuorumLost, Refused
from fedlora.common.terminal import (
    MOST_CAUSES,
    bear_any_letter,
    fault_lines,
    one_line,
    places,
    printable,
    run_to_end,
)


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


def test_one_line_is_bounded_and_changes_nothing_twice() -> None:
    for text in ("a\nb", "x" * 30, "\x1b[2J", "ε", ""):
        once = one_line(text, 20)
        assert once.isprintable() and len(once) <= 20 and one_line(once, 20) == once


@pytest.mark.parametrize(
    ("ends", "code", "said"),
    [
        (lambda: 0, 0, ""),
        (lambda: None, 0, ""),
        (lambda: 5, 5, ""),
        (lambda: 130, 1, "\nstopped\n"),  # what typer gives after Ctrl-C
        (KeyboardInterrupt(), 1, "\nstopped\n"),
        (BadInput(["a\x1b", "b"]), 2, "tool: a \ntool: b\n"),
        (Refused("no"), 3, "tool: no\n"),
        (QuorumLost("few"), 4, "tool: few\n"),
        (FileNotFoundError(2, "No such file", "x"), 2, "tool: x: No such file\n"),
        (OSError(28, "No space left"), 1, "tool: No space left\n"),
        (
            FileExistsError(17, "Exists", "x"),
            2,
            "tool: x: Exists, expected nothing there, or a folder\n",
        ),
        (IsADirectoryError(21, "Is one", "x"), 2, "tool: x: Is one, expected a file\n"),
        (click.UsageError("which?"), 2, "Error: which?\n"),
        (click.Abort(), 1, "\nstopped\n"),
    ],
)
def test_a_command_ends_with_its_lines_and_its_code(
    capsys: pytest.CaptureFixture[str], ends: Any, code: int, said: str
) -> None:
    def app(standalone_mode: bool) -> object:
        assert not standalone_mode
        if isinstance(ends, BaseException):
            raise ends
        return ends()

    with pytest.raises(SystemExit) as stop:
        run_to_end(app, "tool", lambda: "stopped")
    assert int(stop.value.code or 0) == code and capsys.readouterr().err == said


def test_an_error_s_places_say_nothing_that_it_says() -> None:
    def inner() -> None:
        raise ValueError("patient 4711 has influenza")

    try:
        try:
            inner()
        except ValueError as error:
            raise KeyError("4711") from error
    except KeyError as error:
        said = places(error)
    assert said.startswith("KeyError at test_terminal.py:") and "; after ValueError at " in said
    assert "inner" in said and "4711" not in said and "\n" not in said


def test_a_chain_of_errors_has_an_end() -> None:
    error = ValueError("x")
    error.__cause__ = error
    assert places(error).count("ValueError") == MOST_CAUSES


def test_a_mistyped_command_has_one_suggestion(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    app, inner = typer.Typer(), typer.Typer()
    app.add_typer(inner, name="policy")
    for name in ("explain", "other"):
        inner.command(name)(lambda: None)
    for words in (("polcy",), ("policy", "explan")):
        monkeypatch.setattr(sys, "argv", ["tool", *words])
        with pytest.raises(SystemExit) as stop:
            run_to_end(app, "tool")
        said = capsys.readouterr().err
        assert stop.value.code == 2 and said.count("Did you mean") == 1


@pytest.mark.parametrize("given", ["", " ", "a ", " a"])
@pytest.mark.parametrize("words", [("FILE",), ("file", "--out", "FILE")])
def test_a_path_of_the_command_line_is_not_empty_nor_ends_in_white_space(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    given: str,
) -> None:
    """An empty one would be the folder that one stands in: keys and runs were written there."""
    app, came = typer.Typer(), list[tuple[Path, Path | None]]()

    @app.command()
    def show(file: Path, out: Annotated[Path | None, typer.Option("--out")] = None) -> None:
        came.append((file, out))

    @app.command()
    def other() -> None:
        """A group has two commands."""

    def called(*given: str) -> int:
        monkeypatch.setattr(sys, "argv", ["tool", "show", *given])
        with pytest.raises(SystemExit) as stop:
            run_to_end(app, "tool")
        return int(stop.value.code or 0)

    assert called(*(word.replace("FILE", given) for word in words)) == 2 and not came
    name = words[-2] if words[1:] else "FILE"
    expected = f'tool: {name} "{given}": expected a path without white space at its ends\n'
    assert capsys.readouterr().err == expected
    assert called("a b", "--out", ".") == 0 and came == [(Path("a b"), Path())]
