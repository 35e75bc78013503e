"""`fedlora-server run` and `resume`: SuperLink, its nodes, one Flower run, and how it ended.

What trains and decides runs in Flower's ServerApp process (`server.deployment.serve`). This process
prepares the run's folder, keeps SuperLink alive, lets members in and revoked ones out, and watches:
whatever of the two is killed, the checkpoint in the run's folder is what `resume` goes on from, in
a new Flower run.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fedlora.common.config.load import load_config
from fedlora.common.config.schema import Config, config_to_toml
from fedlora.common.config.task_names import CLASSIFIED
from fedlora.common.disk.files import lines_of, write_atomically
from fedlora.common.errors import BadInput, FedloraError, QuorumLost, Refused
from fedlora.common.model.base import check_base, resolve_base
from fedlora.server.coordinator.folder import Directory
from fedlora.server.defaults.decide import decided
from fedlora.server.defaults.public_facts import PublicFacts
from fedlora.server.deployment.participants import WAITING
from fedlora.server.deployment.process import OUTCOME, appoint, is_held, outcome_path, read_outcome
from fedlora.server.deployment.superlink import START_SECONDS, SuperLink
from fedlora.server.release.from_run import read_summary
from fedlora.server.rounds.loop import SAY_AGAIN
from fedlora.server.runs.metrics import METRICS, lost_attempts

LOOK = 0.5  # seconds between two looks at a run's files
ASK_FLOWER = 10.0  # seconds between two questions to Flower whether the run still lives
PACKAGES = ("torch", "transformers", "peft", "pyarrow", "scipy", "sklearn")  # of `server.runs`
PATIENCE = 3  # questions in a row that Flower may leave without an answer, while it listens

Watch = Callable[[Mapping[str, Any]], None]  # one line of metrics.jsonl
Tell = Callable[[str], None]  # whom a run waits for


def begin(directory: Directory, config: Path, beside: bool = False) -> Path:
    """The folder of a new run, with its configuration.

    BadInput lists what is wrong with it, and nothing is made. Refused where the last run has not
    ended, unless the new one is begun `beside` it.
    """
    _check_packages()
    _check_last(directory, beside)
    settings = load_config(config)
    if faults := _faults(settings):
        raise BadInput(faults)
    check_base(resolve_base(settings.model.base))
    _check_members(directory, settings)
    folder = directory.new_run()
    write_atomically(folder / "config.toml", config_to_toml(_from_anywhere(settings)).encode())
    return folder


def _check_packages() -> None:
    """ModuleNotFoundError for what the run's own process would lack, once a run is made."""
    for name in PACKAGES:
        if find_spec(name) is None:
            raise ModuleNotFoundError(f"no package {name}", name=name)


def _check_last(directory: Directory, beside: bool) -> None:
    """Refused where a run goes on, or still could, with what institutions reserved for it."""
    runs = directory.runs()
    for folder in runs:
        if is_held(folder):
            raise Refused(
                f"{folder}: found a process that carries this run out, expected its end first"
            )
    for folder in runs[-1:]:
        reserved, outcome = any((folder / "consents").glob("*.reply")), read_outcome(folder)
        ended = outcome is not None and outcome.code in (0, Refused.exit_code)
        if reserved and not ended and not beside:
            raise Refused(
                f"{folder}: found a run that has not ended; fedlora-server resume goes on with it,"
                " and run --new begins another, which is charged anew"
            )


def _from_anywhere(config: Config) -> Config:
    """With whole paths: `resume` may be started in another folder than `run`."""
    data = config.data
    validation, test, public = (
        str(Path(str(each)).resolve()) if each else ""
        for each in (data.validation, data.test, data.public)
    )
    base = config.model.base
    model = (
        replace(config.model, base=str(Path(base).resolve()))
        if Path(base).is_dir()
        else config.model
    )
    data = replace(data, validation=validation, test=test, public=public)
    return replace(config, data=data, model=model)


def _faults(config: Config) -> list[str]:
    """What a coordinator's run could not begin with."""
    cohort, found = config.aggregation.minimum_cohort, []
    if config.federation.clients < cohort:
        found.append(
            f"[federation] clients = {config.federation.clients}: expected at least the "
            f"[aggregation] minimum_cohort = {cohort}"
        )
    try:
        # how many there are is read when the run begins; that there are some decides on a head
        decided(config, PublicFacts(0, 2 if config.model.task in CLASSIFIED else 0))
    except BadInput as error:
        found.extend(error.faults)
    data = config.data
    public = {"public": data.public} if data.public else {}
    for name, value in {"validation": data.validation, "test": data.test, **public}.items():
        if not isinstance(value, str):
            found.append(
                f"[data] {name} = {value:g}: expected a public file, for a coordinator has no"
                " training file"
            )
        elif not Path(value).is_file():
            found.append(
                f"[data] {name} = {value!r}: found no such file from {Path.cwd()}, where relative"
                " paths begin"
            )
    return found


def _check_members(directory: Directory, config: Config) -> None:
    """Refused where nobody who may join could make up the smallest cohort: a vain wait."""
    active, least = len(directory.registry.active()), config.aggregation.minimum_cohort
    if active < least:
        raise Refused(
            f"members.json: found {active} active members, expected at least the minimum_cohort of"
            f" {least}"
        )


def carry_out(
    directory: Directory, folder: Path, watch: Watch, tell: Tell = lambda text: None
) -> dict[str, Any]:
    """Run what lies in `folder` to its end: the summary, or raises how else it ended."""
    _check_packages()
    _check_members(directory, load_config(folder / "config.toml"))
    for name in (OUTCOME, WAITING):
        (folder / name).unlink(missing_ok=True)
    with SuperLink(directory.superlink_files(), directory.port) as link:
        for fault in admit(directory, link):
            tell(fault)
        token = appoint(folder)
        run = link.start_run({"directory": str(directory.root), "run": str(folder), "token": token})
        with _stopped_on_interrupt(link, run):
            outcome = _followed(directory, link, run, folder, token, watch, tell)
    write_atomically(folder / OUTCOME, json.dumps(outcome).encode())
    _raise(outcome)
    return read_summary(folder)


def admit(directory: Directory, link: SuperLink) -> list[str]:
    """Register active members' nodes with SuperLink, and let revoked ones in no more.

    What does not work with one member is no reason to stop for the others: it is returned, a line
    each.
    """
    registered, wanted, faults = dict(directory.registered()), directory.flower_keys(), []
    for name, (node, key) in list(registered.items()):
        if wanted.get(name) != key:
            link.unregister(node)
            del registered[name]
            directory.write_registered(registered)
    for name, key in wanted.items():
        if name in registered:
            continue
        try:
            node = link.register(name, key, {known for known, _ in registered.values()})
        except FedloraError as error:
            faults.append(f"{name}: SuperLink does not take its node: {error}")
            continue
        registered[name] = (node, key)
        directory.write_registered(registered)
    return faults


@dataclass(eq=False)
class _Vigil:
    """Asks Flower now and then whether a run still lives."""

    link: SuperLink
    run: str
    began: float = field(default_factory=time.monotonic)
    unanswered: int = 0  # questions in a row

    def ended(self) -> str:
        """Why Flower does not go on with the run; empty where it does.

        FedloraError where it can't be asked.
        """
        try:
            status, details = self.link.run_status(self.run)
        except FedloraError:
            self.unanswered += 1
            if self.unanswered == PATIENCE or not self.link.listens():
                raise
            return ""
        self.unanswered = 0
        if status.startswith("finished"):
            return f"{status} ({details})"
        late = time.monotonic() - self.began > START_SECONDS
        if status == "pending" and (late or self.link.lost()):
            log = self.link.lost() or "superexec.log, of whoever started SuperLink,"
            return f"no executor has taken it; {log} says why"
        return ""


def _followed(
    directory: Directory,
    link: SuperLink,
    run: str,
    folder: Path,
    token: str,
    watch: Watch,
    tell: Tell,
) -> dict[str, Any]:
    """How the run ended, as its process left it; what Flower says where it left nothing."""
    metrics, seen, ending = folder / METRICS, 0, outcome_path(folder, token)
    asked, vigil, faults = time.monotonic(), _Vigil(link, run), list[str]()
    waits, lost = _Waits(folder / WAITING, tell), len(lost_attempts(folder))
    while not ending.exists():
        seen, lost = _watched(metrics, seen, watch), _lost(folder, lost, tell)
        waits.look()
        if time.monotonic() - asked > ASK_FLOWER:
            why = vigil.ended()
            if why and not ending.exists():
                return {"code": 1, "message": f"Flower run {run}: {why}; resume goes on"}
            # a revocation or a new member counts while the run goes on
            told, faults = faults, admit(directory, link)
            for fault in faults:
                if fault not in told:
                    tell(fault)
            asked = time.monotonic()
        time.sleep(LOOK)
    _watched(metrics, seen, watch)
    _lost(folder, lost, tell)
    outcome: dict[str, Any] = json.loads(ending.read_text(encoding="utf-8"))
    ending.unlink()
    return outcome


@dataclass(eq=False)
class _Waits:
    """Tells whom the run waits for, once, and at most once a minute where that changes."""

    waiting: Path
    tell: Tell
    said: str = ""
    when: float = -math.inf

    def look(self) -> None:
        """Read the file, and tell."""
        text = self.waiting.read_text(encoding="utf-8") if self.waiting.exists() else ""
        if text not in ("", self.said) and time.monotonic() - self.when >= SAY_AGAIN:
            self.tell(text)
            self.said, self.when = text, time.monotonic()


def _lost(folder: Path, known: int, tell: Tell) -> int:
    """Tell which attempts were lost beside those `known`, and why; how many there are now."""
    found = lost_attempts(folder)
    for attempt, reason in found[known:]:
        tell(f"attempt {attempt} is lost: {reason}")
    return len(found)


def _watched(metrics: Path, seen: int, watch: Watch) -> int:
    for line in [*lines_of(metrics)][seen:]:
        if line.value is None:
            return seen  # half written: the next look finds it whole
        watch(line.value)
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
