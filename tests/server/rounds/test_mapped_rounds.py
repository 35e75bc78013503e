"""Rounds of an adapter that lies in files: the bits of those in memory, and almost no memory.

The rounds in memory are the slow reference, whatever the optimiser, and wherever a kill comes.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedlora.common.config.schema import FLEXLORA, ROBUST, AggregationConfig
from fedlora.common.disk import mapped
from fedlora.common.model.state import AdapterSpec, AdapterState, TensorSpec
from fedlora.common.protocol import vector_parts
from fedlora.server.rounds.checkpoint import Checkpoint
from fedlora.server.rounds.cohort import CohortSum
from fedlora.server.rounds.loop import Rules, run_rounds
from fedlora.server.strategies import fedavg
from fedlora.server.strategies.fedavg import FedAvg, ServerOptimizer
from fedlora.server.strategies.gathered import Kept, Summed, gathering
from tests.server.fakes import Disk, Killed, Run, manifest_of, same
from tests.server.rounds.test_loop import disturbed, undisturbed, until_done
from tests.server.rounds.test_turns import gone

OPTIMIZERS = ("none", "momentum", "adam", "yogi")


def in_files(patch: pytest.MonkeyPatch, stretch: int = 3) -> None:
    """From now on any adapter is too large for a message, and looked at by stretches."""
    patch.setattr(vector_parts, "PART_BYTES", 1)
    for module in (mapped, fedavg):
        patch.setattr(module, "STRETCH", stretch)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_in_files_a_run_has_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    Disk().install(monkeypatch)
    rules, found = Rules(average_last=0.5), {}
    for name in ("memory", "files"):
        run = Run(tmp_path / name, manifest_of(2, 4), rules, optimizer)
        found[name] = run.go()
        in_files(monkeypatch)
    same(found["files"], found["memory"])
    for name in ("progress.json", "state-6.safetensors"):
        assert (tmp_path / "files" / name).read_bytes() == (tmp_path / "memory" / name).read_bytes()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_in_files_a_half_stands_still_as_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    _, expected = gone(tmp_path / "memory", optimizer)
    in_files(monkeypatch)
    gone(tmp_path / "files", optimizer, stop=3)
    _, found = gone(tmp_path / "files", optimizer)
    assert expected is not None and found is not None
    same(found, expected)


def test_in_files_a_run_that_is_killed_ends_with_the_bits_of_one_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, expected, steps = undisturbed(monkeypatch)
    in_files(monkeypatch)
    disk = Disk().install(monkeypatch)
    for step in range(0, steps, 8):
        run = disturbed(tmp_path / str(step), disk)
        same(until_done(run, disk, [step], Killed), expected)


def test_what_a_kill_left_of_a_scratch_file_goes_with_the_next_commit(tmp_path: Path) -> None:
    """Where a file system can't hide it."""
    run = Run(tmp_path / "run", manifest_of(1))
    run.checkpoint()
    (run.folder / ".scratch-ab_1").write_bytes(b"?")
    run.go()
    assert not [*run.folder.glob(".scratch*")]


def test_a_server_s_round_holds_less_than_half_a_vector(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Peak resident memory, mapped pages included: adapter, sum, Adam's moments, an average."""
    in_files(monkeypatch, 1 << 14)
    size = 1 << 22
    spec = AdapterSpec((TensorSpec("lora.a", (size,)),))
    manifest = replace(manifest_of(2, spec=spec), spec_digest=spec.digest)
    checkpoint = Checkpoint.create(tmp_path / "run", manifest, AdapterState.zeros(spec))
    update = np.full(size, 0.5, dtype=np.float32)

    class Cohort:
        def total(self, plan: object, state: AdapterState) -> CohortSum:
            summed = Summed(state)
            for _ in range(2):
                summed.add(update)
            return CohortSum(summed.total(), 2, 2, (), 0.0)

    strategies, rules = [FedAvg(ServerOptimizer("adam", 0.5, 0.9, 0.99))], Rules(average_last=1.0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before = kilobytes("VmRSS:")
    progress = run_rounds(checkpoint, Cohort(), strategies, rules, lambda *_: {}, lambda *_: None)
    assert kilobytes("VmHWM:") - before < (4 * size >> 10) / 2
    assert progress.round == 2 and progress.state.vector[-1] > 0


@pytest.mark.parametrize("name", (*ROBUST, FLEXLORA))
def test_a_mean_of_updates_in_files_holds_less_than_half_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Five updates, and the mean of them, each in a file; the bits are those in memory."""
    in_files(monkeypatch, 1 << 14)
    pair = (("a.lora_A.weight", (1, 64)), ("a.lora_B.weight", (64, 1)))
    size = 1 << 21
    spec = AdapterSpec(tuple(TensorSpec(*each) for each in (*pair, ("head.weight", (size,)))))
    (tmp_path / "state").write_bytes(bytes(4 * spec.size))
    state = AdapterState(spec, np.frombuffer(mapped.mapped(tmp_path / "state"), np.float32))
    asked = AggregationConfig(strategy=name, hostile=1)
    gathered = gathering(asked)(state)
    assert isinstance(gathered, Kept)
    for seed in range(5):
        update = mapped.alike(state.vector, np.float32)
        for (part,) in mapped.by_stretches(update):
            part[:] = np.random.default_rng(seed).normal(size=part.size)
        gathered.add(update)
    Path("/proc/self/clear_refs").write_text("5")
    before = kilobytes("VmRSS:")
    total = gathered.total()
    assert kilobytes("VmHWM:") - before < (4 * size >> 10) / 2
    in_memory = gathering(asked)(AdapterState(spec, state.vector.copy()))
    for update in gathered._updates:
        in_memory.add(update.copy())
    np.testing.assert_array_equal(total, in_memory.total())


def kilobytes(name: str) -> int:
    return int(Path("/proc/self/status").read_text().split(name)[1].split()[0])
