"""What the house measures: `python -m tests.house_figures [--root CHECKOUT] [--walks]` prints it.

Figures are read from the sources of any checkout (`--root`), also of the house before it had rooms.
`--walks` runs one simulated round, one deployed round and one `verify` of it, and lists the files
that a reader opens to follow them; `Walk` says which these are.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import subprocess
import sys
import tempfile
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CODE = ("common", "client", "server", "simulations")
MODES = {"record", "client", "none"}
WIDTH = 100


def tracked(root: Path, *folders: str) -> list[Path]:
    """The Python files under `folders` that git tracks, in order."""
    listed = subprocess.run(
        ["git", "-C", str(root), "ls-files", *(f"{each}/*.py" for each in folders)],
        check=True,
        capture_output=True,
        text=True,
    )
    return [root / name for name in sorted(listed.stdout.split())]


def static(root: Path) -> dict[str, Any]:
    """Figures that need no run."""
    product = tracked(root, *CODE)
    texts = {path: path.read_text() for path in product}
    trees = {path: ast.parse(text) for path, text in texts.items()}
    bodies = {
        f"{path.relative_to(root)}:{node.name}": (node.end_lineno or 0) - node.body[0].lineno + 1
        for path, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
    }
    lengths = {str(path.relative_to(root)): text.count("\n") for path, text in texts.items()}
    wide = sum(
        _width(line) > WIDTH
        for path in (*product, *tracked(root, "tests"))
        for line in path.read_text().split("\n")
    )
    compared = {
        str(p.relative_to(root)): n
        for p, tree in trees.items()
        if (n := sum(map(_compares_mode, ast.walk(tree))))
    }
    return {
        "product lines": sum(lengths.values()),
        "product statements": sum(
            isinstance(node, ast.stmt) for tree in trees.values() for node in ast.walk(tree)
        ),
        "test lines": sum(path.read_text().count("\n") for path in tracked(root, "tests")),
        "longest function": max(bodies.items(), key=lambda item: item[1]),
        "longest file": max(lengths.items(), key=lambda item: item[1]),
        f"lines over {WIDTH} columns": wide,
        "public names": sum(map(_public, trees.values())),
        "without a docstring of their own": sum(map(_untold, trees.values())),
        "circles": sum(len(_circles(root, layer, trees)) for layer in CODE),
        "files that see the whole Config": (seen := sorted(_seeing_config(root, trees))),
        "rooms that see the whole Config": sorted({name.rpartition("/")[0] for name in seen}),
        "comparisons of a mode": compared,
    }


def _width(line: str) -> int:
    """Columns of a line as the linter counts them: accents take none, a trailing pragma is free."""
    prose = re.sub(r"\s*# (type: ignore|noqa).*", "", line)
    return sum(not unicodedata.combining(letter) for letter in prose)


def _public(tree: ast.Module) -> int:
    """Functions, classes and their methods that another file may use."""
    return len(list(_public_names(tree)))


def _untold(tree: ast.Module) -> int:
    """Of these, those that say nothing of themselves; some take the place of one that does."""
    return sum(not ast.get_docstring(node) for node in _public_names(tree))


def _public_names(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node
            for each in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(each, ast.FunctionDef) and not each.name.startswith("_"):
                    yield each


def _compares_mode(node: ast.AST) -> bool:
    """`x.mode == "none"`, `mode in ("record", "client")`, `phase.mode != …`, a match on one."""
    if not isinstance(node, ast.Compare):
        return False
    sides = [node.left, *node.comparators]
    named = any(
        (isinstance(s, ast.Attribute) and s.attr == "mode")
        or (isinstance(s, ast.Name) and s.id == "mode")
        for s in sides
    )
    words = {
        c.value
        for s in sides
        for c in ast.walk(s)
        if isinstance(c, ast.Constant) and isinstance(c.value, str)
    }
    return named and bool(words & MODES)


def _seeing_config(root: Path, trees: dict[Path, ast.Module]) -> Iterator[str]:
    """Files that import it; those that stand in a layer itself are its border, one room."""
    for path, tree in trees.items():
        if any(map(_sees_config, ast.walk(tree))):
            yield str(path.relative_to(root))


def _sees_config(node: ast.AST) -> bool:
    return isinstance(node, ast.ImportFrom) and any(alias.name == "Config" for alias in node.names)


def _circles(root: Path, layer: str, trees: dict[Path, ast.Module]) -> list[set[Path]]:
    """Groups of files of a layer that import each other in a circle."""
    arrows = {
        p: set(_imported(root, tree))
        for p, tree in trees.items()
        if p.relative_to(root).parts[0] == layer
    }
    reach = {path: _reachable(path, arrows) for path in arrows}
    groups = [{q for q in arrows if q in reach[p] and p in reach[q]} for p in arrows]
    return [group for place, group in enumerate(groups) if group and group not in groups[:place]]


def _reachable(start: Path, arrows: dict[Path, set[Path]]) -> set[Path]:
    seen, waiting = set[Path](), [start]
    while waiting:
        for path in arrows.get(waiting.pop(), ()):
            if path not in seen:
                seen.add(path)
                waiting.append(path)
    return seen


def _imported(root: Path, tree: ast.Module) -> Iterator[Path]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fedlora."):
            base = root.joinpath(*str(node.module).split(".")[1:])
            yield from (
                each
                for alias in node.names
                for each in (base.with_suffix(".py"), base / f"{alias.name}.py")
                if each.is_file()
            )


@dataclass
class Walk:
    """The product functions that ran, and which file's function called which other file's.

    A file is *entered* when one of its functions ran. It is *opened* when that function carries the
    walk on: it called a function of another product file, other than to make a value
    (`__init__`, `__post_init__`). A file that carries nothing on is a leaf: its call's name and
    docstring say what it does, and who follows the walk need not open it. `lines` are those of the
    functions that ran, in all files entered.
    """

    root: Path
    lines: dict[str, set[int]] = field(default_factory=dict)
    onward: dict[str, set[str]] = field(default_factory=dict)

    @property
    def opened(self) -> list[str]:
        return sorted(self.onward)

    @property
    def leaves(self) -> list[str]:
        return sorted(self.lines.keys() - self.onward.keys())

    @contextmanager
    def followed(self) -> Iterator[None]:
        """Notes every call of this thread."""
        sys.setprofile(self._note)
        try:
            yield
        finally:
            sys.setprofile(None)

    def _note(self, frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        name = _product_file(self.root, code.co_filename)
        if event != "call" or name is None or code.co_name == "<module>":
            return
        ran = [line for *_, line in code.co_lines() if line is not None]
        self.lines.setdefault(name, set()).update(range(code.co_firstlineno, max(ran) + 1))
        above = frame.f_back
        while above and _product_file(self.root, above.f_code.co_filename) is None:
            above = above.f_back
        caller = above and _product_file(self.root, above.f_code.co_filename)
        if caller and caller != name and code.co_name not in ("__init__", "__post_init__"):
            self.onward.setdefault(caller, set()).add(name)


@cache
def _product_file(root: Path, name: str) -> str | None:
    """A product file's name below `root`, links resolved; None for any other."""
    path = Path(name).resolve()
    inside = any(path.is_relative_to(root / layer) for layer in CODE)
    return str(path.relative_to(root)) if inside else None


def simulated_round(walk: Walk, scratch: Path) -> None:
    """One private round of three institutions in this process, from the loop's start to its end."""
    base, data = tiny_base(scratch), scratch / "data"
    data.mkdir()
    one = ("federation.rounds=1", "training.head_rounds=0")
    if _is_there("simulations.begin"):
        from fedlora.server.runs.run import conduct
        from fedlora.simulations.begin import begin
        from fedlora.simulations.engines.sequential import sequential
        from fedlora.simulations.options import Options
        from tests.simulations.experiments.test_simulate import config, write_data

        run = begin(
            config(base, write_data(data), "record", *one), scratch / "run", Options(device="cpu")
        )
    else:
        _write_former_data(data)
        former = import_module("fedlora.simulations.run")
        sequential, conduct = former.sequential, former.train
        config = import_module("tests.simulations.test_run").config
        settings = config(base, data, "record", *one)
        run = former.begin(settings, former.Paths.of(scratch / "run"))
    cohort = sequential(run)
    with walk.followed():
        conduct(run, cohort)


def _write_former_data(data: Path) -> None:
    for name, count in (("train", 75), ("test", 20)):
        rows = [{"text": f"w{n} {('good', 'bad')[n % 2]}", "label": n % 2} for n in range(count)]
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def deployed_round(walk: Walk, scratch: Path) -> None:
    """One attempt at a round under signatures: coordinator and four nodes, whose work is a fake."""
    now = _is_there("server.deployment.cohorts")
    place = "deployment.test_masked_runs" if now else "test_secure_deployment"
    module = import_module(f"tests.server.{place}")
    world = module.World(scratch, replace(module.RUN, secure=None))
    with walk.followed():
        assert world.total(1).replies == 4


def verified(walk: Walk, scratch: Path) -> None:
    """`verify` of a small release."""
    from tests.server.releases import exported, party

    now = _is_there("server.release.verify")
    module = import_module("fedlora.server.release" + ".verify" * now)
    of = party()
    folder = exported(scratch, of)
    with walk.followed():
        module.verify(folder, of.coordinator.public)


def _is_there(name: str) -> bool:
    """Whether the checkout that is walked has this module: walks start in the earlier house too."""
    try:
        return find_spec(f"fedlora.{name}") is not None
    except ModuleNotFoundError:
        return False


def tiny_base(scratch: Path) -> Path:
    """The tests' small random BERT."""
    import tests.conftest as fixtures

    class Folders:
        def mktemp(self, name: str) -> Path:
            (scratch / name).mkdir()
            return scratch / name

    made: Path = vars(fixtures)["tiny_bert"].__wrapped__(Folders())
    return made


WALKS: dict[str, Callable[[Walk, Path], None]] = {
    "one simulated round": simulated_round,
    "one deployed round": deployed_round,
    "verify": verified,
}


def print_walks(root: Path) -> None:
    """Follow the three walks of the checkout at `root`, with its own sources and test worlds."""
    # the links alone say what fedlora is: an editable install would mix two checkouts
    sys.meta_path[:] = [each for each in sys.meta_path if "Editable" not in str(each)]
    sys.path[:0] = [str(root / ".typing"), str(root)]
    for name in [each for each in sys.modules if each.split(".")[0] == "tests"]:
        del sys.modules[name]
    for name, start in WALKS.items():
        walk = Walk(root)
        with tempfile.TemporaryDirectory() as scratch:
            start(walk, Path(scratch))
        read = sum(map(len, walk.lines.values()))
        print(f"{name}: {len(walk.opened)} files opened of {len(walk.lines)} entered, {read} lines")
        print(*(f"  {each}" for each in walk.opened), sep="\n")
        print("  leaves:", *walk.leaves)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=ROOT, help="A checkout; this one by default.")
    parser.add_argument("--walks", action="store_true", help="Also run and follow three walks.")
    arguments = parser.parse_args()
    for name, figure in static(arguments.root).items():
        counted = f"{len(figure)}: " if isinstance(figure, dict | list) else ""
        print(f"{name:34} {counted}{figure}")
    if arguments.walks:
        print_walks(arguments.root.resolve())


if __name__ == "__main__":
    main()
