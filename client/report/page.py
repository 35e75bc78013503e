"""The node's report as a page that a person reads: no script, nothing fetched.

The template holds every word of it, and its engine escapes every value. ε is rounded up where it is
spent, and down where it is left.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from fedlora.common.privacy.figures import exact, shown_delta, shown_epsilon, shown_left
from fedlora.common.privacy.modes import GUARANTEES

MOST_REASONS = 50  # of strangers' requests


def page(body: Mapping[str, Any]) -> str:
    """The whole page, of a report's body."""
    reasons = Counter(line["reason"] for line in body["strangers"]).most_common(MOST_REASONS)
    template = _environment().get_template("privacy_report.html")
    return template.render(body, guarantees=GUARANTEES, strangers_by_reason=reasons)


def _environment() -> Environment:
    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    made.filters |= {
        "epsilon": shown_epsilon,
        "left": lambda cap, spent: shown_left(max(exact(cap) - exact(spent), Fraction(0))),
        "delta": shown_delta,
        "grouped": "{:,}".format,
        "shown": lambda value: f"{value:.6g}" if isinstance(value, float) else value,
    }
    return made
