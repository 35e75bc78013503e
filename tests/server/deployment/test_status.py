"""What `fedlora-server status` says of a run: where it stands, who is in it, what goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from fedlora.common.errors import BadInput
from fedlora.common.trust.identity import Identity
from fedlora.common.trust.rotation import rotation_to_text
from fedlora.server.coordinator.folder import Directory
from fedlora.server.deployment.process import OUTCOME, _only_process
from fedlora.server.deployment.status import show, watched
from fedlora.server.rounds.checkpoint import Checkpoint
from fedlora.server.watch.live import Watching
from tests.server.enrolments import request
from tests.server.releases import SPEC, finished_run

Said = Callable[[], list[str]]


@pytest.fixture
def directory(tmp_path: Path) -> Directory:
    """A run of three rounds that two of three members consented to.

    The third declined, one has a new key.
    """
    made = Directory.create(tmp_path / "c", "bank-intents", "127.0.0.1")
    members = {name: Identity.generate() for name in ("north", "south", "west")}
    for name, identity in members.items():
        made.registry.enrol(request(identity, name), name)
    finished_run(made, {name: members[name] for name in ("north", "south")})
    run = made.runs()[0]
    Checkpoint.open(run / "checkpoint", SPEC).begin_attempt(0)
    (run / "consents" / "west.declined").write_text("budget [people]: would be passed")
    line = {
        "round": 1,
        "attempt": 1,
        "replies": 1,
        "asked": 2,
        "seconds": 2.0,
        "failures": [["south", "no answer"]],
    }
    (run / "metrics.jsonl").write_text(json.dumps(line | {"epsilon": 0.5, "accuracy": 0.75}) + "\n")
    new = Identity.generate()
    made.registry.rotate(rotation_to_text(members["north"], request(new, "north")), "r")
    return made


@pytest.fixture
def said(directory: Directory) -> Said:
    def call() -> list[str]:
        console = Console(width=200, record=True, quiet=False)
        with console.capture() as capture:
            show(directory, console, follow=False)
        return [" ".join(line.split()) for line in capture.get().splitlines()]

    return call


def test_where_a_run_stands_and_who_is_in_it(directory: Directory, said: Said) -> None:
    lines = said()
    assert lines[0] == "bank-intents, run 1: round 3 of 3, 1 of 4 attempts used"
    assert lines[1] == f"stopped; fedlora-server resume --dir {directory.root}"
    rows = {line.split()[0]: line for line in lines[3:6]}
    assert rows["north"] == "north member 1.52 1"  # once, and what its old key signed still counts
    assert rows["south"] == "south member 1.52 1: no answer"
    assert rows["west"] == "west member declines: budget [people]: would be passed"
    assert lines[-1] == "1 1 1 of 2 2.0 0.750 0.5"


def test_why_attempts_were_lost_is_shown(directory: Directory, said: Said) -> None:
    """It stood in the log alone, and in Flower's database."""
    lost = {"attempt": 2, "reason": "round 2: 1 of 2 asked answered (south: \x1b[2Jgone)"}
    (directory.runs()[0] / "lost.jsonl").write_text(json.dumps(lost) + "\n{half")
    assert said()[-1] == "2 round 2: 1 of 2 asked answered (south: [2Jgone)"


def test_whether_it_runs_and_how_it_ended(directory: Directory, said: Said) -> None:
    run = directory.runs()[0]
    with _only_process(run):
        assert said()[1] == "running"
    (run / OUTCOME).write_text(json.dumps({"code": 3, "message": "all 4 attempts are spent"}))
    assert said()[1] == "ended with 3: all 4 attempts are spent"
    (run / OUTCOME).write_text(json.dumps({"code": 0, "message": ""}))
    assert said()[1] == "done"


DAMAGED = [b"[]", b"{", b"\xce", b'{"round":1}', b"[" * 10**5, b'{"round":1e999}']


@pytest.mark.parametrize("line", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_line_is_named_and_a_half_written_one_waited_for(
    directory: Directory, said: Said, line: bytes
) -> None:
    path, before = directory.runs()[0] / "metrics.jsonl", said()
    with path.open("ab") as stream:
        stream.write(line)
    assert said() == before
    with path.open("ab") as stream:
        stream.write(b"\n")
    with pytest.raises(BadInput, match=rf"^{path} line 2: found no figures of a round$"):
        said()


def test_a_reason_that_is_no_text_is_shown_as_far_as_it_is(
    directory: Directory, said: Said
) -> None:
    (directory.runs()[0] / "consents" / "west.declined").write_bytes(
        b"no \xff\x1b[8m\nnorth member"
    )
    assert [line for line in said() if line.startswith("west")] == [
        "west member declines: no \N{REPLACEMENT CHARACTER} [8m north member"
    ]


def test_a_run_that_has_not_begun_is_shown_too(directory: Directory, said: Said) -> None:
    directory.new_run()
    assert said()[0] == "bank-intents, run 2: not begun"


def test_a_live_page_says_of_members_what_status_says(directory: Directory) -> None:
    folder = directory.runs()[0]
    with Watching(folder, more=lambda: watched(directory, folder)) as page:
        found = json.loads(page.state())
    assert found["name"] == "bank-intents, run 1" and found["state"].startswith("stopped; ")
    of = {each["name"]: each for each in found["institutions"]}
    assert (of["north"]["failed"], of["south"]["failed"], of["south"]["last"]) == (
        0,
        1,
        "1: no answer",
    )
    assert of["west"]["last"] == "declines: budget [people]: would be passed"
    assert float(of["north"]["stated"]) > 0 and of["west"]["stated"] == ""
