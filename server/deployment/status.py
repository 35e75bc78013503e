"""`fedlora-server status`: rounds, members, and the ε that each states; it only reads files."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fedlora.common.disk.files import lines_of
from fedlora.common.errors import BadInput, FedloraError
from fedlora.common.privacy.figures import shown_epsilon
from fedlora.common.protocol.messages import Consent, reply_from_bytes
from fedlora.common.terminal import printable
from fedlora.server.coordinator.folder import Directory
from fedlora.server.coordinator.members import Member
from fedlora.server.deployment.consents import REPLY, STARTED
from fedlora.server.deployment.process import OUTCOME, is_held, read_outcome
from fedlora.server.rounds.checkpoint import standing
from fedlora.server.runs.metrics import METRICS, lost_attempts

LAST = 8  # rounds shown, and lost attempts
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
    where = Text(f"{directory.settings.federation}, run {folder.name}: {_progress(folder)}")
    state = Text(_state(directory, folder))
    tables = [_members(directory, folder), _rounds(folder), *_lost(folder)]
    return Group(where, state, *tables)


def _progress(folder: Path) -> str:
    found = standing(folder / "checkpoint")
    if found is None:
        return "not begun"
    attempts = sum(phase.attempts for phase in found.manifest.accounted)
    return (
        f"round {found.round} of {found.manifest.rounds}, {sum(found.begun)} of {attempts} attempts"
        " used"
    )


def _state(directory: Directory, folder: Path) -> str:
    if is_held(folder):
        return "running"
    outcome = read_outcome(folder)
    if outcome is None:
        return f"stopped; fedlora-server resume --dir {directory.root}"
    return f"ended with {outcome.code}: {outcome.message}" if outcome.code else "done"


@dataclass(frozen=True)
class MemberState:
    """Where a member stands in a run. `last` is its last failure, or why it declines."""

    name: str
    state: str  # "member", or how its membership ended
    stated: str  # the ε that it signed, as shown; "" where it signed none
    answered: int | None  # the last round that it answered in
    failed: int
    last: str


def member_states(directory: Directory, folder: Path) -> list[MemberState]:
    """Each member's, by name; what is read of it is on one line."""
    lines = _lines(folder)
    return [
        _member_state(directory, folder, name, entries, lines)
        for name, entries in _by_name(directory).items()
    ]


def _member_state(
    directory: Directory,
    folder: Path,
    name: str,
    entries: Sequence[Member],
    lines: Sequence[Mapping[str, Any]],
) -> MemberState:
    failed = [
        f"{line['round']}: {reason}"
        for line in lines
        for who, reason in line["failures"]
        if who == name
    ]
    stated = _stated(directory, folder, name, entries)
    answered = [
        line["round"]
        for line in lines
        if stated and all(who != name for who, _ in line["failures"])
    ]
    declined, last = folder / "consents" / f"{name}.declined", failed[-1] if failed else ""
    if declined.is_file():
        last = f"declines: {declined.read_text(errors='replace', encoding='utf-8')}"
    state = printable(entries[-1].reason or "member")
    latest = answered[-1] if answered else None
    return MemberState(printable(name), state, stated, latest, len(failed), printable(last))


def _members(directory: Directory, folder: Path) -> Table:
    table = Table("member", "state", "ε stated", "last round", "last failure", box=None)
    for each in member_states(directory, folder):
        answered = "" if each.answered is None else str(each.answered)
        cells = (each.name, each.state, each.stated, answered, each.last)
        table.add_row(*(Text(cell) for cell in cells))
    return table


def watched(directory: Directory, folder: Path) -> dict[str, Any]:
    """What a live page says of a run beyond what its folder holds."""
    institutions = [asdict(each) for each in member_states(directory, folder)]
    return {
        "name": f"{directory.settings.federation}, run {folder.name}",
        "state": printable(_state(directory, folder)),
        "institutions": institutions,
    }


def _by_name(directory: Directory) -> dict[str, list[Member]]:
    """Each institution once, with all its keys, the one that counts now last."""
    found: dict[str, list[Member]] = {}
    for member in sorted(directory.registry.members(), key=lambda each: each.active):
        found.setdefault(member.name, []).append(member)
    return found


def _stated(directory: Directory, folder: Path, name: str, entries: Sequence[Member]) -> str:
    """What this member signed that it reserved; before the start, that it would reserve."""
    paths = [folder / "consents" / f"{name}{kind}" for kind in (STARTED, REPLY)]
    path = next((each for each in paths if each.exists()), None)
    if path is None:
        return ""
    for member in entries:  # a consent stays what an earlier key signed
        with suppress(FedloraError):
            reply = reply_from_bytes(
                path.read_bytes(), directory.settings.federation, {name: member.identity}
            )
            return shown_epsilon(reply.epsilon) if isinstance(reply, Consent) else ""
    return "not signed"


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


def _lost(folder: Path) -> list[Table]:
    """None where no attempt was lost."""
    table = Table("attempt", "lost, because", box=None)
    for attempt, reason in lost_attempts(folder)[-LAST:]:
        table.add_row(str(attempt), Text(printable(reason)))
    return [table] if table.row_count else []


def _lines(folder: Path) -> list[dict[str, Any]]:
    """The rounds so far; a last line without an end is half written."""
    path, found = folder / METRICS, []
    for line in (each for each in lines_of(path) if each.ended):
        try:
            found.append(_checked(line.value))
        except (ValueError, KeyError, TypeError, ArithmeticError) as error:
            raise BadInput(f"{path} line {line.number}: found no figures of a round") from error
    return found


def _checked(line: dict[str, Any]) -> dict[str, Any]:
    """What is shown of a line, each as the round loop writes it; an error for anything else."""
    counts = {name: int(line[name]) for name in ("round", "attempt", "replies", "asked")}
    figures = {
        name: float(line[name]) for name in ("accuracy", "epsilon") if line.get(name) is not None
    }
    failures = [(str(who), str(reason)) for who, reason in line["failures"]]
    return {**counts, **figures, "seconds": float(line["seconds"]), "failures": failures}
