"""Which half of LoRA moves in a round, and what of an update leaves."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.common.errors import BadInput
from fedlora.common.manifest.manifest import RunManifest
from fedlora.common.manifest.turns import leaving, most_moved, placed, taken, turns
from fedlora.common.model.state import PHASES, AdapterSpec, TensorSpec
from tests.server.fakes import manifest_of

SPEC = AdapterSpec(
    (
        TensorSpec("q.lora_A.weight", (2, 3)),
        TensorSpec("q.lora_B.weight", (5, 2)),
        TensorSpec("head.weight", (4,)),
    )
)
A, B, HEAD = range(6), range(6, 16), range(16, 20)


def by_turns(*rounds: int, spare: int = 0) -> RunManifest:
    run = manifest_of(*rounds, spare=spare, spec=SPEC)
    return replace(run, network=replace(run.network, variant="rolora"))


def test_b_first_then_by_the_round_in_its_phase() -> None:
    run = by_turns(2, 3, spare=4)
    found = [run.recipe_of(number).name for number in range(1, 6)]
    assert found == ["head", "head", "adapter.B", "adapter.A", "adapter.B"]
    assert replace(run.recipe_of(4), name="adapter") == run.phases[1]
    assert RunManifest.from_bytes(run.to_bytes()) == run
    with pytest.raises(BadInput, match="round: found 6"):
        run.recipe_of(6)


@pytest.mark.parametrize("variant", ["lora", "ffa"])
def test_without_turns_a_round_moves_its_phase_and_sends_all(variant: str) -> None:
    run = manifest_of(1, 2, spec=SPEC)
    run = replace(run, network=replace(run.network, variant=variant))
    for number, name in ((1, "head"), (2, "adapter"), (3, "adapter")):
        assert run.recipe_of(number) == run.phases[run.phase_of(number)]
        assert run.recipe_of(number).name == name
        assert run.leaving(SPEC, number).all()


@pytest.mark.parametrize(
    ("moves", "expected"),
    [
        ("head", [*HEAD]),
        ("lora", [*A, *B]),
        ("adapter", [*A, *B, *HEAD]),
        ("lora.A", [*A]),
        ("lora.B", [*B]),
        ("adapter.A", [*A, *HEAD]),
        ("adapter.B", [*B, *HEAD]),
    ],
)
def test_what_moves(moves: str, expected: list[int]) -> None:
    assert np.flatnonzero(SPEC.moved_by(moves)).tolist() == expected
    assert turns(moves, "lora") == (moves,)
    assert np.array_equal(leaving(SPEC, moves, "rolora"), SPEC.moved_by(moves))


@pytest.mark.parametrize("moves", ["", "B", "lora.", "lora.C", "head.A", "adapter.A.B", "adapters"])
def test_what_no_round_moves(moves: str) -> None:
    with pytest.raises(BadInput, match="manifest phase name"):
        SPEC.moved_by(moves)


def test_the_most_that_a_round_moves_is_the_larger_half() -> None:
    found = {name: most_moved(SPEC, name, "rolora") for name in PHASES}
    assert found == {"head": 4, "lora": 10, "adapter": 14}
    assert most_moved(SPEC, "adapter", "lora") == SPEC.size
    assert most_moved(SPEC, "adapter.A", "rolora") == 10


@given(st.lists(st.booleans(), min_size=1, max_size=9), st.integers(0, 2**32))
def test_what_leaves_comes_back_where_it_belongs(kept: list[bool], seed: int) -> None:
    mask = np.array(kept)
    values = np.random.default_rng(seed).integers(1, 99, len(kept))
    assert np.array_equal(placed(taken(values * mask, mask), mask), values * mask)
    if not mask.all():
        with pytest.raises(BadInput, match="outside of what its round moves"):
            taken(values, mask)
