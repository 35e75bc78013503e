"""A released adapter as files, and back.

    from fedlora.common.adapter import load_adapter
    classifier = load_adapter("runs/ag_news/adapter")

Torch is imported when `load_adapter` is asked for, and not with this room.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedlora.common.adapter.peft import load_adapter

__all__ = ["load_adapter"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fedlora.common.adapter import peft

    return getattr(peft, name)
