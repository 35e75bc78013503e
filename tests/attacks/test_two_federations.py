"""Two federations at once on one data file, whose budget has a cap of 2.0.

Before: each node folder pinned one federation and owned one ledger, and the two spent 3.809 of 2.0
in the review; `test_a_file_has_one_ledger` takes the marks away, and 3.539 are spent again. Now:
1.770, whichever of the two ways the folders are set up.
"""

from __future__ import annotations

import multiprocessing
import shutil
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest

from fedlora.client.node import binding
from fedlora.client.report.page import page
from fedlora.client.report.report import report_body
from fedlora.common.data.data_file import origin_of
from fedlora.common.errors import BadInput, Refused
from fedlora.common.ledger.ledger import Budget
from fedlora.common.ledger.subject import Subject
from fedlora.common.privacy.accountant import Spend
from fedlora.common.privacy.figures import exact
from fedlora.common.privacy.modes import guarantee_of
from fedlora.common.protocol.messages import Answer, Decline, Started
from tests.client.institution import PHASE, Institution, manifest_of, offer_of, task_of

CAP = 2.0
RUN = manifest_of(replace(PHASE, noise_multiplier=2.0))


def folder_of(root: Path, federation: str, data: Path, ledger: str = "") -> Institution:
    """A node folder of one institution, for one federation, with these data."""
    made = Institution(root / federation, federation=federation)
    made.ledger.close()
    text = made.folder.policy.read_text().replace('"notes.jsonl"', f'"{data}"')
    made.set_policy(text + (f'[ledger]\npath = "{ledger}"\n' if ledger else ""))
    made.restart()
    return made


def spend_all(*nodes: Institution) -> float:
    """ε that the nodes reserved together, offered one run after another until each has no more."""
    total, asked = Fraction(0), list(nodes)
    for number in range(12):
        for each in list(asked):
            reply = each.offered(replace(RUN, federation=each.federation, run=str(number)))
            if isinstance(reply, Started):
                total += exact(reply.epsilon)
            else:
                asked.remove(each)
    return float(total)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data" / "notes.jsonl"
    path.parent.mkdir()
    path.write_text('{"text": "t", "label": "a"}\n')
    return path


def test_a_file_has_one_ledger(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [folder_of(tmp_path, name, data) for name in ("f", "g")]
    assert nodes[0].ledger.id != nodes[1].ledger.id
    assert 1.5 < spend_all(*nodes) <= CAP
    assert [each.body["kind"] for each in nodes[1].ledger.entries()] == ["open"]
    with pytest.raises(Refused, match=r"notes.jsonl.fedlora-ledger: found the mark of ledger"):
        nodes[1].restart()
    # without the marks, each ledger pays for the file alone
    monkeypatch.setattr(binding, "_owner", lambda mark: "")
    assert spend_all(*(folder_of(tmp_path / "before", name, data) for name in ("f", "g"))) > 3.5


def by_another_name(data: Path, way: str) -> Path:
    """Another path of a policy that means the same file."""
    if way == "glob":
        return data.with_name("notes.json[l]")
    if way == "all":
        return data.with_name("*.jsonl")
    folder = data.parent.parent / "again"
    folder.mkdir()
    (folder / "part.jsonl").symlink_to(data)
    return folder


@pytest.mark.parametrize("turned", [False, True], ids=["file-first", "file-last"])
@pytest.mark.parametrize("way", ["glob", "all", "folder-of-links"])
def test_a_file_has_one_ledger_however_it_is_named(
    tmp_path: Path, data: Path, way: str, turned: bool
) -> None:
    names = [data, by_another_name(data, way)]
    if turned:
        names.reverse()
    nodes = [folder_of(tmp_path, name, path) for name, path in zip("fg", names, strict=True)]
    assert 1.5 < spend_all(*nodes) <= CAP  # before: 3.539
    assert [each.body["kind"] for each in nodes[1].ledger.entries()] == ["open"]


@pytest.mark.parametrize("way", ["glob", "all", "folder-of-links"])
def test_a_file_has_one_budget_however_it_is_named(tmp_path: Path, data: Path, way: str) -> None:
    north, other = folder_of(tmp_path, "f", data), by_another_name(data, way)
    before = north.folder.policy.read_text()
    north.set_policy(before + MORE.format(path=other))
    with pytest.raises(BadInput, match=r"\[data.more\] path: found the file of \[data.notes\]"):
        north.folder.load_policy()
    north.set_policy(before)
    # nor has it where two node folders, with a policy each, share a ledger
    spend, first, second = Spend(1.0, 1e-5), Budget("a", 2.0, 1e-4), Budget("b", 2.0, 1e-4)
    north.ledger.consent(first, "sha256:1", spend, [1], Subject.of(RUN, origin_of(data)))
    with pytest.raises(Refused, match="data that charged budget a before"):
        north.ledger.consent(second, "sha256:2", spend, [1], Subject.of(RUN, origin_of(other)))
    north.restart()  # and an opened one knows
    with pytest.raises(Refused, match="data that charged budget a before"):
        north.ledger.consent(second, "sha256:2", spend, [1], Subject.of(RUN, origin_of(other)))


def test_two_federations_share_a_ledger(tmp_path: Path, data: Path) -> None:
    shared = str(tmp_path / "shared" / "ledger.sqlite")
    nodes = [folder_of(tmp_path, name, data, shared) for name in ("f", "g")]
    assert nodes[0].ledger.id == nodes[1].ledger.id
    for each in nodes:
        first = replace(RUN, federation=each.federation)
        each.begin(first)
        assert isinstance(each.ask(task_of(first)), Answer)
    assert spend_all(*nodes) > 0 and nodes[0].ledger.spent("people").epsilon <= CAP
    north = nodes[0]
    body = report_body(north.folder, north.folder.load_policy(), north.identity, north.ledger)
    assert [each["federation"] for each in body["federations"]] == ["f", "g"]
    told = sum(exact(each["epsilon"]) for each in body["federations"])
    assert float(told) == pytest.approx(north.ledger.spent("people").epsilon, rel=1e-12)
    assert "<td>g</td><td>people</td>" in page(body)


def test_two_processes_that_consent_at_once_keep_one_cap(tmp_path: Path, data: Path) -> None:
    shared = str(tmp_path / "shared" / "ledger.sqlite")
    guarantee_of(RUN).charge()  # its seconds once, before the processes part
    processes = multiprocessing.get_context("fork")
    together, told = processes.Barrier(3), processes.Queue()

    def consent(federation: str) -> None:
        node = folder_of(tmp_path, federation, data, shared)
        together.wait(60)
        told.put(spend_all(node))

    workers = [processes.Process(target=consent, args=(name,)) for name in ("f", "g")]
    for worker in workers:
        worker.start()
    together.wait(60)
    spent = [told.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join()
    held = folder_of(tmp_path, "h", data, shared).ledger.spent("people").epsilon
    assert 1.5 < sum(spent) == pytest.approx(held, rel=1e-9) and held <= CAP


# --- one file, two budgets; one budget, two units -------------------------------------------------

MORE = """
[budgets.others]
epsilon = 2.0
delta = 1e-4
[data.more]
path = "{path}"
budget = "others"
labels = ["a", "c"]
"""


@pytest.mark.parametrize("way", ["spelling", "symbolic", "hard", "folder"])
def test_one_file_by_two_names_does_not_charge_two_budgets(
    tmp_path: Path, data: Path, way: str
) -> None:
    north = folder_of(tmp_path, "f", data)
    other = data.with_name("more.jsonl")
    if way == "symbolic":
        other.symlink_to(data)
    elif way == "hard":
        other.hardlink_to(data)
    elif way == "folder":
        (tmp_path / "again").symlink_to(data.parent)
        other = tmp_path / "again" / data.name
    else:
        other = Path(f"{data.parent}/../{data.parent.name}/{data.name}")
    before = north.folder.policy.read_text()
    north.set_policy(before + MORE.format(path=other))
    with pytest.raises(BadInput, match=r"\[data.more\] path: found the file of \[data.notes\]"):
        north.folder.load_policy()
    copy = shutil.copy(data, tmp_path / "copy.jsonl")
    north.set_policy(before + MORE.format(path=copy))
    north.folder.load_policy()  # a copy shows when it is charged, by its digest


def test_a_budget_counts_the_unit_of_its_first_consent(tmp_path: Path, data: Path) -> None:
    north = folder_of(tmp_path, "f", data)
    north.begin(RUN)
    spent = north.ledger.spent("people")
    text = north.folder.policy.read_text().replace("[bases]", 'unit = "patient"\n[bases]')
    north.set_policy(text)
    assert isinstance(north.ask(offer_of(replace(RUN, unit="patient"))), Decline)
    assert north.ledger.spent("people") == spent
    refusal = north.folder.refusals.read_text()
    assert "found the unit 'patient', expected 'record'" in refusal
