"""RoLoRA under masks: a masked input has the coordinates that its round moves, and noise on all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
import pytest

from fedlora.common.manifest.manifest import RunManifest, SkellamTerms
from fedlora.common.manifest.plan import RoundPlan
from fedlora.common.manifest.turns import most_moved
from fedlora.common.model.state import AdapterSpec, AdapterState, TensorSpec, Vector
from fedlora.common.privacy.institution_level import InstitutionLevel
from fedlora.common.protocol.stages import Stage
from fedlora.common.secagg.wire import MaskedInput
from fedlora.server.rounds.cohort import Failure
from tests.client.secagg.test_shared_noise import Careless, Clipping, Federation, manifest

SPEC = AdapterSpec(
    (
        TensorSpec("q.lora_A.weight", (2, 3_000)),
        TensorSpec("q.lora_B.weight", (9_000, 2)),
        TensorSpec("head.weight", (40,)),
    )
)
MOST = most_moved(SPEC, "adapter", "rolora")  # B and the head


def by_turns(coordinates: int = MOST, mode: str = "client") -> RunManifest:
    run = manifest(SPEC)
    run = replace(run, network=replace(run.network, variant="rolora"), mode=mode)
    shared = SkellamTerms((40, coordinates), 2) if mode == "client" else None
    return replace(run, skellam=shared)


class Halving(Clipping):
    """Clips what its round moves."""

    def delta(self, plan: RoundPlan, spec: AdapterSpec) -> Vector:
        moved = spec.moved_by(self.run.recipe_of(plan.round).name)
        return np.where(moved, super().delta(plan, spec), 0).astype(np.float32)


class Halves(Federation):
    """Five institutions; `sizes` are the words of what they sent."""

    def __init__(self, run: RunManifest) -> None:
        super().__init__(5, run, SPEC)
        self.sizes: list[int] = []
        for number, name in enumerate(self.names):
            self.trainers[name] = Halving(number, run)

    def ask(
        self, stage: str, messages: Mapping[str, bytes], plan: RoundPlan, state: AdapterState
    ) -> Iterator[tuple[str, bytes | Failure]]:
        for name, answer in super().ask(stage, messages, plan, state):
            if stage == Stage.INPUT and isinstance(answer, bytes):
                self.sizes.append(len(MaskedInput.from_bytes(answer).vector) // 4)
            yield name, answer


@pytest.mark.parametrize(("number", "moves"), [(1, "head"), (3, "adapter.B"), (4, "adapter.A")])
def test_what_is_masked_is_what_moves_and_all_of_it_is_noised(number: int, moves: str) -> None:
    federation = Halves(by_turns())
    found = federation.round(number, number)
    noise, moved = federation.noise(found, number, federation.names), SPEC.moved_by(moves)
    assert found.replies == 5 and not found.total[~moved].any()
    assert federation.sizes == [int(moved.sum()) + 4] * 5  # and two sums of 8 bytes that check it
    assert (np.abs(noise[moved]) > 1).mean() > 0.99
    # as accounted for the larger half, t - c = 3 of 5 carriers
    claimed = InstitutionLevel(federation.run).releases()[number > 2].variance * 5 / 3
    few = moves == "head"
    assert np.var(noise[moved]) == pytest.approx(claimed, rel=0.7 if few else 0.06)


def test_a_second_attempt_masks_the_same_half() -> None:
    federation = Halves(by_turns())
    one, two = (federation.round(3, attempt).total for attempt in (3, 4))
    assert np.array_equal(one != 0, two != 0) and not np.array_equal(one, two)


@pytest.mark.parametrize("coordinates", [SPEC.size, MOST - 1, MOST + 1])
def test_another_number_than_the_larger_half_s_is_refused(coordinates: int) -> None:
    found = Halves(by_turns(coordinates)).round(3, 3)
    assert found.replies == 0 and any("that it moves" in each.reason for each in found.failures)


@pytest.mark.parametrize(("mode", "said"), [("client", "moves nothing"), ("none", "outside")])
def test_a_change_of_the_other_half_does_not_leave(mode: str, said: str) -> None:
    federation = Halves(by_turns(mode=mode))
    federation.trainers[federation.names[0]] = Careless(*np.full(SPEC.size, 1e-4))
    found = federation.round(3, 3)
    assert any(said in each.reason for each in found.failures)
