"""A SQLite file is read as it lies on the disk, and as nothing else."""

from __future__ import annotations

import gzip
import sqlite3
from pathlib import Path

import pytest

from fedlora.common.data.data_file import columns_of, origin_of
from fedlora.common.data.records import Columns, read_records
from fedlora.common.errors import BadInput

ROWS = [("tea\u2028late", "a", 3), ('say "so"', "b", 1), ("third", "a", 2)]


def database(path: Path, *more: str) -> Path:
    connection = sqlite3.connect(path)
    connection.execute(
        'CREATE TABLE "notes of 2025" (text TEXT, label TEXT, "the ""patient""" INT)'
    )
    connection.executemany('INSERT INTO "notes of 2025" VALUES (?, ?, ?)', ROWS)
    for each in more:
        connection.execute(each)
    connection.commit()
    connection.close()
    return path


def test_the_table_that_has_the_columns(tmp_path: Path) -> None:
    path = database(tmp_path / "notes.SQLite", "CREATE TABLE other (text TEXT)")
    before, files = path.read_bytes(), sorted(tmp_path.iterdir())
    found = columns_of(path, ("text", "label", 'the "patient"'), None)
    assert list(zip(*found.values(), strict=True)) == ROWS
    columns = Columns("text", label="label", unit='the "patient"')
    assert read_records(path, columns, ("a", "b")).units == ["3", "1", "2"]
    assert path.read_bytes() == before and sorted(tmp_path.iterdir()) == files
    assert origin_of(path).files[0][0] == str(path)


def test_a_view_says_which_table_is_meant(tmp_path: Path) -> None:
    twice = "CREATE TABLE more AS SELECT text, label FROM 'notes of 2025'"
    path = database(tmp_path / "two.db", twice)
    with pytest.raises(BadInput, match=r"two\.db: found 2 of the tables and views .* expected one"):
        columns_of(path, ("text", "label"), None)
    view = "CREATE VIEW chosen AS SELECT text AS note, label AS kind FROM more WHERE label = 'a'"
    seen = columns_of(database(tmp_path / "view.db", twice, view), ("note", "kind"), None)
    assert seen == {"note": ["tea\u2028late", "third"], "kind": ["a", "a"]}
    with pytest.raises(BadInput, match="found 0 of the tables and views"):
        columns_of(path, ("text", "diagnosis"), None)


def test_changes_that_are_not_in_the_file_are_not_passed_over(tmp_path: Path) -> None:
    """Its digest says nothing of them: trained on, they would be nobody's data."""
    path = database(tmp_path / "notes.sqlite")
    writing = sqlite3.connect(path)
    writing.execute("PRAGMA journal_mode = WAL")
    writing.execute("INSERT INTO 'notes of 2025' VALUES ('new', 'a', 9)")
    writing.commit()
    link = tmp_path / "link.sqlite"
    link.symlink_to(path)
    for each in (path, link):
        with pytest.raises(BadInput, match=r"found changes in notes\.sqlite-wal"):
            columns_of(each, ("text",), None)
    writing.close()  # which carries them over
    assert columns_of(path, ("text",), None)["text"][-1] == "new"


def test_what_is_no_database(tmp_path: Path) -> None:
    path = tmp_path / "notes.sqlite"
    path.write_bytes(b"text,label\nno,database\n" * 100)
    with pytest.raises(BadInput, match=r"notes\.sqlite: can't be read .*, expected SQLite"):
        columns_of(path, ("text",), None)
    wrong = tmp_path / "wrong.db"
    database(wrong, "INSERT INTO 'notes of 2025' VALUES (CAST(x'536563726574ff' AS TEXT), 'a', 4)")
    with pytest.raises(BadInput, match=r"wrong\.db: found text that is not UTF-8") as told:
        columns_of(wrong, ("text",), None)
    assert "Secret" not in str(told.value)
    packed = tmp_path / "notes.db.gz"
    packed.write_bytes(gzip.compress(database(tmp_path / "real.db").read_bytes()))
    with pytest.raises(BadInput, match="found a packed database, expected it unpacked"):
        columns_of(packed, ("text",), None)
