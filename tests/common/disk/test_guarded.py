"""A file that decides is read only where nobody else could have put it there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fedlora.common.disk.guarded import read_guarded
from fedlora.common.errors import BadInput, Refused


def read(path: Path) -> bytes:
    return read_guarded(path, "a policy", 100)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Four folders below one that is ours."""
    path = tmp_path / "a" / "b" / "c" / "node.toml"
    path.parent.mkdir(parents=True)
    path.write_text("x")
    path.chmod(0o600)
    return path


@pytest.mark.parametrize("above", [1, 2, 3])
@pytest.mark.parametrize("mode", [0o777, 0o775, 0o757])
def test_a_folder_on_the_way_that_others_can_write_is_refused(
    file: Path, above: int, mode: int
) -> None:
    """Before: only the last was looked at, and whoever may write the one above replaces it."""
    assert read(file) == b"x"
    folder = file.parents[above - 1]
    folder.chmod(mode)
    with pytest.raises(Refused, match=f"{folder}: found a folder that .*mode {mode:04o}"):
        read(file)
    folder.chmod(0o1777)  # as /tmp
    assert read(file) == b"x"


def test_a_relative_path_is_looked_at_from_the_root(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(file.parent)
    assert read(Path("node.toml")) == read(Path("../c/node.toml")) == b"x"
    file.parents[2].chmod(0o777)
    with pytest.raises(Refused, match="others can write"):
        read(Path("node.toml"))


def test_what_a_link_on_the_way_goes_by_is_looked_at_too(file: Path, tmp_path: Path) -> None:
    """The folder that a link lies in, and all of where it leads."""
    for name in ("open", "shut"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "link").symlink_to(file.parent)
    (tmp_path / "shut" / "twice").symlink_to("../open/link")
    linked = [tmp_path / each / file.name for each in ("open/link", "shut/link", "shut/twice")]
    assert [read(each) for each in linked] == [b"x"] * 3
    (tmp_path / "open").chmod(0o777)
    assert read(linked[1]) == b"x"
    for each in (linked[0], linked[2]):
        with pytest.raises(Refused, match="others can write"):
            read(each)
    file.parents[1].chmod(0o777)
    with pytest.raises(Refused, match="others can write"):
        read(linked[1])


def test_a_folder_or_link_of_another_user_is_refused(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its owner may do with it what they like, sticky bit or not."""
    given = os.lstat
    for kind in (0o041777, 0o040755, 0o120777):
        state = given(file.parent)
        strange = os.stat_result((kind, *state[1:4], os.geteuid() + 4321, *state[5:10]))
        monkeypatch.setattr(os, "lstat", lambda _, found=strange: found)
        with pytest.raises(Refused, match=f"owner {os.geteuid() + 4321}"):
            read(file)
        monkeypatch.setattr(os, "lstat", given)


def test_the_file_itself_is_neither_a_link_nor_open_nor_a_folder(
    file: Path, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(file)
    with pytest.raises(Refused, match="found a link"):
        read(tmp_path / "link")
    with pytest.raises(BadInput, match="no plain file"):
        read(file.parent)
    file.chmod(0o620)
    with pytest.raises(Refused, match="others can write"):
        read(file)
