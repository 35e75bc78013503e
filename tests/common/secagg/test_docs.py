"""docs/secure-aggregation.md lists exactly the fields that the code lets out.

from tests.common.secagg.test_docs import *
PAGE.write_text(with_table(PAGE.read_text()))
"""

from __future__ import annotations

from pathlib import Path

from fedlora.common.secagg.cohort import borne, most_colluders, threshold
from fedlora.common.secagg.wire import CLEAR_FIELDS

PAGE = Path(__file__).resolve().parents[3] / "docs" / "secure-aggregation.md"
BEGIN, END = "<!-- clear fields -->\n", "<!-- end -->"


def clear_fields() -> str:
    rows = [
        f"| {message} | {name} | {why} |"
        for message, fields in CLEAR_FIELDS.items()
        for name, why in fields.items()
    ]
    return "\n".join(["| message | field | what it is |", "|---|---|---|", *rows]) + "\n"


def with_table(page: str) -> str:
    before, rest = page.split(BEGIN)
    return before + BEGIN + clear_fields() + END + rest.split(END, 1)[1]


def test_the_clear_fields_are_those_of_the_code() -> None:
    page = PAGE.read_text()
    assert with_table(page) == page


def test_the_table_of_what_it_bears() -> None:
    page = PAGE.read_text()
    for members in (3, 5, 10, 20, 100):
        five = "does not start" if members < 5 else borne(members, 5)
        row = (
            f"| {members} | {threshold(members)} | {borne(members)} | {five} |"
            f" {most_colluders(members)} |"
        )
        assert row in page, row
