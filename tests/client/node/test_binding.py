"""A data file's mark: one ledger writes it, every other one refuses, and each fault is one line."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from fedlora.client.node import binding
from fedlora.client.node.binding import MARK, bind, check_budgets, check_mark
from fedlora.client.node.policy import DataPolicy
from fedlora.common.data.data_file import parts_of
from fedlora.common.errors import BadInput, Refused
from fedlora.common.protocol.messages import Decline
from tests.client.institution import Institution, manifest_of, offer_of

ONE, OTHER = "1" * 32, "2" * 32


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / "notes.csv"
    path.write_text("text,label\n")
    return path


def test_the_first_ledger_marks_and_the_second_refuses(data: Path) -> None:
    assert not check_mark(data, ONE, None)
    for _ in range(2):
        bind(data, ONE, None)
        assert check_mark(data, ONE, None)
    assert sorted(path.name for path in data.parent.iterdir()) == ["notes.csv", "notes.csv" + MARK]
    for call in (check_mark, bind):
        with pytest.raises(Refused, match=f"mark of ledger {ONE}, expected {OTHER}") as caught:
            call(data, OTHER, None)
        assert len(str(caught.value).splitlines()) == 1


def test_whoever_marks_at_the_same_moment_is_told(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def beaten(source: Path, mark: Path) -> None:
        monkeypatch.setattr(os, "link", link)
        bind(data, OTHER, None)
        link(source, mark)

    monkeypatch.setattr(os, "link", beaten)
    with pytest.raises(Refused, match=f"mark of ledger {OTHER}"):
        bind(data, ONE, None)


def test_a_link_in_the_folder_leads_to_the_files_own_mark(data: Path) -> None:
    again = data.with_name("again.csv")
    again.symlink_to(data.name)
    bind(again, ONE, None)
    with pytest.raises(Refused, match="notes.csv" + MARK):
        bind(data, OTHER, None)


def test_read_only_data_need_a_folder_for_marks(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = os.open

    def read_only(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_CREAT and Path(path).parent == data.parent:
            raise OSError(errno.EROFS, "Read-only file system")
        return opened(path, flags, mode)

    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(Refused, match=r"Read-only file system.*\[ledger\] marks") as caught:
        bind(data, ONE, None)
    assert len(str(caught.value).splitlines()) == 1
    marks = tmp_path / "somewhere" / "marks"
    bind(data, ONE, marks)
    with pytest.raises(Refused, match=str(marks)):
        bind(data, OTHER, marks)


def test_a_mark_beside_the_data_counts_wherever_marks_are_written(
    data: Path, tmp_path: Path
) -> None:
    bind(data, ONE, None)
    with pytest.raises(Refused, match="mark of ledger"):
        bind(data, OTHER, tmp_path / "marks")


def linked(mark: Path) -> None:
    mark.with_name("elsewhere").write_text('{"ledger":"' + ONE + '"}')
    mark.symlink_to("elsewhere")


@pytest.mark.parametrize(
    "spoil",
    [
        linked,
        lambda mark: mark.write_bytes(b""),
        lambda mark: mark.write_bytes(b"\xff" * 9),
        lambda mark: mark.write_text('{"ledger": "' + ONE + '"}'),
        lambda mark: mark.write_text('{"ledger":1}'),
        lambda mark: mark.write_text(" " * 10_000),
        lambda mark: mark.mkdir(),
    ],
)
def test_what_is_no_mark_is_refused_in_one_line(data: Path, spoil: Callable[[Path], None]) -> None:
    spoil(data.with_name(data.name + MARK))
    with pytest.raises(Refused) as caught:
        bind(data, ONE, None)
    assert len(str(caught.value).splitlines()) == 1 and MARK in str(caught.value)


def test_nothing_is_reserved_or_read_for_another_ledgers_data(tmp_path: Path) -> None:
    north = Institution(tmp_path / "n")
    bind(north.root / "notes.jsonl", OTHER, None)
    reply = north.ask(offer_of(manifest_of()))
    assert isinstance(reply, Decline) and OTHER not in reply.reason
    assert [each.body["kind"] for each in north.ledger.entries()] == ["open"]
    assert not list(north.folder.runs.glob("*"))
    with pytest.raises(Refused, match=f"mark of ledger {OTHER}"):
        north.restart()


def test_the_ledgers_key_and_head_lie_where_it_lies(tmp_path: Path) -> None:
    north, shared = Institution(tmp_path / "n"), tmp_path / "shared"
    north.ledger.close()
    before = north.folder.policy.read_text()
    north.set_policy(before + f'[ledger]\npath = "{shared}/people.sqlite"\nmarks = "marks"\n')
    north.restart()
    north.begin(manifest_of())
    found = {str(path.relative_to(shared)) for path in shared.rglob("*") if path.is_file()}
    assert {"people.sqlite", "people.key", "head/head.json"} <= found
    assert (north.root / "marks" / ("notes.jsonl" + MARK)).is_file()


@pytest.mark.parametrize("first", ["data", "data/notes.csv"])
def test_a_folder_and_a_file_in_it_are_the_same_data(data: Path, first: str) -> None:
    root = data.parent.parent
    (second,) = {"data", "data/notes.csv"} - {first}
    bind(root / first, ONE, None)
    with pytest.raises(Refused, match=f"mark of ledger {ONE}"):
        bind(root / second, OTHER, None)
    bind(root / second, ONE, None)
    assert [part.name for part in parts_of(data.parent)] == ["notes.csv"]


def test_a_folder_and_a_file_in_it_charge_one_budget(data: Path) -> None:
    sets = {
        "whole": DataPolicy(path="data", budget="a"),
        "part": DataPolicy(path="data/notes.csv", budget="b"),
    }
    with pytest.raises(BadInput, match="expected one budget for one file"):
        check_budgets(sets, data.parent.parent, "node.toml")


@pytest.mark.parametrize("first", ["data/*.csv", "data", "data/notes.csv"])
@pytest.mark.parametrize("second", ["data/*.csv", "data", "data/notes.csv"])
@pytest.mark.parametrize("aside", [False, True])
def test_data_that_overlap_have_one_mark(data: Path, first: str, second: str, aside: bool) -> None:
    root = data.parent.parent
    marks = root / "marks" if aside else None
    bind(root / first, ONE, marks)
    with pytest.raises(Refused, match=f"mark of ledger {ONE}"):
        bind(root / second, OTHER, marks)
    bind(root / second, ONE, marks)
    assert check_mark(root / first, ONE, marks)


def test_a_glob_that_was_marked_by_name_stays_marked(data: Path) -> None:
    (data.parent / f"*.csv{MARK}").write_text('{"ledger":"' + ONE + '"}')
    with pytest.raises(Refused, match=f"mark of ledger {ONE}"):
        bind(data.parent / "*.csv", OTHER, None)


def test_two_that_bind_at_once_do_not_keep_each_other_out(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (data.parent / "a.csv").write_bytes(data.read_bytes())
    made = binding._make

    def beaten(mark: Path, ledger: str, marks: Path | None) -> None:
        if "notes" in mark.name and ledger == ONE:
            made(mark, OTHER, marks)
        made(mark, ledger, marks)

    monkeypatch.setattr(binding, "_make", beaten)
    with pytest.raises(Refused, match=f"mark of ledger {OTHER}"):
        bind(data.parent / "*.csv", ONE, None)
    bind(data.parent / "*.csv", OTHER, None)
