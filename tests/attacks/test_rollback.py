"""A node's folder put back to an older day, ledger, key, head and all, as a backup does.

Before: a whole folder rolled back answered three more attempts, numbers 5 to 7 of a schedule of 4,
and in the review 3.899 were counted instead of the 5.898 that were spent. Here, where nobody keeps
heights, the restored ledger counts 0.156 of the 0.234 that three runs cost; now the coordinator
refuses it, and where it has an anchor it does not open.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from fedlora.common.errors import BadInput, Refused
from fedlora.common.protocol.messages import Answer, Decline
from fedlora.server.coordinator.coordinator import Coordinator
from fedlora.server.coordinator.heights import Heights
from fedlora.server.deployment.participants import Participants
from fedlora.server.rounds.cohort import Failure
from tests.client.institution import COORDINATOR, PHASE, Institution, manifest_of, task_of
from tests.server.fakes import ByAsking

RUN = manifest_of()
CHEAP = manifest_of(replace(PHASE, noise_multiplier=6.0))
NAMES = ("east", "north", "south")


def restore(node: Institution, backup: Path) -> None:
    """The whole folder, with everything in it, as it was."""
    node.ledger.close()
    shutil.rmtree(node.root)
    shutil.copytree(backup, node.root)


class Nodes(ByAsking):
    """Three institutions, asked in this process; `heights` as the coordinator's folder has them."""

    def __init__(self, root: Path, heights: Heights | None) -> None:
        self.root, self.all = root, {name: Institution(root / name, name) for name in NAMES}
        members = {name: node.identity.public for name, node in self.all.items()}
        self._coordinator = Coordinator("f", COORDINATOR, lambda: members, heights=heights)

    def online(self) -> set[str]:
        return set(self.all)

    def ask(
        self, requests: Mapping[str, bytes], deadline: float
    ) -> Iterator[tuple[str, bytes | Failure]]:
        for name, data in requests.items():
            yield name, self.all[name].resident.ask(data)

    def start(self, number: int) -> Participants:
        """Begin a run: offered, consented to and started, with whom that may be."""
        folder = self.root / "runs" / str(number)
        folder.mkdir(parents=True)
        run = replace(CHEAP, run=str(number))
        who = Participants(
            run, self._coordinator, self, folder, len(NAMES), 5.0, sleep=lambda _: None
        )
        who.gather()
        return who


def rolled_back(root: Path, heights: Heights | None) -> tuple[Nodes, Participants]:
    """A run, a backup of north, another run; then north is put back, and a third run is offered."""
    nodes, backup = Nodes(root, heights), root / "backup"
    north = nodes.all["north"]
    assert set(nodes.start(1).reserved) == set(NAMES)
    north.ledger.close()
    shutil.copytree(north.root, backup)
    north.restart()
    assert set(nodes.start(2).reserved) == set(NAMES)
    restore(north, backup)
    north.restart()
    return nodes, nodes.start(3)


def test_a_coordinator_refuses_a_ledger_that_was_put_back(tmp_path: Path) -> None:
    nodes, who = rolled_back(tmp_path / "before", None)
    north, east = (nodes.all[name].ledger.spent("people").epsilon for name in ("north", "east"))
    assert set(who.reserved) == set(NAMES) and 3 * north == pytest.approx(2 * east)
    assert 0.156 < north < 0.157 and 0.234 < east < 0.235

    nodes, who = rolled_back(tmp_path / "now", Heights(tmp_path / "heights.json"))
    assert not who.reserved, "nobody is charged for a cohort that is too small"
    reason = (tmp_path / "now" / "runs" / "3" / "consents" / "north.declined").read_text()
    assert "ledger height: found 2, expected at least 3" in reason


def test_a_coordinator_that_never_saw_the_member_again_keeps_its_height(tmp_path: Path) -> None:
    heights = Heights(tmp_path / "heights.json")
    nodes = Nodes(tmp_path, heights)
    who = nodes.start(1)
    north = nodes.all["north"]
    assert isinstance(north.ask(task_of(replace(CHEAP, run="1"))), Answer)
    assert set(nodes.start(2).reserved) == set(who.reserved) == set(NAMES)
    found = Heights(tmp_path / "heights.json")
    assert found.seen("north").height == north.ledger.head().count == 5
    assert found.seen("east").height == 3


def test_what_a_member_did_elsewhere_is_kept_though_no_run_begins(tmp_path: Path) -> None:
    heights = Heights(tmp_path / "heights.json")
    nodes = Nodes(tmp_path, heights)
    east, north = nodes.all["east"], nodes.all["north"]
    east.set_policy(east.folder.policy.read_text().replace("rounds = 10", "rounds = 2"))
    north.begin(RUN)
    assert not nodes.start(1).reserved and heights.seen("north").height == 2


def anchored(root: Path, anchor: Path) -> Institution:
    north = Institution(root)
    north.ledger.close()
    text = north.folder.policy.read_text()
    north.set_policy(f'{text}[ledger]\nanchor = "{anchor}"\n')
    return north


def test_an_anchored_ledger_that_was_put_back_does_not_open(tmp_path: Path) -> None:
    north, backup = anchored(tmp_path / "north", tmp_path / "anchor.json"), tmp_path / "backup"
    north.restart()
    north.begin(RUN)
    north.ledger.close()
    shutil.copytree(north.root, backup)
    north.restart()
    assert isinstance(north.ask(task_of(RUN)), Answer)
    restore(north, backup)
    with pytest.raises(Refused, match="found height 5, expected at most 3, the ledger's"):
        north.restart()


def test_an_anchor_in_the_folder_would_be_put_back_with_it(tmp_path: Path) -> None:
    for anchor in (tmp_path / "north" / "anchor.json", Path("../north/head/anchor.json")):
        with pytest.raises(BadInput, match=r"\[ledger\] anchor: found a file in .*, expected one"):
            anchored(tmp_path / "north", anchor).restart()
        shutil.rmtree(tmp_path / "north")


def test_no_attempt_beyond_the_schedule_is_answered(tmp_path: Path) -> None:
    north, backup = Institution(tmp_path / "north"), tmp_path / "backup"
    north.begin(RUN)
    north.ledger.close()
    shutil.copytree(north.root, backup)
    north.restart()
    last = PHASE.attempts
    for attempt in range(1, last + 1):
        assert isinstance(north.ask(task_of(RUN, attempt=attempt)), Answer)
    restore(north, backup)
    north.restart()
    for attempt in range(last + 1, last + 4):
        reply = north.ask(task_of(RUN, attempt=attempt))
        assert isinstance(reply, Decline)
        assert reply.reason == f"plan attempt: found {attempt}, expected at most {last}"
    assert not north.work.trained


def test_a_run_without_privacy_has_as_many_attempts_as_it_takes(tmp_path: Path) -> None:
    """It has no noise that was calibrated for their number, and nobody is charged."""
    north = Institution(tmp_path / "north")
    north.set_policy(north.folder.policy.read_text() + "allow_unnoised = true\n")
    run = manifest_of(replace(PHASE, noise_multiplier=0.0), mode="none", epsilon=0.0)
    north.begin(run)
    for attempt in range(1, 2 * PHASE.attempts + 1):
        assert isinstance(north.ask(task_of(run, attempt=attempt)), Answer)
    assert north.ledger.spent("people").epsilon == 0
