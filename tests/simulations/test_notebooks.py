"""The notebooks are code that Python reads, with nothing kept of anybody's run.

`make notebooks` executes them.
"""

from __future__ import annotations

import ast
import json
from importlib import import_module
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "simulations" / "examples"
BOOKS = sorted(FOLDER.glob("*.ipynb"))


def test_both_are_there_and_the_make_target_names_them() -> None:
    made = (FOLDER.parents[1] / "Makefile").read_text()
    assert len(BOOKS) == 2 and all(f" {book.stem}" in made for book in BOOKS)


@pytest.mark.parametrize("book", BOOKS, ids=lambda book: book.stem)
def test_a_notebook_is_code_without_outputs(book: Path) -> None:
    cells = json.loads(book.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code and all(not cell["outputs"] and not cell["execution_count"] for cell in code)
    for cell in code:
        for node in ast.walk(ast.parse("".join(cell["source"]))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fedlora"):
                module = import_module(str(node.module))
                assert all(hasattr(module, name.name) for name in node.names)
