"""What single sections of a report say."""

from __future__ import annotations

from typing import Any

import pytest

from fedlora.simulations.report.sections import phase_ends


def phases(start: dict[str, Any] | None, released: str) -> dict[str, Any]:
    found = {"validation": {"accuracy": 0.8}, "test": {"accuracy": 0.8}, "rounds": 3}
    rows = [{**found, "phase": name, "released": name == released} for name in ("head", "lora")]
    return {"phases": rows, "public_start": start, "accuracy": 0.8}


@pytest.mark.parametrize(
    ("start", "said"),
    [
        (None, "the head alone is released"),
        ({"best_epoch": 0, "below_projection": False}, "the head alone is released"),
        ({"best_epoch": 2, "below_projection": False}, "on what public records made of LoRA"),
        ({"best_epoch": 0, "below_projection": True}, "on what public records made of LoRA"),
        ({"best_epoch": 2}, "on what public records made of LoRA"),  # of earlier versions
    ],
)
def test_a_head_phase_is_released_alone_where_nothing_taught_lora(
    start: dict[str, Any] | None, said: str
) -> None:
    start = None if start is None else {**start, "validation": {"accuracy": 0.7}}
    assert said in phase_ends(phases(start, "head"))["sentence"]
    assert said not in phase_ends(phases(start, "lora"))["sentence"]


def test_a_start_that_was_not_scored_on_the_test_file_has_a_row() -> None:
    start = {"best_epoch": 2, "validation": {"accuracy": 0.7}}
    row, *_ = phase_ends(phases(start, "head"))["rows"]
    assert (row["validation"], row["test"]) == ("70.0\xa0%", "–")
