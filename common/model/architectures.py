"""Architectures that transformers does not have: an installed package may offer its own.

A package names one under the entry point `fedlora.bases`, by the `model_type` of config.json; what
stands there is called without arguments, and registers the classes with transformers' own
`AutoConfig` and `AutoModel…`. A program registers them itself. Nothing in a base's folder is run:
it can only ask for a name that whoever owns the machine has installed.
"""

from __future__ import annotations

import json
from importlib.metadata import entry_points
from pathlib import Path

GROUP = "fedlora.bases"


def register_architecture(folder: Path) -> None:
    """Let transformers know the architecture of the base in `folder`, where a package offers it."""
    named = json.loads((folder / "config.json").read_bytes()).get("model_type")
    for offered in entry_points(group=GROUP, name=str(named)):
        offered.load()()
