"""The node's report tells all, in words and figures that agree, and no byte of it changes unnoticed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedlora.client.report import check_report, read_key, read_report, report_body, write_report
from fedlora.client.report_page import page
from fedlora.common.errors import FedloraError
from fedlora.common.identity import Identity
from fedlora.common.privacy import charged_epsilon
from tests.client.institution import Institution, manifest_of, offer_of, task_of
from tests.client.test_shared_noise import manifest as client_manifest

RUN = manifest_of()


@pytest.fixture
def north(tmp_path: Path) -> Institution:
    return Institution(tmp_path / "n")


def body_of(north: Institution) -> dict[str, Any]:
    return report_body(north.folder, north.folder.load_policy(), north.identity, north.ledger)


def write(north: Institution, out: Path) -> dict[str, Any]:
    policy = north.folder.load_policy()
    return dict(write_report(north.folder, policy, north.identity, north.ledger, out))


def test_a_report_tells_all(north: Institution, tmp_path: Path) -> None:
    for data in (offer_of(RUN), task_of(RUN), offer_of(replace(RUN, run="2", minimum_cohort=1)), b"x"):
        north.ask(data)
    body = write(north, tmp_path / "out")
    (told,) = body["runs"]
    assert told["epsilon"] < told["epsilon_second_accountant"] < 2 * told["epsilon"]
    assert told["phases"][0]["noise_multiplier"] == 3.0
    assert [each["kind"] for each in told["sent"]] == ["consent", "update"] and told["sent"][1]["bytes"] > 0
    assert len(body["refusals"]) == len(body["strangers"]) == 1 and body["ledger"]["entries"] == 4
    assert body["budgets"][0]["epsilon_spent"] == told["epsilon"]
    assert told["accountant"] == body["accountant"] and "PRV" in told["accountant"]
    assert told["neighbours"] == "data sets that differ by adding or removing one unit"
    sealed = read_report(tmp_path / "out" / "report.json", north.identity.public)
    assert sealed.body == json.loads(json.dumps(body))


def test_a_report_without_a_run_says_how_privacy_is_made(north: Institution) -> None:
    body = body_of(north)
    assert list(body["mechanisms"]) == ["record"] and len(body["assumptions"]) >= 4
    shown = page(body)
    assert "Poisson-subsampled Gaussian" in shown and "ε 0 of 2 spent, 2 left" in shown


def test_a_run_of_shared_noise_is_told_as_what_it_is(north: Institution) -> None:
    run = client_manifest()
    folder = north.folder.run(run.digest)
    folder.mkdir(parents=True)
    from fedlora.common.identity import Signed
    from fedlora.common.protocol import MANIFEST_TAG
    from tests.client.institution import COORDINATOR

    signed = Signed.by(COORDINATOR, MANIFEST_TAG, run.to_bytes())
    (folder / "manifest.signed").write_bytes(signed.to_bytes())
    (told,) = body_of(north)["runs"]
    assert (
        "Skellam" in told["noise"] and "institution" in told["neighbours"] and told["unit"] == "institution"
    )
    assert told["epsilon_second_accountant"] is None and told["second_accountant"].startswith(
        "none: no second"
    )
    assert "Skellam" in told["accountant"]
    assert charged_epsilon(run) > 0 and "floating" not in page(body_of(north)).split("<h2>What is assumed")[0]


def test_the_page_begins_with_what_is_spent_rounded_against_the_node(north: Institution) -> None:
    north.ask(offer_of(RUN))
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


def test_a_name_in_the_page_is_text(north: Institution) -> None:
    body = body_of(north) | {"federation": "<script>alert(1)</script>"}
    assert "<script" not in page(body)


def test_no_byte_or_file_of_a_report_changes_unnoticed(north: Institution, tmp_path: Path) -> None:
    for data in (offer_of(RUN), task_of(RUN)):
        north.ask(data)
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
