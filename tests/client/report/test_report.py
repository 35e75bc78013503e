"""The node's report tells all, in words and figures that agree; no byte of it may change."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedlora.client.node.roster import approve
from fedlora.client.node.waiting_runs import CONSENTED, STARTED
from fedlora.client.report.check import check_report, read_key, read_report
from fedlora.client.report.page import page
from fedlora.client.report.report import report_body, write_report
from fedlora.common.errors import FedloraError
from fedlora.common.manifest.manifest import RunManifest
from fedlora.common.privacy.figures import shown_epsilon
from fedlora.common.privacy.modes import guarantee_of
from fedlora.common.protocol.messages import MANIFEST_TAG
from fedlora.common.trust.enrolment import EnrolmentRequest, request_to_text
from fedlora.common.trust.identity import Identity, Signed
from tests.client.institution import COORDINATOR, PHASE, Institution, manifest_of, offer_of, task_of
from tests.client.secagg.test_shared_noise import manifest as client_manifest
from tests.client.secagg.test_shared_records import manifest as record_manifest
from tests.common.trust.test_enrolment import flower_key

RUN = manifest_of()
CREATED = "2026-11-23T10:00:00+00:00"


@pytest.fixture
def north(tmp_path: Path) -> Institution:
    return Institution(tmp_path / "n")


def body_of(north: Institution) -> dict[str, Any]:
    return report_body(north.folder, north.folder.load_policy(), north.identity, north.ledger)


def write(north: Institution, out: Path) -> dict[str, Any]:
    policy = north.folder.load_policy()
    return dict(write_report(north.folder, policy, north.identity, north.ledger, out))


def test_a_report_tells_all(north: Institution, tmp_path: Path) -> None:
    north.begin(RUN)
    for data in (task_of(RUN), offer_of(replace(RUN, run="2", minimum_cohort=1)), b"x"):
        north.ask(data)
    body = write(north, tmp_path / "out")
    (told,) = body["runs"]
    assert told["epsilon"] < told["epsilon_second_accountant"] < 2 * told["epsilon"]
    assert (told["batches"], told["wire"]) == ("fixed", "float32")
    assert told["phases"][0]["noise_multiplier"] == 3.0
    assert [each["kind"] for each in told["sent"]] == ["consent", "start", "update"]
    assert all(each["bytes"] > 0 for each in told["sent"])
    assert len(body["refusals"]) == len(body["strangers"]) == 1 and body["ledger"]["entries"] == 4
    assert body["budgets"][0]["epsilon_spent"] == told["epsilon"]
    assert told["accountant"] == body["accountant"] and "PRV" in told["accountant"]
    assert told["neighbours"] == "data sets that differ by adding or removing one unit"
    sealed = read_report(tmp_path / "out" / "report.json", north.identity.public)
    assert sealed.table == json.loads(json.dumps(body))


def test_a_report_says_how_a_step_is_computed_and_what_updates_are_rounded_to(
    north: Institution,
) -> None:
    text = north.folder.policy.read_text().replace("[limits]", "[limits]\nallow_packed = true")
    north.set_policy(text)
    north.restart()
    north.begin(replace(RUN, batches="packed", wire="bfloat16"))
    body = body_of(north)
    shown = page(body | {"page_sha256": ""})
    assert "<tr><th>Batches of a step</th><td>packed</td></tr>" in shown
    assert "<tr><th>Updates rounded to</th><td>bfloat16</td></tr>" in shown
    assert "computed in packed batches" in shown and "after its noise was added" in shown


def test_a_report_says_when_with_whom_and_under_which_limits(north: Institution) -> None:
    """The limits are those of the consent, whatever the policy says now."""
    south = Identity.generate()
    request = EnrolmentRequest("others-1", "Süd Klinik", south.public, flower_key(), CREATED)
    approve(north.folder, request_to_text(south, request), "request")
    north.begin(RUN)
    north.ask(task_of(RUN))
    then = north.folder.load_policy().digest
    north.set_policy(north.folder.policy.read_text().replace("rounds = 10", "rounds = 9"))
    (told,) = body_of(north)["runs"]
    assert told["consented"]["limits"]["rounds"] == 10 and told["consented"]["policy"] == then
    assert told["cohort"] == {"north": "", "others-1": "Süd Klinik", "others-2": ""}
    dates = [told["consented"]["time"], told["started"]["time"], told["data"][-1]["time"]]
    assert dates == sorted(dates) and all(map(datetime.fromisoformat, dates))
    body = body_of(north)
    assert body["peers"]["others-1"]["organisation"] == "Süd Klinik"
    shown = page(body)
    assert "rounds = 10;" in shown and "rounds = 9" not in shown and "others-1: Süd Klinik" in shown
    assert body["organisation"] in shown and all(date in shown for date in dates)


def test_a_run_that_an_earlier_version_began_has_no_such_record(north: Institution) -> None:
    north.begin(RUN)
    (north.folder.run(RUN.digest) / CONSENTED).unlink()
    (north.folder.run(RUN.digest) / STARTED).write_bytes(b"torn")
    body = body_of(north)
    (told,) = body["runs"]
    assert told["consented"]["limits"] == told["cohort"] == {} and not told["started"]["time"]
    assert page(body).count("not recorded") >= 3


def test_a_report_without_a_run_says_how_privacy_is_made(north: Institution) -> None:
    body = body_of(north)
    assert list(body["mechanisms"]) == ["record"] and len(body["assumptions"]) >= 4
    shown = page(body)
    assert "Poisson-subsampled Gaussian" in shown and "ε 0 of 2 spent, 2 left" in shown


def test_a_run_of_shared_noise_is_told_as_what_it_is(north: Institution) -> None:
    run = client_manifest()
    told = told_of(north, run)
    assert (
        "Skellam" in told["noise"]
        and "institution" in told["neighbours"]
        and told["unit"] == "institution"
    )
    assert told["epsilon_second_accountant"] is None and told["second_accountant"].startswith(
        "none: no second"
    )
    assert "Skellam" in told["accountant"]
    assert (
        guarantee_of(run).charged_epsilon() > 0
        and "floating" not in page(body_of(north)).split("<h2>What is assumed")[0]
    )


def test_a_run_of_records_with_shared_noise_says_what_a_part_alone_is_worth(
    north: Institution,
) -> None:
    run = record_manifest()
    told = told_of(north, run)
    alone = guarantee_of(run).epsilon_alone()
    assert told["epsilon_alone"] == alone and told["unit"] == "record"
    assert alone is not None and "Zhu and Wang" in told["accountant"]
    shown = page(body_of(north))
    row = "ε by this institution&#39;s part of the noise alone</th><td>"
    assert f"{row}{shown_epsilon(alone)}<" in shown
    assert told_of(north, RUN)["epsilon_alone"] is None


def told_of(north: Institution, run: RunManifest) -> dict[str, Any]:
    """What a report says of a run whose manifest lies there."""
    folder = north.folder.run(run.digest)
    folder.mkdir(parents=True)
    signed = Signed.by(COORDINATOR, MANIFEST_TAG, run.to_bytes())
    (folder / "manifest.signed").write_bytes(signed.to_bytes())
    found: list[dict[str, Any]] = body_of(north)["runs"]
    return next(each for each in found if each["manifest"] == run.digest)


def test_the_page_begins_with_what_is_spent_rounded_against_the_node(north: Institution) -> None:
    north.begin(RUN)
    for attempt in (1, 2, 3):
        north.ask(task_of(RUN, attempt=attempt))
    body = body_of(north)
    spent = body["budgets"][0]["epsilon_spent"]
    shown = page(body)
    summary = shown.split("<h2>")[0]
    words = summary.split("Budget people: ε ")[1].split()
    assert spent <= float(words[0]) < spent + 0.001 and words[1:4] == ["of", "2", "spent,"]
    assert 2 - spent - 0.001 < float(words[4]) <= 2 - spent
    size = sum(each["bytes"] for each in body["runs"][0]["sent"] if each["kind"] == "update")
    assert f"3 × update, {size:,} bytes" in shown and "<script" not in shown
    assert "spec_digest" not in shown and "epsilon" not in shown


class Killed(BaseException):
    """What no handler of errors catches."""


def test_a_run_that_the_ledger_charged_is_told_without_its_manifest(
    north: Institution, tmp_path: Path
) -> None:
    """A kill between the ledger's entry and the manifest's file.

    And a run whose folder was lost later.
    """
    consent = north.work.consent

    def killed(*arguments: Any) -> str:
        consent(*arguments)
        raise Killed

    north.work.consent = killed  # type: ignore[method-assign, assignment]
    with pytest.raises(Killed):
        north.begin(RUN)
    north.restart()
    lost = replace(RUN, run="2")
    north.begin(lost)
    north.ask(task_of(lost))
    shutil.rmtree(north.folder.run(lost.digest))
    body = write(north, tmp_path / "out")
    assert check_report(tmp_path / "out", north.identity.public) == north.identity.public
    told = {run["manifest"]: run for run in body["runs"]}
    assert set(told) == {RUN.digest, lost.digest}
    assert sum(run["epsilon"] for run in body["runs"]) == body["budgets"][0]["epsilon_spent"] > 0
    for run in told.values():
        assert not run["manifest_kept"] and "manifest is not kept" in run["note"]
        assert (
            run["budget"] == ["people"] and run["delta"] == 1e-5 and run["attempts_consented"] == 4
        )
    assert [told[each.digest]["attempts_reserved"] for each in (RUN, lost)] == [0, 1]
    shown = page(body)
    assert (
        "2 runs were started, 2 of them without" in shown
        and "its manifest is not kept here" in shown
    )
    assert "4 consented to; 1 reserved, 1 updates made" in shown


def test_a_budget_that_the_policy_has_no_more_stays_spent(north: Institution) -> None:
    north.begin(RUN)
    north.set_policy(north.folder.policy.read_text().replace("people", "persons"))
    north.restart()
    body = body_of(north)
    new, old = body["budgets"]
    assert (new["budget"], new["in_policy"], new["epsilon_spent"]) == ("persons", True, 0)
    assert (old["budget"], old["in_policy"], old["epsilon_left"]) == ("people", False, 0)
    assert old["epsilon_spent"] == body["runs"][0]["epsilon"] and old["epsilon"] == 2
    assert "Budget people: ε 0.191 and δ 1e-05 spent. It is no longer in the policy" in page(body)


def test_updates_without_noise_are_counted_as_what_left(north: Institution) -> None:
    north.set_policy(north.folder.policy.read_text() + "allow_unnoised = true\n")
    north.restart()
    run = manifest_of(mode="none")
    north.begin(run)
    for data in (task_of(run), task_of(run, 2, 2, "sha256:b")):
        north.ask(data)
    (told,) = body_of(north)["runs"]
    assert told["updates_committed"] == 2
    assert "2 updates left; without ε, nothing is reserved" in page(body_of(north))


def test_only_a_confirmed_sum_is_counted_as_confirmed(north: Institution) -> None:
    north.begin(RUN)
    sums = [
        {"attempt": 1, "members": None},
        {"attempt": 2, "members": None},
        {"attempt": 2, "members": 4},
    ]
    path = north.folder.run(RUN.digest) / "secure.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in sums))
    shown = page(body_of(north))
    assert "Sums that may hold an update of this node</th><td>2, of them 1 confirmed" in shown


def test_both_clips_are_shown_and_no_delta_is_rounded_down(north: Institution) -> None:
    north.begin(manifest_of(PHASE, replace(PHASE, head_clip=0.25), delta=1.00049e-5))
    shown = page(body_of(north))
    assert "<th>Clip of the head</th>" in shown
    assert "<td>1</td><td>one for all</td>" in shown and "<td>1</td><td>0.25</td>" in shown
    assert "δ 1.00049e-05 of 0.0001 spent" in shown


def test_noise_beyond_what_arithmetic_holds_is_worth_no_more(north: Institution) -> None:
    """Else the second accountant's series would be as long as a coordinator likes."""
    for noise in (1e4, 1e6):
        run = manifest_of(replace(PHASE, sampling_rate=0.5, noise_multiplier=noise))
        north.begin(run)
    one, other = body_of(north)["runs"]
    assert 0 < one["epsilon"] < one["epsilon_second_accountant"] < 0.2
    assert one["epsilon_second_accountant"] == other["epsilon_second_accountant"]


def test_a_name_in_the_page_is_text(north: Institution) -> None:
    body = body_of(north) | {"federation": "<script>alert(1)</script>"}
    assert "<script" not in page(body)


def test_every_text_in_the_page_is_text(north: Institution) -> None:
    north.begin(RUN)
    for data in (task_of(RUN), offer_of(replace(RUN, minimum_cohort=1)), b"x"):
        north.ask(data)

    def marked(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: marked(each) for name, each in value.items()}
        if isinstance(value, list):
            return [marked(each) for each in value]
        return f"<img src=x>{value}" if isinstance(value, str) else value

    body = marked(body_of(north))
    body["runs"] += [
        {**body["runs"][0], "manifest_kept": False, "note": "", "attempts_consented": 1}
    ]
    shown = page(body)
    assert "<img" not in shown and shown.count("&lt;img") > 50


def test_no_byte_or_file_of_a_report_changes_unnoticed(north: Institution, tmp_path: Path) -> None:
    north.begin(RUN)
    north.ask(task_of(RUN))
    out = tmp_path / "out"
    write(north, out)
    key = read_key(north.folder.request)
    assert check_report(out, key) == key == north.identity.public
    generator = np.random.default_rng(1)
    for path in sorted(out.iterdir()):
        data = path.read_bytes()
        for place in generator.choice(len(data), 100, replace=False):
            flipped = bytes([data[place] ^ int(generator.integers(1, 256))])
            path.write_bytes(data[:place] + flipped + data[place + 1 :])
            with pytest.raises(FedloraError):
                check_report(out, key)
        path.unlink()
        with pytest.raises(FedloraError):
            check_report(out, key)
        path.write_bytes(data)
    (out / "more.html").write_text("x")
    with pytest.raises(FedloraError, match="more"):
        check_report(out, key)
    (out / "more.html").unlink()
    with pytest.raises(FedloraError, match="found the key"):
        check_report(out, Identity.generate().public)
    assert check_report(out) == key
