"""Configurations that come with the package, by name."""

from __future__ import annotations

from pathlib import Path


def packaged_config(path: Path) -> Path:
    """A file as given, or the packaged configuration of that name."""
    packaged = Path(__file__).parents[1] / "configs" / f"{path.name}.toml"
    if not path.is_file() and path.suffix == "" and packaged.is_file():
        return packaged
    return path
