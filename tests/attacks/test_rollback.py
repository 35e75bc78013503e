"""A node's folder put back to an older day, ledger, key and head together, as a backup does.

Before: a whole folder rolled back answered three more attempts, numbers 5 to 7 of a schedule of 4.
What is answered again here is a number of the schedule: that is told by nothing in the folder.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from fedlora.common.protocol.messages import Answer, Decline
from tests.client.institution import PHASE, Institution, manifest_of, task_of

RUN = manifest_of()


def test_no_attempt_beyond_the_schedule_is_answered(tmp_path: Path) -> None:
    north, backup = Institution(tmp_path / "north"), tmp_path / "backup"
    north.begin(RUN)
    north.ledger.close()
    shutil.copytree(north.root, backup)
    north.restart()
    last = PHASE.attempts
    for attempt in range(1, last + 1):
        assert isinstance(north.ask(task_of(RUN, attempt=attempt)), Answer)
    north.ledger.close()
    shutil.rmtree(north.root)
    shutil.copytree(backup, north.root)
    north.restart()
    for attempt in range(last + 1, last + 4):
        reply = north.ask(task_of(RUN, attempt=attempt))
        assert isinstance(reply, Decline)
        assert reply.reason == f"plan attempt: found {attempt}, expected at most {last}"
    assert not north.work.trained
