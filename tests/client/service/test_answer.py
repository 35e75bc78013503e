"""The resident trainer says yes once to what is signed and allowed, and no to the rest."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from fedlora.client.node import outbox
from fedlora.common.errors import BadInput, Refused
from fedlora.common.ledger.ledger import Budget
from fedlora.common.manifest.manifest import RunManifest, SecureTerms
from fedlora.common.manifest.plan import Delta, RoundPlan
from fedlora.common.model.projection import Affine, Projection
from fedlora.common.protocol import stages
from fedlora.common.protocol.messages import (
    PLAN_TAG,
    STAGE_TAG,
    Answer,
    Consent,
    Decline,
    Reply,
    Request,
    SignedStage,
    Task,
    request_to_bytes,
)
from fedlora.common.protocol.pieces import PARTS_TAG, Coming, Fetch, Piece
from fedlora.common.protocol.vector_parts import Parts
from fedlora.common.secagg.cohort import THRESHOLD_RULE
from fedlora.common.trust.identity import Identity, Signed
from tests.client.institution import (
    BASE,
    COORDINATOR,
    OTHERS,
    PHASE,
    POLICY,
    FakeWork,
    Institution,
    declined,
    manifest_of,
    offer_of,
    start_of,
    task_of,
)
from tests.disk import fill, small_disk

RUN = manifest_of()


@pytest.fixture
def north(tmp_path: Path) -> Institution:
    return Institution(tmp_path / "node")


def test_an_offer_is_consented_to_once_and_a_task_answered_once(north: Institution) -> None:
    first = north.resident.ask(offer_of(RUN))
    consent = north.read(first)
    assert isinstance(consent, Consent) and 0 < consent.epsilon <= RUN.epsilon
    assert consent.policy_digest == north.folder.load_policy().digest
    # offered again: signed anew, consented to once
    assert north.resident.ask(offer_of(RUN, seconds=90)) == first
    assert [entry.body["kind"] for entry in north.ledger.entries()] == ["open"]
    north.begin(RUN)
    assert north.resident.ask(offer_of(RUN, seconds=90)) == first
    answer = north.resident.ask(task_of(RUN))
    assert isinstance(north.read(answer), Answer)
    north.restart()
    assert north.resident.ask(task_of(RUN)) == answer
    assert not north.work.trained, "the same attempt trained twice"
    kinds = [entry.body["kind"] for entry in north.ledger.entries()]
    assert kinds == ["open", "consent", "reserve", "commit"]


def test_replays_and_rewinds_are_refused(north: Institution) -> None:  # msg-replayed
    north.begin(RUN)
    north.ask(task_of(RUN))
    north.ask(task_of(RUN, round_=2, attempt=3, adapter="sha256:b"))
    for data, match in (
        (task_of(RUN, adapter="sha256:c"), "rewind"),  # the same attempt, another state
        (task_of(RUN, round_=2, attempt=3, adapter="sha256:b", vector=b"1234"), "rewind"),
        (task_of(RUN, round_=2, attempt=2, adapter="sha256:b"), "expected more than 3"),
        (task_of(RUN, round_=1, attempt=4), "expected 2 or more"),
        (task_of(RUN, round_=2, attempt=4, adapter="sha256:z"), "began from"),
    ):
        reply = declined(north, data)
        assert reply.refused and match in reply.reason
    assert len(north.work.trained) == 2
    assert isinstance(north.ask(task_of(RUN, round_=2, attempt=4, adapter="sha256:b")), Answer)


def test_a_failure_in_sight_of_data_is_told_in_one_way_whatever_it_was(north: Institution) -> None:
    north.begin(RUN)
    told = []
    for attempt, fault in enumerate((BadInput("row 5"), Refused("its budget"), OSError("disk")), 1):

        def fails(fault: Exception = fault) -> None:
            raise fault

        north.work.during = fails
        reply = declined(north, task_of(RUN, attempt=attempt))
        told.append((reply.reason, reply.refused))
    assert len(set(told)) == 1


def test_plans_do_not_go_back_where_the_ledger_alone_is_left(north: Institution) -> None:
    north.begin(RUN)
    north.ask(task_of(RUN, round_=2, attempt=3))
    for path in (
        *(north.folder.run(RUN.digest) / "plans").iterdir(),
        *north.folder.under("outbox").rglob("*3.reply"),
    ):
        path.unlink()
    for round_, attempt in ((2, 3), (1, 4), (2, 2)):
        assert declined(north, task_of(RUN, round_=round_, attempt=attempt)).refused
    assert len(north.work.trained) == 1


def test_who_allows_packed_batches_is_asked_for_them(north: Institution) -> None:
    text = north.folder.policy.read_text().replace("[limits]", "[limits]\nallow_packed = true")
    north.set_policy(text)
    north.restart()
    assert isinstance(north.ask(offer_of(replace(RUN, batches="packed"))), Consent)


STRANGER = Identity.generate()
MASKED = SecureTerms(THRESHOLD_RULE, 1, 4, 32, 1000, (1.0,))


@pytest.mark.parametrize(
    ("data", "match"),
    [
        pytest.param(b"", "no message", id="empty"),
        pytest.param(offer_of(RUN, STRANGER), "found the key", id="msg-wrong-sender"),
        pytest.param(task_of(RUN, key=STRANGER), "found the key", id="plan-of-a-stranger"),
        pytest.param(task_of(replace(RUN, run="2")), "not started", id="msg-wrong-run"),
        pytest.param(task_of(RUN, phase=1), "plan phase: found 1", id="msg-wrong-stage"),
        pytest.param(offer_of(replace(RUN, federation="g")), "expected f", id="another-federation"),
        pytest.param(
            offer_of(replace(RUN, minimum_cohort=2)), "at least 3", id="cohort-below-minimum"
        ),
        pytest.param(
            offer_of(replace(RUN, epsilon=0.01)), "its schedule costs", id="understated-epsilon"
        ),
        pytest.param(offer_of(replace(RUN, mode="none")), "without noise", id="unnoised"),
        pytest.param(
            offer_of(replace(RUN, mode="client")), "client_level is false", id="client-mode"
        ),
        pytest.param(offer_of(replace(RUN, batches="packed")), "allow_packed", id="packed"),
        pytest.param(
            offer_of(replace(RUN, wire="bfloat16", secure=MASKED)), "float32 under masks", id="wire"
        ),
        pytest.param(
            offer_of(replace(RUN, base_digest="sha256:0")), "base_digest", id="unpinned-base"
        ),
        pytest.param(offer_of(replace(RUN, labels=("b", "a"))), "labels", id="other-labels"),
        pytest.param(offer_of(replace(RUN, unit="patient")), "unit", id="other-unit"),
        pytest.param(offer_of(RUN, projection=b"x"), "projection", id="unnamed-projection"),
        pytest.param(offer_of(RUN, to="south"), "institution: found south", id="offer-to-another"),
        pytest.param(offer_of(RUN, seconds=-3600), "not_after", id="offer-expired"),
        pytest.param(offer_of(RUN, digest="sha256:1"), "offer manifest", id="offer-of-another-run"),
    ],
)
def test_what_is_not_allowed_trains_nothing(north: Institution, data: bytes, match: str) -> None:
    north.begin(RUN)
    before = [entry.hash for entry in north.ledger.entries()]
    assert match in declined(north, data).reason
    assert [entry.hash for entry in north.ledger.entries()] == before and not north.work.trained


def test_a_clock_that_is_off_is_named_with_its_offset(north: Institution) -> None:
    reason = declined(north, offer_of(RUN, seconds=-3600)).reason
    found = re.search(r"was (\d+) s ago", reason)
    assert found and 3600 <= int(found[1]) <= 3660, reason


# msg-signature-flipped
def test_every_flipped_bit_of_a_plan_is_refused(north: Institution) -> None:
    north.begin(RUN)
    plan = RoundPlan(RUN.digest, 0, 1, 1, "sha256:a")
    signed = Signed.by(COORDINATOR, PLAN_TAG, plan.to_bytes()).to_bytes()
    for place in range(0, len(signed), 3):
        changed = signed[:place] + bytes([signed[place] ^ 1]) + signed[place + 1 :]
        declined(north, request_to_bytes(Task(RUN.digest, Signed.from_bytes(changed, "t"), b"")))
    assert not north.work.trained


@pytest.mark.parametrize("name", ["x" * 300, "\0", "../" * 20, "sha256:" + "A" * 64])
@pytest.mark.parametrize("kind", ["piece", "fetch", "stage"])
def test_what_no_run_is_called_is_refused_as_all_else(
    north: Institution, kind: str, name: str
) -> None:
    """Signed, and in the log; a refusal could not even repeat such a name."""
    plan = RoundPlan(name, 0, 1, 1, "sha256:a")
    bodies: dict[str, tuple[str, bytes]] = {
        "piece": (PARTS_TAG, Coming(name, "sha256:a", Parts(1, 1, ("0" * 64,))).to_bytes()),
        "fetch": (PLAN_TAG, plan.to_bytes()),
        "stage": (STAGE_TAG, stages.Request("input", "north", plan, b"", b"").to_bytes()),
    }
    signed = Signed.by(COORDINATOR, *bodies[kind])
    requests: dict[str, Request] = {
        "piece": Piece(signed, 0, b"x"),
        "fetch": Fetch(signed, 0),
        "stage": SignedStage(signed),
    }
    reply = declined(north, request_to_bytes(requests[kind]))
    assert 'expected "sha256:" and 64 hexadecimal digits' in reply.reason
    assert not reply.manifest and north.work.trained == []


def test_wrong_rounds_and_numbers_are_refused(north: Institution) -> None:  # msg-wrong-round
    north.begin(RUN)
    for round_, attempt in ((9, 1), (0, 1), (1, 0), (-1, 1), (1, 2**40)):
        declined(north, task_of(RUN, round_, attempt, phase=0))
    assert not north.work.trained


def test_a_fault_in_sight_of_data_is_told_to_the_log_alone(north: Institution) -> None:
    north.begin(RUN)

    def fails() -> None:
        raise BadInput(
            "notes.jsonl row 5 label: found 'diabetes', expected one of the 2 public labels"
        )

    north.work.during = fails
    reply = declined(north, task_of(RUN))
    assert "diabetes" not in reply.reason and "row" not in reply.reason
    assert "diabetes" in north.folder.refusals.read_text()
    north.work.during = lambda: None
    assert "used before" in declined(north, task_of(RUN)).reason  # the attempt is spent
    assert isinstance(north.ask(task_of(RUN, attempt=2)), Answer)


def test_an_old_offer_is_not_for_good(north: Institution) -> None:
    """What a relay kept back or misdelivered spends nothing; the next honest offer is served."""
    for data in (offer_of(RUN, seconds=-3600), offer_of(RUN, to="south")):
        reply = declined(north, data)
        assert not reply.refused and not reply.manifest
    assert north.ledger.spent("people").epsilon == 0
    assert isinstance(north.ask(offer_of(RUN, seconds=-200)), Consent), (
        "clocks may differ by minutes"
    )


def projection(seed: int) -> tuple[str, bytes]:
    generator = np.random.default_rng(seed)
    made = Projection(
        Affine(generator.normal(size=(4, 2)).astype(np.float32), np.zeros(2, np.float32))
    )
    return made.digest, save({"matrix": made.whiten.matrix, "shift": made.whiten.shift})


def test_a_forged_projection_is_refused_before_it_is_written(north: Institution) -> None:
    digest, data = projection(1)
    run = replace(RUN, projection_digest=digest, network=replace(RUN.network, projection=2))
    for forged in (projection(2)[1], data[:-1], b"\0" * 4096):
        assert "offer projection" in declined(north, offer_of(run, projection=forged)).reason
        assert not north.folder.runs.exists()
        assert [path.name for path in north.folder.offers.iterdir()] == ["today.json"]
    assert isinstance(north.ask(offer_of(run, projection=data)), Consent)


def test_what_was_not_consented_to_leaves_nothing_on_the_disk(north: Institution) -> None:
    class Fails(FakeWork):
        def check(self, manifest: RunManifest, projection: Path, budget: Budget) -> None:
            assert projection.is_file()
            raise BadInput("manifest spec_digest: found another")

    north.restart(Fails(north.ledger))
    declined(north, offer_of(RUN))
    assert [path.name for path in north.folder.offers.iterdir()] == ["today.json"]
    assert not north.folder.runs.exists()


def test_a_stricter_policy_stops_a_run_that_was_consented_to(north: Institution) -> None:
    north.begin(RUN)
    north.set_policy(POLICY.format(base=BASE, folder="b").replace("rounds = 10", "rounds = 2"))
    north.restart()
    assert "expected at most 2" in declined(north, task_of(RUN)).reason


def test_nothing_leaves_that_is_not_on_disk(
    north: Institution, monkeypatch: pytest.MonkeyPatch
) -> None:
    north.begin(RUN)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(outbox, "write_atomically", full)
    assert "No space" not in declined(north, task_of(RUN)).reason
    monkeypatch.undo()
    assert "No space" in north.folder.refusals.read_text()


def test_a_changed_release_is_not_sent(north: Institution) -> None:
    north.begin(RUN)
    north.ask(task_of(RUN))
    (path,) = north.folder.under("outbox").rglob("000001-000001.reply")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert "changed on disk" in declined(north, task_of(RUN)).reason


def test_an_attempt_that_no_phase_has_left_looks_at_no_data(north: Institution) -> None:
    """Before, the ledger said no once they were read: as often as anybody asked, for nothing."""
    one = replace(PHASE, rounds=1, attempts=1)
    run = manifest_of(one, replace(one, name="lora"))
    north.begin(run)
    assert isinstance(north.ask(task_of(run, 2, attempt=1)), Answer)
    assert north.resident._watched.taken()
    reason = declined(north, task_of(run, 2, attempt=2)).reason
    assert "all 1 attempts of phase 1 are spent" in reason
    assert north.resident._watched.taken() is None


class Unreadable(FakeWork):
    """Its data can't be read while `broken`."""

    broken: bool = False
    tries: int = 0

    def consent(self, *arguments: object) -> str:
        self._read()
        return super().consent(*arguments)  # type: ignore[arg-type]

    def train(self, *arguments: object) -> tuple[Delta, str]:
        self._read()
        return super().train(*arguments)  # type: ignore[arg-type]

    def _read(self) -> None:
        self.tries += 1
        if self.broken:
            raise BadInput("notes.jsonl row 5 label: found 'diabetes'")


def test_data_that_can_not_be_read_are_tried_so_often_a_day(north: Institution) -> None:
    """Before, for a start or an attempt they were tried whenever it was asked for again."""
    north.set_policy(north.folder.policy.read_text() + "offers = 4\n")
    north.restart(work := Unreadable(north.ledger))
    consent = north.resident.ask(offer_of(RUN))
    for asked in (start_of(RUN, {"north": consent, **OTHERS}), task_of(RUN)):
        work.broken, work.tries = True, 0
        replies = [declined(north, asked) for _ in range(5)]
        assert work.tries == 4 and not any(each.refused for each in replies)
        assert "expected at most 4 a day (UTC)" in replies[-1].reason
        (north.folder.offers / "today.json").unlink()
        work.broken = False
        assert not isinstance(north.ask(asked), Decline)


def test_a_ledger_restored_with_its_head_is_noticed_by_what_was_released(
    north: Institution,
) -> None:
    import shutil

    files = [north.root / "ledger.sqlite", north.folder.under("head/head.json")]
    steps: list[Callable[[], Reply]] = [lambda: north.begin(RUN), lambda: north.ask(task_of(RUN))]
    for step in steps:
        north.ledger.close()
        for file in files:
            shutil.copy(file, file.with_suffix(".old"))
        north.restart()
        assert not isinstance(step(), Decline)
        north.ledger.close()
        for file in files:
            shutil.copy(file, file.with_suffix(".new"))
            shutil.copy(file.with_suffix(".old"), file)
        with pytest.raises(Refused, match="older copy"):
            north.restart()
        north.ledger.close()
        for file in files:
            shutil.copy(file.with_suffix(".new"), file)
        north.restart()


def test_a_manifest_of_thousands_of_phases_keeps_nobody_busy(north: Institution) -> None:
    import time

    phases = tuple(
        replace(PHASE, noise_multiplier=0.3, sampling_rate=k / 9000) for k in range(1, 2000)
    )
    started = time.monotonic()
    assert declined(north, offer_of(replace(RUN, phases=phases))).refused
    assert time.monotonic() - started < 10


def test_ledger_on_a_full_disk_trains_nothing(north: Institution, tmp_path: Path) -> None:
    from fedlora.client.service.dialogue import PRIVATE_REASON

    with small_disk(tmp_path / "disk") as disk:
        full = Institution(disk / "node")
        full.begin(RUN)
        full.ask(task_of(RUN))
        filler = fill(disk)
        reply = full.ask(task_of(RUN, attempt=2))
        assert isinstance(reply, Decline) and reply.reason == PRIVATE_REASON
        assert len(full.work.trained) == 1
        filler.unlink()
        full.ledger.close()
        full.restart()
        assert isinstance(full.ask(task_of(RUN, attempt=3)), Answer)
        full.ledger.close()
