"""The policy that lies on the disk decides, and not the one that was read when the trainer began.

Before: a tightened `require_secure` was ignored until a restart, and three updates left in clear.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fedlora.common.protocol.messages import Answer, Consent, Decline
from tests.client.institution import Institution, manifest_of, offer_of, task_of

RUN = manifest_of()


@pytest.fixture
def north(tmp_path: Path) -> Institution:
    return Institution(tmp_path / "north")


def policy_with(north: Institution, line: str) -> str:
    return north.folder.policy.read_text().replace("[limits]", f"[limits]\n{line}")


def test_a_tightened_policy_holds_from_the_next_request_on(north: Institution) -> None:
    north.begin(RUN)
    assert isinstance(north.ask(task_of(RUN)), Answer)
    before = north.folder.policy.read_text()
    north.set_policy(policy_with(north, "require_secure = true"))
    for attempt in (2, 3, 4):
        reply = north.ask(task_of(RUN, attempt=attempt))
        assert isinstance(reply, Decline) and "require_secure" in reply.reason
    assert len(north.work.trained) == 1, "an update left in clear"
    north.set_policy(before)
    assert isinstance(north.ask(task_of(RUN, attempt=2)), Answer)


def test_a_consent_names_the_policy_that_it_was_given_under(north: Institution) -> None:
    north.set_policy(policy_with(north, "rank = 63"))
    consent = north.ask(offer_of(RUN))
    assert isinstance(consent, Consent)
    assert consent.policy_digest == north.folder.load_policy().digest


def writable(path: Path) -> None:
    path.chmod(0o666)


def linked(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


def gone(path: Path) -> None:
    path.unlink()


def broken(path: Path) -> None:
    path.write_text("[limits")


@pytest.mark.parametrize("spoil", [writable, linked, gone, broken])
@pytest.mark.parametrize("name", ["policy", "federation"])
def test_nothing_trains_by_a_file_that_is_not_the_owners(
    north: Institution, spoil: Callable[[Path], None], name: str
) -> None:
    north.begin(RUN)
    spoil(getattr(north.folder, name))
    north.resident.ask(task_of(RUN))
    assert not north.work.trained


def test_another_institutions_policy_is_refused(north: Institution) -> None:
    north.begin(RUN)
    north.set_policy(north.folder.policy.read_text().replace('"north"', '"south"'))
    north.resident.ask(task_of(RUN))
    assert not north.work.trained


def test_what_trainer_and_ledger_say_holds_until_a_restart(
    north: Institution, tmp_path: Path
) -> None:
    """Else a file that is edited while it runs would move the ledger, or the ticks."""
    north.begin(RUN)
    anchor, outbox = tmp_path / "anchor.json", tmp_path / "outbox"
    more = f'[trainer]\noutbox = "{outbox}"\n[ledger]\nanchor = "{anchor}"\n'
    north.set_policy(north.folder.policy.read_text() + more)
    assert isinstance(north.ask(task_of(RUN)), Answer)
    assert north.resident._node.policy.digest == north.folder.load_policy().digest
    assert not anchor.exists() and not outbox.exists()
    held = north.resident._node.policy
    assert (held.trainer.outbox, held.ledger.anchor) == ("outbox", "")
    north.ledger.close()
    north.restart()
    assert anchor.exists()


def test_a_kept_answer_is_not_handed_out_again_once_the_policy_forbids_it(
    north: Institution,
) -> None:
    """Before: what lay in the outbox was sent again before the policy was asked."""
    north.begin(RUN)
    first = north.resident.ask(task_of(RUN))
    before = north.folder.policy.read_text()
    north.set_policy(policy_with(north, "require_secure = true"))
    reply = north.ask(task_of(RUN))
    assert isinstance(reply, Decline) and "require_secure" in reply.reason
    north.set_policy(before)
    assert north.resident.ask(task_of(RUN)) == first
