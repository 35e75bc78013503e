"""The heights of members' ledgers: a file of the coordinator's, and what falls short of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedlora.common.errors import BadInput
from fedlora.common.trust.identity import Identity
from fedlora.server.coordinator.folder import Directory
from fedlora.server.coordinator.heights import Height, Heights
from tests.server.enrolments import request

A, B = "keyed:" + "a" * 64, "keyed:" + "b" * 64


@pytest.fixture
def heights(tmp_path: Path) -> Heights:
    return Heights(tmp_path / "heights.json")


def test_the_highest_is_kept_and_nothing_below_it_passes(heights: Heights, tmp_path: Path) -> None:
    assert heights.fault("north", Height()) == heights.fault("north", Height(3, A)) == ""
    for found in (Height(3, A), Height(7, B), Height(5, A)):
        heights.note("north", found)
    again = Heights(tmp_path / "heights.json")
    assert again.seen("north") == Height(7, B)
    assert again.fault("north", Height(7, B)) == again.fault("north", Height(8, A)) == ""
    assert "found 6, expected at least 7" in again.fault("north", Height(6, A))
    assert "found 0, expected at least 7" in again.fault("north", Height())
    assert "another entry 7" in again.fault("north", Height(7, A))
    assert again.fault("south", Height(1, A)) == ""


def test_a_member_that_comes_back_under_a_new_key_is_another(heights: Heights) -> None:
    heights.note("north", Height(7, B))
    heights.note("south", Height(4, A))
    heights.forget("north")
    heights.forget("east")
    assert heights.fault("north", Height(1, A)) == "" and heights.seen("south") == Height(4, A)


def test_a_revocation_forgets_the_ledger(tmp_path: Path) -> None:
    made = Directory.create(tmp_path / "coordinator", "f", "a.example")
    made.registry.enrol(request(Identity.generate(), "north"), "enrolment.json")
    made.coordinator().heights.note("north", Height(7, B))  # type: ignore[union-attr]
    assert Directory.open(made.root).heights.seen("north").height == 7
    assert made.revoke("north").name == "north"
    assert made.heights.seen("north") == Height()
    made.registry.enrol(request(Identity.generate(), "north"), "enrolment.json")
    assert made.heights.fault("north", Height(1, A)) == ""


@pytest.mark.parametrize("data", [b"", b"[]", b'{"north": 3}', b'{"north": {"height": "3"}}'])
def test_a_damaged_file_is_named(heights: Heights, tmp_path: Path, data: bytes) -> None:
    (tmp_path / "heights.json").write_bytes(data)
    with pytest.raises(BadInput, match=r"heights\.json"):
        heights.fault("north", Height(1, A))
