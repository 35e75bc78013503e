"""What a summary warns of: figures that say less than they seem to."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from fedlora.common.model.state import AdapterSpec, AdapterState, TensorSpec
from fedlora.server.runs.summary import doubts

SPEC = AdapterSpec(
    (
        TensorSpec("q.lora_A.weight", (1, 2)),
        TensorSpec("q.lora_B.weight", (2, 1)),
        TensorSpec("head.weight", (2, 2)),
    )
)
MOVED = AdapterState(SPEC, np.ones(SPEC.size, dtype=np.float32))


def confusion(right: int, of: int = 100) -> npt.NDArray[np.float64]:
    """Two classes of as many records each, and so many right answers in each."""
    return np.array([[right, of - right], [of - right, right]], dtype=np.float64)


@pytest.mark.parametrize(("right", "warned"), [(50, True), (55, True), (60, False), (99, False)])
def test_what_is_hardly_above_the_largest_class_is_said(right: int, warned: bool) -> None:
    """Of 200 records, half in a class: 0.5 and two standard errors are 0.571."""
    found = doubts(confusion(right), MOVED)
    assert bool(found) is warned
    assert all("hardly above" in sentence for sentence in found)


def test_an_adapter_that_did_not_move_is_said() -> None:
    named = MOVED.named() | {"q.lora_B.weight": np.zeros((2, 1), dtype=np.float32)}
    still = AdapterState.from_named(SPEC, named)
    (sentence,) = doubts(confusion(99), still)
    assert sentence.startswith("LoRA changes nothing") and "no round moved" in sentence
    (sentence,) = doubts(confusion(99), still, meant=False)
    assert sentence.endswith("all rounds were the head's.")


def test_an_adapter_that_is_as_public_records_taught_it_is_said() -> None:
    """It is no zero, and no institution had a part in it."""
    head = MOVED.named() | {"head.weight": np.zeros((2, 2), dtype=np.float32)}
    (sentence,) = doubts(confusion(99), AdapterState.from_named(SPEC, head), MOVED)
    assert doubts(confusion(99), AdapterState.from_named(SPEC, head), MOVED, meant=False) == []
    assert sentence.startswith("LoRA is as public records taught it")
    lora = MOVED.named() | {"q.lora_A.weight": np.zeros((1, 2), dtype=np.float32)}
    assert doubts(confusion(99), AdapterState.from_named(SPEC, lora), MOVED) == []


def test_a_language_model_has_no_classes_to_guess() -> None:
    assert doubts(None, MOVED) == []
