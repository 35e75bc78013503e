"""A SQLite file as data: the one table or view that has the columns, read and never written.

Only the file's own bytes count, for they are what is hashed and marked: where changes still lie
beside it, it is refused.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedlora.common.config.toml import shown
from fedlora.common.errors import BadInput

ENDINGS = (".sqlite", ".sqlite3", ".db")
_PENDING = ("-wal", "-journal")  # what SQLite keeps beside a file that is being written


def read_database(path: Path, wanted: Sequence[str], where: str) -> dict[str, list[Any]]:
    """The wanted columns of the one table or view that has them all, in the database's order.

    BadInput where none has, or several have: a view says which is meant.
    """
    if path.suffix.lower() not in ENDINGS:
        raise BadInput(f"{where}: found a packed database, expected it unpacked")
    real = path.resolve()  # beside which they lie, where it is a link
    for ending in _PENDING:
        beside = real.with_name(real.name + ending)
        if beside.is_file() and beside.stat().st_size:
            raise BadInput(
                f"{where}: found changes in {beside.name} that are not in it yet, expected a"
                " database that was closed"
            )
    try:
        connection = sqlite3.connect(f"{real.as_uri()}?mode=ro&immutable=1", uri=True)
        try:
            connection.text_factory = bytes.decode  # SQLite's own error would quote the record
            connection.execute("PRAGMA trusted_schema = OFF")  # a view calls no function of ours
            return _columns(connection, wanted, where)
        finally:
            connection.close()
    except UnicodeDecodeError as error:
        raise BadInput(f"{where}: found text that is not UTF-8, expected UTF-8") from error
    except sqlite3.Error as error:
        raise BadInput(f"{where}: can't be read ({error}), expected SQLite") from error


def _columns(
    connection: sqlite3.Connection, wanted: Sequence[str], where: str
) -> dict[str, list[Any]]:
    tables = _tables(connection)
    fitting = [name for name, columns in tables.items() if set(wanted) <= columns]
    if len(fitting) != 1:
        columns, known = shown(list(dict.fromkeys(wanted))), shown(sorted(tables))
        raise BadInput(
            f"{where}: found {len(fitting)} of the tables and views {known} with the columns"
            f" {columns}, expected one: a view says which is meant"
        )
    names = list(dict.fromkeys(wanted))
    asked = ", ".join(map(_quoted, names))
    rows = connection.execute(f"SELECT {asked} FROM {_quoted(fitting[0])}")  # noqa: S608
    values = rows.fetchall()
    return {name: [row[place] for row in values] for place, name in enumerate(names)}


def _tables(connection: sqlite3.Connection) -> dict[str, set[str]]:
    """The columns of each table and view, by name."""
    found = connection.execute(
        "SELECT name FROM sqlite_schema WHERE type IN ('table', 'view')"
        " AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\'"
    )
    names = [str(row[0]) for row in found]
    asked = "SELECT name FROM pragma_table_info(?)"
    return {name: {str(row[0]) for row in connection.execute(asked, (name,))} for name in names}


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
