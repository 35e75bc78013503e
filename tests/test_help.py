"""What `--help` says is what the docstring says; each program tells its version."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.metadata import version

import click
import pytest
import typer

from fedlora.client import cli as client
from fedlora.common.terminal import run_to_end
from fedlora.server import cli as server
from fedlora.simulations import cli as simulations

APPS = [client.app, server.app, simulations.app]
COLUMNS = 78  # of a terminal of 80, within the frame's margins


def commands(command: click.Command) -> Iterator[click.Command]:
    yield command
    for inner in getattr(command, "commands", {}).values():
        yield from commands(inner)


@pytest.mark.parametrize("app", APPS)
def test_nothing_of_it_is_lost_or_broken_in_its_midst(app: typer.Typer) -> None:
    """Rich reads [this] as markup and drops it, and keeps the line ends of all paragraphs but the
    first.
    """
    for command in commands(typer.main.get_command(app)):
        said = command.help or ""
        helps = [getattr(each, "help", None) or "" for each in command.params]
        assert not any("[" in text for text in (said, *helps)), command.name
        later = said.partition("\n\n")[2].splitlines()
        assert all(len(line) <= COLUMNS for line in later), command.name


@pytest.mark.parametrize("app", APPS)
def test_each_program_tells_its_version(
    app: typer.Typer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = {}
    for word in ("--version", "--help"):
        monkeypatch.setattr(sys, "argv", ["tool", word])
        with pytest.raises(SystemExit) as stop:
            run_to_end(app, "tool")
        assert not stop.value.code
        said[word] = capsys.readouterr().out
    assert said["--version"] == f"fedlora {version('fedlora')}\n"
    assert "--version" in said["--help"]
