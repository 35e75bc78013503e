"""What a reply says in a table: the terms of a consent, the start that was heeded, a reason."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from fedlora.common.config.toml import Bounds, Pattern
from fedlora.common.terminal import MAX_LINE, one_line

MAX_HEIGHT = 1 << 53
HEAD = Pattern(r"|keyed:[0-9a-f]{64}", '"keyed:" and 64 hexadecimal digits')


class OneLine:
    """A text that prints on one line of bounded length, wherever it ends."""

    def fault(self, value: str, noun: str) -> str:
        """What is wrong with it, or ""."""
        fits = value == one_line(value)
        return "" if fits else f"expected one printable line of at most {MAX_LINE} characters"


@dataclass(frozen=True)
class Terms:
    """The body of a consent."""

    policy: str = field(metadata={"rule": OneLine()})
    epsilon: float = field(metadata={"rule": Bounds(0, math.inf)})
    delta: float = field(metadata={"rule": Bounds(0, math.inf)})
    height: int = field(
        default=0, kw_only=True, metadata={"unwritten": 0, "rule": Bounds(0, MAX_HEIGHT)}
    )
    head: str = field(default="", kw_only=True, metadata={"unwritten": "", "rule": HEAD})


@dataclass(frozen=True)
class Begun(Terms):
    """The body of what answers a start."""

    start: str = field(metadata={"rule": OneLine()})


@dataclass(frozen=True)
class Reason:
    """The body of a decline."""

    reason: str = field(metadata={"rule": OneLine()})
    refused: bool
