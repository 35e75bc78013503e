"""Files from outside are read to a bound, and what is wrong is one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedlora.common.disk.files import read_bytes, read_text
from fedlora.common.errors import BadInput


def test_a_file_is_read_up_to_its_bound(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("äb", encoding="utf-8")
    assert read_text(path, 3) == "äb" and read_bytes(path, 3) == "äb".encode()
    path.write_bytes(b"\xef\xbb\xbfa")
    assert read_text(path) == "\ufeffa" and read_text(path, encoding="utf-8-sig") == "a"


@pytest.mark.parametrize(
    ("limit", "said"),
    [
        (2, "a.txt: found more than 2 bytes, expected at most 2 bytes"),
        (1 << 20, "a.txt: found more than 1048576 bytes, expected at most 1 MiB"),
    ],
)
def test_more_is_refused(tmp_path: Path, limit: int, said: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(bytes(limit + 1))
    with pytest.raises(BadInput, match=said):
        read_bytes(path, limit)


def test_an_endless_file_is_refused_at_once() -> None:
    with pytest.raises(BadInput, match="zero: found more than 9 bytes"):
        read_text(Path("/dev/zero"), 9)


@pytest.mark.parametrize("name", ["absent", ".", "a\0b"])
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadInput, match=r"can't be read \(.*\), expected a key$"):
        read_text(tmp_path / name, expected="a key")
    with pytest.raises(BadInput, match=r"^the key: can't be read"):
        read_text(tmp_path / name, where="the key")


def test_a_byte_that_is_no_utf_8_has_its_place(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"ab\xff")
    with pytest.raises(
        BadInput, match=r"a\.txt: found a byte that is not UTF-8 at 2, expected TOML"
    ):
        read_text(path, expected="TOML")
