"""Libraries that only some need: imported when they are asked for, or one line that says how."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from fedlora.common.errors import BadInput


def library(name: str, extra: str) -> Any:
    """The module `name`, which `pip install "fedlora[extra]"` brings; BadInput where it isn't."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise BadInput(
            f"found no package {error.name}, expected an installation with fedlora[{extra}]"
        ) from error
