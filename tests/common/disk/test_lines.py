"""A log keeps every line that was written whole, and says of the others that they are none."""

from __future__ import annotations

from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedlora.common.disk.files import Line, append_line, lines_of


def test_what_was_appended_is_read(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    assert list(lines_of(path)) == []
    append_line(path, {"b": "ä", "a": 1})
    append_line(path, {"c": [1.5, None]})
    assert list(lines_of(path)) == [
        Line(1, {"a": 1, "b": "ä"}, True),
        Line(2, {"c": [1.5, None]}, True),
    ]
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_line_that_a_kill_cut_short_is_lost_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    append_line(path, {"a": 1})
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"b": ')
    assert [(line.value, line.ended) for line in lines_of(path)] == [
        ({"a": 1}, True),
        (None, False),
    ]
    append_line(path, {"c": 3})
    assert [line.table for line in lines_of(path)] == [{"a": 1}, None, {"c": 3}]
    assert [line.number for line in lines_of(path)] == [1, 2, 3]


def test_what_is_no_table_is_told_apart_from_what_is_nothing(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'[1]\n\n"x"\nx\n\xff\n' + b"[" * 100_000 + b"\n{}")
    found = [(line.number, line.value, line.table, line.ended) for line in lines_of(path)]
    assert found == [
        (1, [1], None, True),
        (3, "x", None, True),
        (4, None, None, True),
        (5, None, None, True),
        (6, None, None, True),
        (7, {}, {}, False),
    ]


def test_a_log_makes_room_or_never_does(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    for number in range(3):
        append_line(path, {"number": number}, limit=20)
    older = tmp_path / "log.1.jsonl"
    assert [line.value["number"] for line in (*lines_of(older), *lines_of(path))] == [0, 1, 2]
    for number in range(3):
        append_line(tmp_path / "kept.jsonl", {"number": number}, limit=None)
    assert len([*lines_of(tmp_path / "kept.jsonl")]) == 3


@given(st.binary(max_size=60))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_lies_there_is_read(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(data)
    for line in lines_of(path):
        assert line.table is None or isinstance(line.value, dict)
