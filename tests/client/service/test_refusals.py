"""What was refused stays told: to the log, to the report, and never more than the disk bears."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedlora.client.report.page import page
from fedlora.client.report.report import report_body
from tests.client.institution import Institution, declined, manifest_of, offer_of, task_of

RUN = manifest_of()


@pytest.fixture
def north(tmp_path: Path) -> Institution:
    return Institution(tmp_path / "node")


def test_junk_has_a_log_of_its_own_and_a_spoilt_line_is_told(
    north: Institution, tmp_path: Path
) -> None:
    """Whoever reaches the trainer can fill a log until it makes room.

    Not the one of what the coordinator signed.
    """
    assert declined(north, offer_of(replace(RUN, minimum_cohort=1))).manifest
    kept = north.folder.refusals.read_bytes()
    assert not declined(north, b"x").manifest
    assert (
        north.folder.refusals.read_bytes() == kept and len(north.folder.strangers.read_bytes()) > 10
    )
    with north.folder.refusals.open("ab") as stream:
        stream.write(b'{"time": "2026\xff\n[1]\n{"reason": 3}\n')
    policy = north.folder.load_policy()
    found = report_body(north.folder, policy, north.identity, north.ledger)["refusals"]
    assert [line["reason"] == "unreadable" for line in found] == [False, True, True, True]


def reported(north: Institution) -> dict[str, Any]:
    return report_body(north.folder, north.folder.load_policy(), north.identity, north.ledger)


def test_the_log_tells_consents_answers_and_refusals(
    north: Institution, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "fedlora")
    north.begin(RUN)
    north.ask(task_of(RUN))
    north.ask(task_of(RUN, round_=2, attempt=1))
    consented, started, answered, refused = (record.getMessage() for record in caplog.records)
    assert consented == "consented to run 1: a start will charge ε 0.191 to budget people"
    assert started == "started run 1 with 3 institutions: ε 0.191 of budget people, 1.809 left"
    assert answered == "answered round 1, attempt 1 of run 1"
    assert refused.startswith("refused sha256:") and "rewind" in refused


def test_what_a_budget_has_left_is_told_to_the_nodes_own_log_alone(
    north: Institution, caplog: pytest.LogCaptureFixture
) -> None:
    north.set_policy(north.folder.policy.read_text().replace("epsilon = 2.0", "epsilon = 0.3117"))
    north.restart()
    north.begin(RUN)
    spent, reason = (
        north.ledger.spent("people").epsilon,
        declined(north, offer_of(replace(RUN, run="2"))).reason,
    )
    assert reason.endswith("the budget does not suffice: it would be charged ε 0.191")
    (line,) = reported(north)["refusals"]
    for own in (line["verdict"], caplog.records[-1].getMessage(), page(reported(north))):
        assert f"budget people: ε = {spent:.6g} is spent" in own and "its cap of 0.3117" in own
    assert line["reason"] == reason


def test_counts_of_refusals_that_are_none_are_told_as_unreadable(
    north: Institution, caplog: pytest.LogCaptureFixture
) -> None:
    kind = {"count": 1, "first": "t", "last": "t"}
    for found in (
        {"again": {}, "kinds": {}, "not_kept": float("inf")},
        {"again": {}, "kinds": {"x": {"count": 1, "last": "t"}}, "not_kept": 1},
        {
            "again": {"x": {"count": True, "first": "t", "last": "t"}},
            "kinds": {"x": kind},
            "not_kept": 1,
        },
    ):
        north.folder.refusals.with_suffix(".json").write_text(json.dumps(found))
        caplog.clear()
        assert (
            "unreadable" in page(reported(north))
            or not reported(north)["refusals_not_kept"]["count"]
        )
        north.restart()
        assert declined(north, offer_of(replace(RUN, minimum_cohort=1))).refused
        assert "refusals.json: found no counts" in caplog.records[0].getMessage()
    good = {"again": {}, "kinds": {"x": kind}, "not_kept": 1}
    north.folder.refusals.with_suffix(".json").write_text(json.dumps(good))
    assert reported(north)["refusals_not_kept"] == {"count": 1, "kinds": {"x": kind}}


def test_the_trainers_log_quotes_no_record(
    north: Institution, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A traceback ended with what a library had said, and that was a patient's text."""

    def train(*_: object) -> None:
        raise ValueError("could not convert 'patient 4711, influenza'")

    north.begin(RUN)
    monkeypatch.setattr(north.work, "train", train)
    north.ask(task_of(RUN))
    assert "a request failed: ValueError at test_refusals.py:" in caplog.text
    assert "4711" not in caplog.text and "Traceback" not in caplog.text


def test_refusals_push_no_refusal_out(north: Institution, monkeypatch: pytest.MonkeyPatch) -> None:
    """A coordinator's first refused attempt stays in the report, however many it adds.

    The rest is counted.
    """
    monkeypatch.setattr("fedlora.client.service.refusal_log.MOST_LINES", 20)
    monkeypatch.setattr("fedlora.client.service.refusal_log.MOST_OF_A_RUN", 5)
    north.set_policy(north.folder.policy.read_text() + "offers = 1000\n")
    first = declined(north, offer_of(replace(RUN, mode="none"))).reason
    north.begin(RUN)
    for attempt in range(8):  # one run: five reasons
        north.ask(task_of(RUN, round_=3 - attempt % 2, attempt=2**attempt, phase=1 + attempt))
    for number in range(30):
        for _ in range(2):
            north.ask(offer_of(replace(RUN, run=f"r{number}", minimum_cohort=1, labels=())))
        if number == 20:
            north.ledger.close()
            north.restart()
    body = reported(north)
    assert len(body["refusals"]) == 20 and body["refusals"][0]["reason"] == first
    assert [line["times"] for line in body["refusals"][-3:]] == [2, 2, 2]
    kinds = body["refusals_not_kept"]["kinds"]
    assert (
        kinds["manifest minimum_cohort"]["count"]
        == kinds["manifest labels"]["count"]
        == 60 - 2 * 14
    )
    assert (
        sum(line["times"] for line in body["refusals"]) + body["refusals_not_kept"]["count"]
        == 1 + 8 + 60
    )
    north.folder.refusals.with_suffix(".json").write_text('{"again": {"x": 3}}')
    assert "unreadable" in reported(north)["refusals_not_kept"]["kinds"]
