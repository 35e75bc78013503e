"""How like a language model's answers are to what stands there."""

from __future__ import annotations

import importlib.util
import math

import pytest

from fedlora.server.runs.samples import likeness

EXPECTED = "the ward is closed until noon on friday"


def sample(answer: str, expected: str = EXPECTED) -> dict[str, str]:
    return {"prompt": "when?", "expected": expected, "answer": answer}


def test_the_same_is_a_hundred_and_nothing_alike_is_zero() -> None:
    assert likeness([sample(EXPECTED)] * 2) == pytest.approx({"chrf": 100, "bleu": 100})
    assert likeness([sample("zzzz qqqq xxxx")])["chrf"] == 0


def test_answers_are_held_against_what_stands_there() -> None:
    """chrF counts what was found twice: who says more than asked finds all of it."""
    more, less = EXPECTED + " and then for good", "the ward is closed"
    assert likeness([sample(more)])["chrf"] > likeness([sample(EXPECTED, more)])["chrf"]
    brevity = 100 * math.exp(1 - 8 / 4)  # four of eight words, all of them right
    assert likeness([sample(less)])["bleu"] == pytest.approx(brevity)


def test_where_nothing_stands_nothing_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    assert likeness([sample("said", " ")]) == likeness([]) == {}
    assert likeness([sample("said", " "), sample(EXPECTED)])["bleu"] == pytest.approx(100)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert likeness([sample(EXPECTED)]) == {}
