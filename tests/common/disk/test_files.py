"""What a machine that ran out of something says, and with which exit code."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from fedlora.common.disk.files import write_atomically
from fedlora.common.terminal import explained


def test_a_full_disk_is_no_bad_input_and_its_file_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service started again after exit 1, and never after 2, goes on once there is room."""

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "progress.json"
    path.write_text("before")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError) as found:
        write_atomically(path, b"after")
    assert explained(found.value) == (f"{path}: No space left on device", 1)
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_a_path_that_is_not_there_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(OSError) as found:
        (tmp_path / "x").read_text()
    assert explained(found.value) == (f"{tmp_path / 'x'}: No such file or directory", 2)
    assert explained(OSError("odd")) == ("odd", 2)
