"""What the house measures: `python -m tests.house_figures [--root CHECKOUT] [--walks]` prints it.

Static figures are read from the sources of any checkout (`--root`). `--walks` runs one simulated
round, one deployed round and one `verify` of this checkout, and lists the files whose functions
ran: what a reader has to open to follow them.
"""

from __future__ import annotations

import argparse
import ast
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
        len(line) > WIDTH
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
        "circles": sum(len(_circles(root, layer, trees)) for layer in CODE),
        "files that see the whole Config": sorted(
            str(path.relative_to(root))
            for path, tree in trees.items()
            if any(map(_sees_config, ast.walk(tree)))
        ),
        "comparisons of a mode": compared,
    }


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


@contextmanager
def opened(found: set[str]) -> Iterator[None]:
    """Adds to `found` each product file in which a function is called."""
    folders = tuple(f"{ROOT / layer}/" for layer in CODE)

    def note(frame: FrameType, event: str, _: object) -> None:
        if (
            event == "call"
            and frame.f_code.co_filename.startswith(folders)
            and frame.f_code.co_name != "<module>"
        ):
            found.add(str(Path(frame.f_code.co_filename).relative_to(ROOT)))

    sys.setprofile(note)
    try:
        yield
    finally:
        sys.setprofile(None)


def simulated_round(scratch: Path) -> set[str]:
    """One private round of three institutions in this process, from the loop's start to its end."""
    from fedlora.server.runs.run import conduct
    from fedlora.simulations.begin import Options, begin
    from fedlora.simulations.engines.sequential import sequential
    from tests.simulations.experiments import test_simulate as world

    base, data, found = tiny_base(scratch), scratch / "data", set[str]()
    data.mkdir()
    for name, count in (("train", 75), ("test", 20)):
        rows = [{"text": f"w{n} {('good', 'bad')[n % 2]}", "label": n % 2} for n in range(count)]
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    one = ("federation.rounds=1", "training.head_rounds=0")
    run = begin(world.config(base, data, "record", *one), scratch / "run", Options(device="cpu"))
    cohort = sequential(run)
    with opened(found):
        conduct(run, cohort)
    return found


def deployed_round(scratch: Path) -> set[str]:
    """One attempt at a round under signatures: coordinator and four nodes, whose work is a fake."""
    from dataclasses import replace

    from tests.server.deployment.test_masked_runs import RUN, World

    world, found = World(scratch, replace(RUN, secure=None)), set[str]()
    with opened(found):
        assert world.total(1).replies == 4
    return found


def verified(scratch: Path) -> set[str]:
    """`verify` of a small release."""
    from fedlora.server.release.verify import verify
    from tests.server.releases import exported, party

    of, found = party(), set[str]()
    folder = exported(scratch, of)
    with opened(found):
        verify(folder, of.coordinator.public)
    return found


def tiny_base(scratch: Path) -> Path:
    """The tests' small random BERT."""
    import tests.conftest as fixtures

    class Folders:
        def mktemp(self, name: str) -> Path:
            (scratch / name).mkdir()
            return scratch / name

    made: Path = vars(fixtures)["tiny_bert"].__wrapped__(Folders())
    return made


WALKS: dict[str, Callable[[Path], set[str]]] = {
    "one simulated round": simulated_round,
    "one deployed round": deployed_round,
    "verify": verified,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=ROOT, help="A checkout; this one by default.")
    parser.add_argument("--walks", action="store_true", help="Also run and follow three walks.")
    arguments = parser.parse_args()
    for name, figure in static(arguments.root).items():
        counted = f"{len(figure)}: " if isinstance(figure, dict | list) else ""
        print(f"{name:34} {counted}{figure}")
    for name, walk in WALKS.items() if arguments.walks else ():
        with tempfile.TemporaryDirectory() as scratch:
            found = sorted(walk(Path(scratch)))
        print(f"{name}: {len(found)} files", *found, sep="\n  ")


if __name__ == "__main__":
    main()
