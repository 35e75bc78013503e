"""Random worlds under masks: the sum is exactly that of its members, or there is none.

Any number drops out before any stage, in clear and against each other; rings, sizes and epochs are
random. In none of them does the coordinator hold a sum of fewer than the smallest cohort, of
another set than it is told, or one that is off by a level.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from fedlora.common.errors import QuorumLost, Refused
from tests.secure_world import World, encoding_of, epoch_of, slot_of

FAST, LONG = 15, 1_500


def some(rng: random.Random, names: list[str]) -> list[str]:
    """Nobody most of the time, and anybody at times."""
    return [name for name in names if rng.random() < rng.choice((0.0, 0.0, 0.15, 0.5))]


def lived(seed: int) -> bool:
    """One world of one epoch; whether any attempt gave a sum."""
    rng = random.Random(seed)
    size, bits = rng.randrange(2, 40), rng.choice((32, 64))
    world = World(rng.randrange(3, 12), encoding=replace(encoding_of(size=size), bits=bits))
    attempts, summed = rng.randrange(1, 4), False
    try:
        listed = world.begin(
            epoch_of(count=attempts), some(rng, world.names), some(rng, world.names)
        )
    except QuorumLost:
        return False
    for number in range(1, attempts + 1):
        dealt = list(listed.deals)
        out = {stage: some(rng, dealt) for stage in ("no_input", "no_confirmation", "no_opening")}
        try:
            result = world.attempt(listed, slot_of(number, number), **out)
        except (QuorumLost, Refused):
            continue
        assert result.members == tuple(name for name in dealt if name not in out["no_input"])
        assert len(result.members) >= world.minimum and not result.liars
        assert (result.levels == world.plain_sum(result.members)).all()
        summed = True
    return summed


def test_a_sum_is_its_members_or_none() -> None:
    assert sum(lived(seed) for seed in range(FAST)) >= FAST // 4


@pytest.mark.attacks
def test_a_sum_is_its_members_or_none_in_1500_worlds() -> None:
    assert sum(lived(seed) for seed in range(LONG)) >= LONG // 5  # 372 of them
