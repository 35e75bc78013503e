"""`fedlora-server status`: rounds, members, and the ε that each of them states; it reads files only."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from fedlora.common.errors import BadInput, FedloraError
from fedlora.common.protocol import Consent, reply_from_bytes
from fedlora.common.statement import shown_epsilon
from fedlora.server.directory import Directory
from fedlora.server.outcome import OUTCOME

LAST = 8  # rounds shown
LOOK = 1.0  # seconds


def show(directory: Directory, console: Console, follow: bool) -> None:
    """Print the last run's state; with `follow`, until it ends."""
    runs = directory.runs()
    if not runs:
        raise BadInput(f"{directory.root}: found no run")
    folder = runs[-1]
    if not follow:
        console.print(_view(directory, folder))
        return
    with Live(_view(directory, folder), console=console, auto_refresh=False) as live:
        while not (folder / OUTCOME).exists():
            time.sleep(LOOK)
            live.update(_view(directory, folder), refresh=True)
        live.update(_view(directory, folder), refresh=True)


def _view(directory: Directory, folder: Path) -> Group:
    return Group(_state(folder), _members(directory, folder), _rounds(folder))


def _state(folder: Path) -> str:
    path = folder / OUTCOME
    if not path.exists():
        return f"run {folder.name}: under way, or stopped without a word"
    outcome = json.loads(path.read_text())
    return f"run {folder.name}: " + (
        "done" if not outcome["code"] else f"ended with {outcome['code']}: {outcome['message']}"
    )


def _members(directory: Directory, folder: Path) -> Table:
    table = Table("member", "state", "ε stated", "last round", "last failure", box=None)
    lines = _lines(folder)
    for each in directory.registry.members():
        failed = [
            (line["round"], reason)
            for line in lines
            for name, reason in line["failures"]
            if name == each.name
        ]
        state = each.reason if each.ended else "member"
        epsilon = _stated(directory, folder, each.name)
        answered = [
            line["round"] for line in lines if epsilon and all(n != each.name for n, _ in line["failures"])
        ]
        last = f"{failed[-1][0]}: {failed[-1][1]}" if failed else ""
        table.add_row(each.name, state, epsilon, str(answered[-1]) if answered else "", last[:60])
    return table


def _stated(directory: Directory, folder: Path, name: str) -> str:
    """What this member's signed consent says it reserved; "" where it has not consented."""
    path = folder / "consents" / f"{name}.reply"
    if not path.exists():
        return ""
    members = directory.registry.active()
    try:
        reply = reply_from_bytes(path.read_bytes(), directory.settings.federation, members)
    except FedloraError:
        return "not signed"
    return shown_epsilon(reply.epsilon) if isinstance(reply, Consent) else ""


def _rounds(folder: Path) -> Table:
    table = Table("round", "attempt", "answered", "seconds", "accuracy", "ε so far", box=None)
    for line in _lines(folder)[-LAST:]:
        accuracy = line.get("accuracy")
        table.add_row(
            str(line["round"]),
            str(line["attempt"]),
            f"{line['replies']} of {line['asked']}",
            f"{line['seconds']:.1f}",
            f"{accuracy:.3f}" if accuracy is not None else "",
            shown_epsilon(line["epsilon"]) if line.get("epsilon") is not None else "",
        )
    return table


def _lines(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            break  # half written
    return found
