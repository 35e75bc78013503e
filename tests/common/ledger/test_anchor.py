"""A ledger that was put back to an older day, with everything beside it, is told by its anchor."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fedlora.common.errors import Refused
from fedlora.common.ledger.ledger import Budget, Ledger
from fedlora.common.privacy.accountant import Spend

WARD = Budget("ward", 9.0, 1e-3)


class Place:
    """A folder with ledger, head and key; the anchor lies outside of it."""

    def __init__(self, root: Path) -> None:
        self.root, self.folder, self.anchor = root, root / "node", root / "away" / "anchor.json"
        self.anchor.parent.mkdir()

    def open(self, anchored: bool = True) -> Ledger:
        path, head, key = (self.folder / each for each in ("ledger.sqlite", "head.json", "key"))
        return Ledger.open(path, head, key, self.anchor if anchored else None)

    def spend(self, *runs: str, anchored: bool = True) -> None:
        ledger = self.open(anchored)
        for run in runs:
            ledger.consent(WARD, run, Spend(1.0, 1e-6), [1])
        ledger.close()

    def backed_up(self) -> Path:
        return Path(shutil.copytree(self.folder, self.root / "backup"))

    def restore(self) -> None:
        shutil.rmtree(self.folder)
        shutil.copytree(self.root / "backup", self.folder)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_a_ledger_put_back_whole_is_refused(place: Place) -> None:
    place.spend("sha256:a")
    place.backed_up()
    place.spend("sha256:b")
    place.spend("sha256:c")
    place.restore()
    place.open(anchored=False).close()  # by itself it knows nothing of it
    with pytest.raises(Refused, match="found height 5, expected at most 3, the ledger's"):
        place.open()


def test_also_where_it_went_on_since(place: Place) -> None:
    place.spend("sha256:a")
    place.backed_up()
    place.spend("sha256:b")
    place.restore()
    place.spend(*(f"sha256:{number}" for number in range(3)), anchored=False)
    with pytest.raises(Refused, match="found another entry 4 than the ledger's"):
        place.open()


def test_an_anchor_may_be_behind(place: Place) -> None:
    """Killed before the anchor was written, or spent through a folder that names none."""
    place.spend("sha256:a")
    place.spend("sha256:b", anchored=False)
    place.spend("sha256:c")
    assert place.open().head().count == 5


def test_what_is_reserved_is_anchored_before_it_may_be_used(place: Place) -> None:
    ledger = place.open()
    before = place.anchor.read_bytes()
    ledger.consent(WARD, "sha256:a", Spend(1.0, 1e-6), [1])
    assert place.anchor.read_bytes() != before
    shutil.rmtree(place.anchor.parent)
    with pytest.raises(Refused, match="could not be read or written"):
        ledger.reserve("ward", "sha256:a", 0, 1, 1)


def test_an_anchor_that_was_there_must_be_there(place: Place) -> None:
    place.spend("sha256:a")
    elsewhere = place.root / "elsewhere.json"
    place.anchor.rename(elsewhere)
    with pytest.raises(Refused, match="is missing, expected the one that this ledger has"):
        place.open()
    place.anchor = elsewhere
    place.open().close()


@pytest.mark.parametrize("data", [b"", b"{}", b"\xff", b"[" * 50_000])
def test_what_is_no_anchor_of_this_ledger_is_refused(place: Place, data: bytes) -> None:
    place.spend("sha256:a")
    place.anchor.write_bytes(data)
    with pytest.raises(Refused, match="found none that this ledger's key signed"):
        place.open()


def test_another_ledgers_anchor_is_refused(place: Place) -> None:
    place.spend("sha256:a")
    shutil.rmtree(place.folder)
    with pytest.raises(Refused, match="found none that this ledger's key signed"):
        place.open()
