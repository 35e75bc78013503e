"""What `--help` says is what the docstring says."""

from __future__ import annotations

from collections.abc import Iterator

import click
import pytest
import typer

from fedlora.client import cli as client
from fedlora.server import cli as server
from fedlora.simulations import cli as simulations

COLUMNS = 78  # of a terminal of 80, within the frame's margins


def commands(command: click.Command) -> Iterator[click.Command]:
    yield command
    for inner in getattr(command, "commands", {}).values():
        yield from commands(inner)


@pytest.mark.parametrize("app", [client.app, server.app, simulations.app])
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
