"""The house stays as it was designed: packages listed, layers without a cycle, flwr and torch where they belong."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CODE = ("server", "client", "common", "simulations")
MAY_IMPORT = {
    "common": {"common"},
    "client": {"client", "common"},
    "server": {"server", "common"},
    "simulations": {"simulations", "client", "server", "common"},
}
FLWR = {"common/wire.py", "server/app.py", "client/relay.py", "simulations/cluster.py"}
# What a relay and the ledger's tools load: no torch, no transformers, no Opacus at import.
LIGHT = (
    "errors",
    "state",
    "messages",
    "config",
    "toml",
    "data",
    "files",
    "locks",
    "ledger",
    "privacy",
    "skellam",
    "randomness",
    "wire",
    "secagg/cohort",
    "secagg/commit",
    "secagg/keys",
    "secagg/masks",
    "secagg/requests",
    "secagg/ring",
    "secagg/shamir",
    "secagg/wire",
    "identity",
    "protocol",
    "sealed",
    "enrolment",
    "rotation",
    "terminal",
)
HEAVY = {"torch", "transformers", "peft", "opacus", "sklearn"}


def sources(folder: str) -> Iterator[Path]:
    return (path for path in sorted((ROOT / folder).rglob("*.py")))


def imports(path: Path, top_level_only: bool = False) -> Iterator[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("layer", CODE)
def test_layers_have_no_cycle(layer: str) -> None:
    for path in sources(layer):
        for name in imports(path):
            parts = name.split(".")
            assert parts[0] not in CODE, f"{path}: import fedlora.{parts[0]}, not {parts[0]}"
            if parts[0] == "fedlora" and len(parts) > 1:
                assert parts[1] in MAY_IMPORT[layer], f"{path} imports {name}"


def test_flwr_is_imported_in_its_files_only() -> None:
    found = {
        str(path.relative_to(ROOT))
        for layer in CODE
        for path in sources(layer)
        if any(name.split(".")[0] == "flwr" for name in imports(path))
    }
    assert found <= FLWR


@pytest.mark.parametrize("name", LIGHT)
def test_the_light_core_imports_no_torch(name: str) -> None:
    seen, waiting = set(), [ROOT / "common" / f"{name}.py"]
    while waiting:
        path = waiting.pop()
        for imported in imports(path, top_level_only=True):
            assert imported.split(".")[0] not in HEAVY, f"{path.name} imports {imported}"
            inner = ROOT / "common" / (imported.removeprefix("fedlora.common.").replace(".", "/") + ".py")
            if imported.startswith("fedlora.common.") and inner.is_file() and inner not in seen:
                seen.add(inner)
                waiting.append(inner)


def test_every_package_is_listed_and_none_is_missing() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {
        "fedlora." + ".".join(path.parent.relative_to(ROOT).parts)
        for layer in CODE
        for path in sources(layer)
    }
    assert listed == found
    assert all((ROOT / Path(*name.split(".")[1:]) / "__init__.py").is_file() for name in found)


def test_type_checkers_see_the_code_through_links() -> None:
    for layer in CODE:
        link = ROOT / ".typing" / "fedlora" / layer
        assert link.is_symlink() and link.resolve() == ROOT / layer


@pytest.mark.parametrize("layer", CODE)
def test_files_and_functions_stay_short(layer: str) -> None:
    for path in sources(layer):
        text = path.read_text()
        assert len(text.splitlines()) <= 400, path
        assert not text or text.lstrip().startswith('"""'), f"{path}: begins without saying what it is"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                body = (node.end_lineno or 0) - node.body[0].lineno + 1
                assert body <= 60, f"{path}: {node.name} has {body} lines"
