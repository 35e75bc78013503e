"""docs/claims.md names a test for each promise, and each test that it names exists."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CLAIMS = ROOT / "docs" / "claims.md"
LIMITS = {
    "What can't be noticed.",
    "Assumed.",
    "Not covered.",
    "What it does not say.",
}  # and no promises


@cache
def names_in(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    return {each.name for each in ast.walk(tree) if isinstance(each, ast.FunctionDef)}


def leads() -> set[str]:
    """What each promising paragraph begins with: README's first screen, and docs/privacy.md."""
    screen = (ROOT / "README.md").read_text().split("## A run")[0]
    bullets = re.findall(r"^\* \*\*(.+?)\*\*", screen, re.MULTILINE)
    privacy = (ROOT / "docs" / "privacy.md").read_text()
    paragraphs = re.findall(r"^\*\*(.+?)\*\*", privacy, re.MULTILINE)
    modes = re.findall(r'^`mode = "[a-z]+"` [a-z ]+', privacy, re.MULTILINE)
    return {*bullets, *paragraphs, *(each.rstrip() for each in modes)} - LIMITS


def test_every_test_that_is_named_exists() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", CLAIMS.read_text())
    assert len(named) > 80
    for file, name in named:
        assert name in names_in(ROOT / file), f"docs/claims.md: {file} has no {name}"


def test_no_promise_is_left_out() -> None:
    rows = re.findall(r"^\| (.+?) \|", CLAIMS.read_text(), re.MULTILINE)
    assert len(leads()) > 20
    for lead in leads():
        assert any(lead.startswith(row) or row.startswith(lead) for row in rows), lead


def test_no_row_is_without_a_test() -> None:
    for line in CLAIMS.read_text().splitlines():
        if line.startswith("| ") and not re.match(r"\| (where|attack) \|", line):
            assert "tests/" in line, line
