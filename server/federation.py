"""`fedlora-server run` and `resume`: SuperLink, its nodes, one Flower run, and how it ended.

What trains and decides runs in Flower's ServerApp process (`server.deployment.serve`). This process prepares the
run's folder, keeps SuperLink alive, lets members in and revoked ones out, and watches: whatever of the two is
killed, the checkpoint in the run's folder is what `resume` goes on from, in a new Flower run.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedlora.common.base import check_base, resolve_base
from fedlora.common.config import Config, config_to_toml, load_config
from fedlora.common.errors import BadInput, FedloraError, QuorumLost, Refused
from fedlora.common.files import write_atomically
from fedlora.server.directory import Directory
from fedlora.server.outcome import OUTCOME, appoint, outcome_path
from fedlora.server.participants import WAITING
from fedlora.server.runs import read_summary
from fedlora.server.superlink import SuperLink

LOOK = 0.5  # seconds between two looks at a run's files
ASK_FLOWER = 10.0  # seconds between two questions to Flower whether the run still lives

Watch = Callable[[Mapping[str, Any]], None]  # one line of metrics.jsonl
Tell = Callable[[str], None]  # whom a run waits for


def begin(directory: Directory, config: Path) -> Path:
    """The folder of a new run, with its configuration; BadInput lists what is wrong with it, and nothing is made."""
    settings = load_config(config)
    if faults := _faults(settings):
        raise BadInput(faults)
    check_base(resolve_base(settings.model.base))
    _check_members(directory, settings)
    folder = directory.new_run()
    write_atomically(folder / "config.toml", config_to_toml(settings).encode())
    return folder


def _faults(config: Config) -> list[str]:
    """What a coordinator's run could not begin with."""
    cohort, found = config.aggregation.minimum_cohort, []
    if config.federation.clients < cohort:
        found.append(
            f"[federation] clients = {config.federation.clients}: expected at least the "
            f"[aggregation] minimum_cohort = {cohort}"
        )
    for name, value in (("validation", config.data.validation), ("test", config.data.test)):
        if not isinstance(value, str):
            found.append(
                f"[data] {name} = {value:g}: expected a public file, for a coordinator has no training file"
            )
        elif not Path(value).is_file():
            found.append(
                f"[data] {name} = {value!r}: found no such file from {Path.cwd()}, where relative paths begin"
            )
    return found


def _check_members(directory: Directory, config: Config) -> None:
    """Refused where nobody who may join could make up the smallest cohort: waiting would be vain."""
    active, least = len(directory.registry.active()), config.aggregation.minimum_cohort
    if active < least:
        raise Refused(
            f"members.json: found {active} active members, expected at least the minimum_cohort of {least}"
        )


def last(directory: Directory) -> Path:
    """The folder of the run that `resume` goes on with."""
    runs = directory.runs()
    if not runs:
        raise BadInput(f"{directory.root}: found no run to resume")
    return runs[-1]


def carry_out(
    directory: Directory, folder: Path, watch: Watch, tell: Tell = lambda text: None
) -> dict[str, Any]:
    """Run what lies in `folder` to its end; the summary. Raises how it ended where it did not end well."""
    _check_members(directory, load_config(folder / "config.toml"))
    for name in (OUTCOME, WAITING):
        (folder / name).unlink(missing_ok=True)
    with SuperLink(directory.superlink_files(), directory.port) as link:
        admit(directory, link)
        token = appoint(folder)
        run = link.start_run({"directory": str(directory.root), "run": str(folder), "token": token})
        with _stopped_on_interrupt(link, run):
            outcome = _followed(directory, link, run, folder, token, watch, tell)
    write_atomically(folder / OUTCOME, json.dumps(outcome).encode())
    _raise(outcome)
    return read_summary(folder)


def admit(directory: Directory, link: SuperLink) -> None:
    """Register active members' nodes with SuperLink, and let revoked ones in no more."""
    registered, wanted = dict(directory.registered()), directory.flower_keys()
    for name, (node, key) in list(registered.items()):
        if wanted.get(name) != key:
            link.unregister(node)
            del registered[name]
            directory.write_registered(registered)
    for name, key in wanted.items():
        if name not in registered:
            registered[name] = (link.register(name, key), key)
            directory.write_registered(registered)


def _followed(
    directory: Directory, link: SuperLink, run: str, folder: Path, token: str, watch: Watch, tell: Tell
) -> dict[str, Any]:
    """How the run ended, as its process left it; what Flower says where that process left nothing."""
    metrics, seen, ending = folder / "metrics.jsonl", 0, outcome_path(folder, token)
    asked, said = time.monotonic(), ""
    while not ending.exists():
        seen, said = _watched(metrics, seen, watch), _told(folder / WAITING, said, tell)
        if time.monotonic() - asked > ASK_FLOWER:
            status, details = link.run_status(run)
            if status.startswith("finished") and not ending.exists():
                return {"code": 1, "message": f"Flower run {run}: {status} ({details}); resume goes on"}
            admit(directory, link)  # a revocation or a new member counts while the run goes on
            asked = time.monotonic()
        time.sleep(LOOK)
    _watched(metrics, seen, watch)
    outcome: dict[str, Any] = json.loads(ending.read_text())
    ending.unlink()
    return outcome


def _told(waiting: Path, said: str, tell: Tell) -> str:
    """Whom the run waits for, told where it is another than was `said`."""
    text = waiting.read_text() if waiting.exists() else ""
    if text not in ("", said):
        tell(text)
    return text


def _watched(metrics: Path, seen: int, watch: Watch) -> int:
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    for line in lines[seen:]:
        try:
            watch(json.loads(line))
        except ValueError:
            return seen  # half written: the next look finds it whole
        seen += 1
    return seen


def _raise(outcome: Mapping[str, Any]) -> None:
    kinds: dict[int, type[FedloraError]] = {2: BadInput, 3: Refused, 4: QuorumLost}
    if outcome["code"]:
        raise kinds.get(int(outcome["code"]), FedloraError)(str(outcome["message"]))


@contextmanager
def _stopped_on_interrupt(link: SuperLink, run: str) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        link.stop_run(run)
        raise
