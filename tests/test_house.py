"""The house stays as it was designed.

Layers, rooms and files without a circle, and flwr and torch where they belong. A layer is a
top-level folder, a room a folder in it. The order of rooms below is the order in which they may
import: a room sees itself, the rooms before it, and the layers below. docs/design.md draws it.
"""

from __future__ import annotations

import ast
import tomllib
from collections import Counter
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from fedlora.common.privacy.modes import GUARANTEES

ROOT = Path(__file__).resolve().parents[1]
CODE = ("server", "client", "common", "simulations")
MAY_IMPORT = {
    "common": {"common"},
    "client": {"client", "common"},
    "server": {"server", "common"},
    "simulations": {"simulations", "client", "server", "common"},
}
# Rooms in the order in which they may import; a file that stands in a layer itself is a room of
# one.
ROOMS = {
    "common": (
        *("errors", "libraries", "disk", "terminal", "codec", "trust", "secagg", "config", "data"),
        *("tasks", "model", "manifest", "protocol", "privacy", "ledger", "adapter"),
    ),
    "client": ("network", "training", "node", "consent", "secagg", "service", "report", "cli"),
    "server": (
        *(
            "strategies",
            "rounds",
            "secagg",
            "runs",
            "defaults",
            "coordinator",
            "release",
            "deployment",
            "watch",
            "cli",
        ),
    ),
    "simulations": (
        *(
            "federation",
            "report",
            "chosen",
            "options",
            "begin",
            "engines",
            "experiments",
            "examples",
            "serving",
            "cli_finished",
            "cli",
            "local",
        ),
        "benchmarks",
    ),
}
FLWR = {
    "common/protocol/flower.py",
    "server/deployment/flower.py",
    "client/network/relay.py",
    "simulations/engines/ray.py",
}
# The same thing on two sides may have one name; other files of different rooms may not.
TWO_SIDES = {
    "cli.py",  # one for each person who uses it
    "cohort.py",  # whom a node counts, and whom the coordinator asks
    "enrolment.py",  # what is signed, and the node that signs it
    "flower.py",  # the records, and the grid that carries them
    "folder.py",  # an institution's, and the coordinator's
}
# What a relay and the ledger's tools load: no torch, no transformers, no Opacus at import.
LIGHT_ROOMS = (
    *("disk", "codec", "trust", "secagg", "config", "manifest", "protocol", "privacy", "ledger"),
)
LIGHT_FILES = ("errors", "terminal", "model/state", "data/records")
# The one file that compares a mode's name: a configuration's rules stand below its guarantees.
COMPARES_MODES = {"common/config/load.py"}
# Where a run's configuration comes in: read, completed, spent. All others get parts of it. A
# layer's own files, which are its border, have the layer's name.
SEE_CONFIG = {
    *("common/config", "server/defaults", "server/deployment", "simulations"),
    *("simulations/experiments", "simulations/examples"),
}
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


def file_of(name: str) -> Path | None:
    """The file that an imported name of ours comes from; None for what is not ours."""
    parts = name.split(".")
    if parts[0] != "fedlora" or len(parts) < 2:
        return None
    path = ROOT.joinpath(*parts[1:]).with_suffix(".py")
    return path if path.is_file() else None


def room_of(path: Path) -> tuple[str, str]:
    layer, room, *_ = path.relative_to(ROOT).with_suffix("").parts
    return layer, room


@cache
def arrows(layer: str) -> dict[Path, set[Path]]:
    """Which files of a layer each of its files imports, wherever in the file."""
    found = {
        path: {file_of(name) for name in imports(path)} - {None, path} for path in sources(layer)
    }
    return {
        path: {each for each in used if each and room_of(each)[0] == layer}
        for path, used in found.items()
    }


@pytest.mark.parametrize("layer", CODE)
def test_layers_have_no_cycle(layer: str) -> None:
    for path in sources(layer):
        for name in imports(path):
            parts = name.split(".")
            assert parts[0] not in CODE, f"{path}: import fedlora.{parts[0]}, not {parts[0]}"
            if parts[0] == "fedlora" and len(parts) > 1:
                assert parts[1] in MAY_IMPORT[layer], f"{path} imports {name}"


@pytest.mark.parametrize("layer", CODE)
def test_rooms_import_in_their_order(layer: str) -> None:
    order = {room: place for place, room in enumerate(ROOMS[layer])}
    for path, used in arrows(layer).items():
        if path.name == "__init__.py" and path.parent.name == layer:
            continue  # the layer's own face may show any room
        for each in used:
            mine, theirs = room_of(path)[1], room_of(each)[1]
            assert order[theirs] <= order[mine], (
                f"{path}: {mine} imports {each}, of a room above it"
            )


@pytest.mark.parametrize("layer", CODE)
def test_files_of_a_layer_import_in_no_circle(layer: str) -> None:
    try:
        TopologicalSorter(arrows(layer)).prepare()
    except CycleError as error:
        pytest.fail(f"a circle: {' -> '.join(str(path) for path in error.args[1])}")


def test_every_room_says_in_one_sentence_what_it_is_for() -> None:
    for layer in CODE:
        rooms = {path.parent for path in sources(layer)} - {ROOT / layer}
        assert {room.name for room in rooms} | {p.stem for p in (ROOT / layer).glob("*.py")} - {
            "__init__"
        } == set(ROOMS[layer])
        for room in rooms:
            reason = ast.get_docstring(ast.parse((room / "__init__.py").read_text())) or ""
            assert reason.split("\n")[0].rstrip().endswith("."), (
                f"{room}: no reason in its __init__.py"
            )
            assert len(list(room.glob("*.py"))) > 2, f"{room}: a room of one file is a file"


def test_no_private_name_is_imported_across_rooms() -> None:
    for layer in CODE:
        for path in sources(layer):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fedlora."):
                    private = [alias.name for alias in node.names if alias.name.startswith("_")]
                    assert not private, f"{path} imports {private} of {node.module}"


def test_no_two_rooms_have_files_of_one_name() -> None:
    named = Counter(
        path.name for layer in CODE for path in sources(layer) if path.name != "__init__.py"
    )
    assert {name for name, count in named.items() if count > 1} <= TWO_SIDES


def test_what_a_mode_promises_is_decided_by_its_guarantee() -> None:
    """No `mode == "client"`, `.mode in ("record", "none")` or match on one: its class is asked."""
    found = {
        str(path.relative_to(ROOT))
        for layer in CODE
        for path in sources(layer)
        if any(map(compares_a_mode, ast.walk(ast.parse(path.read_text()))))
    }
    assert found == COMPARES_MODES


def compares_a_mode(node: ast.AST) -> bool:
    """Whether something called `mode` is held against the name of one."""
    if isinstance(node, ast.Compare):
        sides: list[ast.AST] = [node.left, *node.comparators]
    elif isinstance(node, ast.Match):
        sides = [node.subject, *node.cases]
    else:
        return False
    inner = [each for side in sides for each in ast.walk(side) if isinstance(each, ast.Constant)]
    named = any(getattr(each, "attr", getattr(each, "id", "")) == "mode" for each in sides)
    return named and any(each.value in GUARANTEES for each in inner)


def test_the_configuration_is_spent_at_the_border() -> None:
    found = {
        str(path.parent.relative_to(ROOT))
        for layer in CODE
        for path in sources(layer)
        if any(name.endswith(".Config") for name in imports(path))
    }
    assert found == SEE_CONFIG


def test_the_design_draws_these_rooms() -> None:
    drawn = (ROOT / "docs" / "design.md").read_text()
    for layer in CODE:
        rooms = [room for room in ROOMS[layer] if (ROOT / layer / room).is_dir()]
        assert f"{layer:12} {' · '.join(rooms)}\n" in drawn


def test_flwr_is_imported_in_its_files_only() -> None:
    found = {
        str(path.relative_to(ROOT))
        for layer in CODE
        for path in sources(layer)
        if any(name.split(".")[0] == "flwr" for name in imports(path))
    }
    assert found <= FLWR


def light_files() -> list[str]:
    rooms = [path for room in LIGHT_ROOMS for path in sources(f"common/{room}")]
    named = [ROOT / "common" / f"{name}.py" for name in LIGHT_FILES]
    return [str(path.relative_to(ROOT)) for path in (*rooms, *named)]


@pytest.mark.parametrize("name", light_files())
def test_the_light_core_imports_no_torch(name: str) -> None:
    seen, waiting = set(), [ROOT / name]
    while waiting:
        path = waiting.pop()
        for imported in imports(path, top_level_only=True):
            assert imported.split(".")[0] not in HEAVY, f"{path.name} imports {imported}"
            inner = file_of(imported)
            if inner is not None and inner not in seen:
                seen.add(inner)
                waiting.append(inner)


def test_every_package_is_listed_and_none_is_missing() -> None:
    listed = set(
        tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    )
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
        assert len(text.splitlines()) <= 350, path
        assert not text or text.lstrip().startswith('"""'), (
            f"{path}: begins without saying what it is"
        )
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                body = (node.end_lineno or 0) - node.body[0].lineno + 1
                assert body <= 40, f"{path}: {node.name} has {body} lines"


@pytest.mark.parametrize("layer", CODE)
def test_whatever_is_public_says_what_it_gives(layer: str) -> None:
    """A docstring of its own, or that of the method that it takes the place of."""
    for path in sources(layer):
        body = ast.parse(path.read_text()).body
        public = [n for n in body if isinstance(n, ast.FunctionDef | ast.ClassDef) and is_public(n)]
        for node in public:
            assert ast.get_docstring(node), f"{path}: {node.name} has no docstring"
        for owner in (node for node in public if isinstance(node, ast.ClassDef)):
            for each in owner.body:
                if isinstance(each, ast.FunctionDef) and is_public(each):
                    told = is_told(owner, each.name)
                    assert told, f"{path}: {owner.name}.{each.name} has no docstring"


def is_public(node: ast.FunctionDef | ast.ClassDef) -> bool:
    return not node.name.startswith("_")


def is_told(owner: ast.ClassDef, method: str) -> bool:
    """Whether a class, or one that it extends, says what its method gives."""
    own = [each for each in owner.body if isinstance(each, ast.FunctionDef) and each.name == method]
    if any(map(ast.get_docstring, own)):
        return True
    bases = {getattr(each, "value", each) for each in owner.bases}
    named = {getattr(each, "attr", getattr(each, "id", "")) for each in bases}
    return any(is_told(each, method) for name in named for each in classes().get(name, ()))


@cache
def classes() -> dict[str, list[ast.ClassDef]]:
    """Every class of ours, by name."""
    found: dict[str, list[ast.ClassDef]] = {}
    for layer in CODE:
        for path in sources(layer):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ClassDef):
                    found.setdefault(node.name, []).append(node)
    return found
