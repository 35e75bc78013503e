"""A command as it is where one role is installed: every other role's packages can't be found.

    python -m tests.as_installed EXTRAS COMMAND ...        EXTRAS: core, node,demo, ...; or @FILE,
                                                           which names the modules that are hidden

What an installation brings follows from pyproject.toml and from what the packages here require.
"""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
ALWAYS = {"fedlora", "tests", "_distutils_hack", "pkg_resources", "setuptools", "pip"}


def required(name: str, extras: frozenset[str]) -> list[str]:
    """What a package requires, by name; nothing where it is not installed."""
    if name == "fedlora":
        more = (each for extra in extras for each in PROJECT["optional-dependencies"][extra])
        return [*PROJECT["dependencies"], *more]
    try:
        return importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        return []


def brought(name: str, extras: frozenset[str], seen: set[tuple[str, frozenset[str]]]) -> None:
    """Add to `seen` all that comes with a package, itself included."""
    if (name, extras) in seen:
        return
    seen.add((name, extras))
    for line in required(name, extras):
        asked = Requirement(line)
        if asked.marker is None or any(
            asked.marker.evaluate({"extra": extra}) for extra in ("", *extras)
        ):
            brought(canonicalize_name(asked.name), frozenset(asked.extras), seen)


def hidden(extras: frozenset[str]) -> Iterator[str]:
    """Top-level modules that are here, and would not be where these extras are installed."""
    seen: set[tuple[str, frozenset[str]]] = set()
    brought("fedlora", extras, seen)
    names = {name for name, _ in seen}
    for module, packages in importlib.metadata.packages_distributions().items():
        if module not in ALWAYS and not names & {canonicalize_name(each) for each in packages}:
            yield module


def main() -> None:
    """Run the command in this process; its exit code is this one's."""
    extras = sys.argv[1]
    away = (
        set(Path(extras[1:]).read_text().split())
        if extras.startswith("@")
        else set(hidden(frozenset(extras.split(",")) - {"core"}))
    )
    find: Any = importlib.machinery.PathFinder.find_spec

    def find_spec(name: str, *more: Any) -> Any:
        return None if name.split(".")[0] in away else find(name, *more)

    importlib.machinery.PathFinder.find_spec = staticmethod(find_spec)  # type: ignore[method-assign, assignment]
    script = next(
        each
        for each in importlib.metadata.entry_points(group="console_scripts")
        if each.name == sys.argv[2]
    )
    sys.argv = sys.argv[2:]
    script.load()()


if __name__ == "__main__":
    main()
