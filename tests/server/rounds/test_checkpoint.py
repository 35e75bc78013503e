"""Checkpoints: what is read is what was written, or nothing; the last good one always stays."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fedlora.common.errors import BadInput, FedloraError, Refused
from fedlora.common.model.state import AdapterSpec, AdapterState, TensorSpec
from fedlora.server.rounds.checkpoint import Checkpoint, Ended, Progress
from fedlora.server.strategies.strategy import ServerState
from tests.disk import fill, small_disk
from tests.server.fakes import SPEC, START, Disk, Run, full_disk, manifest_of, same

CASE = 5  # the bit between a small letter and its capital: 1e-05 and 1E-05 are one number
FILES = ("manifest.json", "attempts.json", "progress.json", "state-2.safetensors")

floats = arrays.arrays(np.float32, SPEC.size, elements=st.floats(width=32, allow_nan=False))
scores = st.none() | st.floats(-9, 9)
memories = st.builds(
    ServerState,
    st.dictionaries(st.text("abcé. ", min_size=1, max_size=8), floats, max_size=3),
    st.dictionaries(st.text(max_size=8), st.integers(0, 2**40), max_size=3),
)


@pytest.fixture(autouse=True)
def _no_real_syncs(monkeypatch: pytest.MonkeyPatch) -> None:
    Disk().install(monkeypatch)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Two of three rounds are committed, in the averaging stretch of a momentum run.

    Every file says much.
    """
    run = Run(tmp_path / "run", manifest_of(3))
    run.rules = replace(run.rules, average_last=1.0)
    run.cohort.before = lambda: interrupt() if len(run.log) == 2 else None
    with pytest.raises(KeyboardInterrupt):
        run.go()
    return run


def test_a_commit_copies_no_vector(tmp_path: Path) -> None:
    size = 1 << 20
    spec = AdapterSpec((TensorSpec("lora.a", (size,)),))
    state = AdapterState(spec, np.ones(size, dtype=np.float32))
    checkpoint = Checkpoint.create(tmp_path / "run", manifest_of(1, spec=spec), state)
    memory = ServerState({"velocity": np.ones(size, dtype=np.float32)})
    tracemalloc.start()
    try:
        checkpoint.commit(Progress(1, state, state, memory))
        assert tracemalloc.get_traced_memory()[1] < size  # a quarter of a vector
    finally:
        tracemalloc.stop()
    assert checkpoint.load().state == state


def interrupt() -> None:
    raise KeyboardInterrupt


@settings(deadline=None, max_examples=30)
@given(floats, floats, memories, st.none() | st.floats(allow_nan=False, allow_infinity=False))
def test_what_is_committed_is_loaded(
    vector: np.ndarray[tuple[int], np.dtype[np.float32]],
    released: np.ndarray[tuple[int], np.dtype[np.float32]],
    memory: ServerState,
    best: float | None,
) -> None:
    progress = Progress(
        1, AdapterState(SPEC, vector), AdapterState(SPEC, released), memory, best, 3
    )
    with tempfile.TemporaryDirectory() as name:
        checkpoint = Checkpoint.create(Path(name) / "checkpoint", manifest_of(2), START)
        same(checkpoint.load(), Progress(0, START, START))
        checkpoint.commit(progress)
        same(Checkpoint.open(checkpoint.folder, SPEC).load(), progress)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.tuples(floats, scores), max_size=3), scores)
def test_the_ends_of_phases_are_loaded_and_the_best_is_released(
    ended: list[tuple[np.ndarray[tuple[int], np.dtype[np.float32]], float | None]],
    score: float | None,
) -> None:
    states = tuple(
        Ended(AdapterState(SPEC, vector), found, place)
        for place, (vector, found) in enumerate(ended)
    )
    last = AdapterState(SPEC, np.full(SPEC.size, 77, dtype=np.float32))
    progress = Progress(1, last, last, score=score, released_round=1, ended=states)
    with tempfile.TemporaryDirectory() as name:
        checkpoint = Checkpoint.create(Path(name) / "checkpoint", manifest_of(2), START)
        checkpoint.commit(progress)
        found = Checkpoint.open(checkpoint.folder, SPEC).load()
    same(found, progress)
    assert found.score == score
    assert found.release == progress.release
    known = [each for each in (*states, Ended(last, score, 1)) if each.score is not None]
    if known:
        best = max(each.score for each in known if each.score is not None)
        assert found.release == [each for each in known if each.score == best][-1].state
    else:
        assert found.release == last


def test_a_checkpoint_of_before_phases_were_compared_is_read(run: Run) -> None:
    path = run.folder / "progress.json"
    table = json.loads(json.loads(path.read_text())["body"])
    del table["score"], table["ended"], table["released_round"], table["ended_rounds"]
    body = json.dumps(table, sort_keys=True)
    seal = hashlib.sha256(body.encode()).hexdigest()
    path.write_text(json.dumps({"body": body, "sha256": seal}))
    found = Checkpoint.open(run.folder, SPEC).load()
    assert (found.score, found.ended) == (None, ()) and found.release == found.released


@pytest.mark.parametrize(("round_", "score"), [(1, None), (2, 0.5), (3, None), (4, 0.5)])
def test_a_score_of_before_rounds_were_compared_counts_at_a_phases_end_alone(
    tmp_path: Path, round_: int, score: float | None
) -> None:
    """In between it may be of a round before: of what is released nobody looked."""
    checkpoint = Checkpoint.create(tmp_path / "checkpoint", manifest_of(2, 2), START)
    checkpoint.commit(Progress(round_, START, START, score=0.5))
    path = checkpoint.folder / "progress.json"
    table = json.loads(json.loads(path.read_text())["body"])
    del table["released_round"], table["ended_rounds"]
    body = json.dumps(table, sort_keys=True)
    seal = hashlib.sha256(body.encode()).hexdigest()
    path.write_text(json.dumps({"body": body, "sha256": seal}))
    assert Checkpoint.open(checkpoint.folder, SPEC).load().score == score


def test_a_state_without_coordinates_is_a_state() -> None:
    spec = AdapterSpec((TensorSpec("nothing", (0,)),))
    with tempfile.TemporaryDirectory() as name:
        checkpoint = Checkpoint.create(
            Path(name), manifest_of(1, spec=spec), AdapterState.zeros(spec)
        )
        assert Checkpoint.open(checkpoint.folder, spec).load().state == AdapterState.zeros(spec)


@pytest.mark.parametrize("name", FILES, ids=lambda name: f"checkpoint-bit-flip-{name}")
def test_every_flipped_bit_is_seen(run: Run, name: str) -> None:
    path = run.folder / name
    whole = path.read_bytes()
    for place in range(len(whole)):
        for bit in {place % 8, CASE}:
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
            with pytest.raises(BadInput) as error:
                Checkpoint.open(run.folder, SPEC)
            assert str(run.folder) in str(error.value) or "manifest" in str(error.value)
    path.write_bytes(whole)
    assert Checkpoint.open(run.folder, SPEC).load().round == 2


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["empty", "half", "longer", "not-text", "deep", "gone"])
def test_every_damaged_file_is_refused(run: Run, name: str, damage: str) -> None:
    path = run.folder / name
    whole = path.read_bytes()
    damaged = {
        "empty": b"",
        "half": whole[: len(whole) // 2],
        "longer": whole + b"\n",
        "not-text": b"\xff" * 40,
        "deep": b"[" * 100_000,
    }
    path.unlink()
    if damage in damaged:
        path.write_bytes(damaged[damage])
    with pytest.raises(BadInput):
        Checkpoint.open(run.folder, SPEC)


@pytest.mark.parametrize("name", ["attempts.json", "progress.json"])
def test_a_file_of_another_run_is_refused(run: Run, tmp_path: Path, name: str) -> None:
    other = Checkpoint.create(tmp_path / "other", manifest_of(4), START)
    (run.folder / name).write_bytes((other.folder / name).read_bytes())
    with pytest.raises(BadInput, match=f"{name} manifest: found 'sha256:"):
        Checkpoint.open(run.folder, SPEC)


def test_a_checkpoint_for_another_adapter_is_refused(run: Run) -> None:
    with pytest.raises(
        BadInput, match=r"manifest.json spec_digest: found sha256:\w+, expected sha256:"
    ):
        Checkpoint.open(run.folder, AdapterSpec((TensorSpec("lora.a", (7,)),)))


def test_a_folder_holds_one_run(run: Run, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="expected an empty folder or --resume"):
        Checkpoint.create(run.folder, run.manifest, START)
    with pytest.raises(BadInput, match="found no run to resume"):
        Checkpoint.open(tmp_path / "nothing", SPEC)


@pytest.mark.parametrize(
    "name",
    ["extra", ".hidden", "state-2.safetensors.bak", "progress.json.1", "state-x.safetensors"],
)
def test_an_added_file_is_refused(run: Run, name: str) -> None:
    (run.folder / name).write_text("x")
    with pytest.raises(BadInput, match=f"{name}: found what no run writes"):
        Checkpoint.open(run.folder, SPEC)


def test_a_folder_or_a_link_is_none_of_its_files(run: Run) -> None:
    other = run.folder / "state-1.safetensors"
    other.mkdir()
    with pytest.raises(BadInput, match=r"state-1\.safetensors: found what no run writes"):
        Checkpoint.open(run.folder, SPEC)
    other.rmdir()
    other.symlink_to(run.folder / "state-2.safetensors")
    with pytest.raises(BadInput, match=r"state-1\.safetensors: found what no run writes"):
        Checkpoint.open(run.folder, SPEC)


def test_what_a_kill_left_half_written_is_borne_and_goes_with_the_next_round(run: Run) -> None:
    for name in (
        ".state-3.safetensors.77",
        ".progress.json.77",
        ".attempts.json.77",
        "state-1.safetensors",
    ):
        (run.folder / name).write_text("half")
    checkpoint = Checkpoint.open(run.folder, SPEC)
    checkpoint.commit(checkpoint.load())
    assert {path.name for path in run.folder.iterdir()} == set(FILES)


def test_an_older_round_s_files_do_not_pile_up(run: Run) -> None:
    assert {path.name for path in run.folder.iterdir()} == set(FILES)


def test_attempts_are_numbered_over_the_whole_run_and_counted_by_phase(tmp_path: Path) -> None:
    manifest = manifest_of(1, 2, spare=1, mode="record")
    Checkpoint.create(tmp_path / "run", manifest, START)
    numbers = []
    for phase in (0, 1, 1, 0, 1):
        checkpoint = Checkpoint.open(tmp_path / "run", SPEC)  # a new process each time
        numbers.append(checkpoint.begin_attempt(phase))
    assert numbers == [1, 2, 3, 4, 5]
    assert [checkpoint.attempts_begun(phase) for phase in (0, 1)] == [2, 3]
    for phase, name in ((0, "head"), (1, "adapter")):
        with pytest.raises(Refused, match=f"phase {name}: all {phase + 2} attempts .* are spent"):
            checkpoint.begin_attempt(phase)
    assert [checkpoint.attempts_begun(phase) for phase in (0, 1)] == [2, 3]


def test_without_privacy_there_is_always_another_attempt(tmp_path: Path) -> None:
    checkpoint = Checkpoint.create(tmp_path / "run", manifest_of(1), START)
    assert [checkpoint.begin_attempt(0) for _ in range(5)] == [1, 2, 3, 4, 5]


def test_checkpoint_older_than_ledger(run: Run) -> None:
    checkpoint = Checkpoint.open(run.folder, SPEC)
    for used in (0, 1, 2, 3):  # the third attempt was begun, and may have been reserved
        checkpoint.check_against_ledger(used)
    with pytest.raises(Refused, match="found 3 attempts begun, but the ledger holds 4") as error:
        checkpoint.check_against_ledger(4)
    assert error.value.exit_code == 3


def test_a_restored_older_copy_is_older_than_the_ledger(run: Run, tmp_path: Path) -> None:
    old = {path: path.read_bytes() for path in run.folder.iterdir()}
    run.cohort.before = lambda: None
    run.go()
    used = max(plan.attempt for plan in run.cohort.plans)
    Checkpoint.open(run.folder, SPEC).check_against_ledger(used)
    for path in run.folder.iterdir():
        path.unlink()
    for path, data in old.items():
        path.write_bytes(data)
    restored = Checkpoint.open(run.folder, SPEC)
    assert restored.load().round == 2
    with pytest.raises(Refused, match="older than the ledger"):
        restored.check_against_ledger(used)


def test_a_checkpoint_on_a_full_disk_is_the_last_good_one(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        checkpoint = Checkpoint.create(disk / "run", manifest_of(1), START)
        first = replace(checkpoint.load(), round=1)
        checkpoint.commit(first)
        filler, later = fill(disk), replace(first, round=2, state=AdapterState.zeros(SPEC))
        # none for the state; enough for it, and none for the pointer to it; enough for both
        for pages in range(8):
            os.truncate(filler, filler.stat().st_size - 4096 * min(pages, 1))
            try:
                checkpoint.commit(later)
                break
            except FedloraError as error:
                assert "could not be written (No space left on device)" in str(error)
            kept = Checkpoint.open(disk / "run", SPEC).load()
            assert kept.round == 1 and kept.state.digest == first.state.digest
        assert pages > 1 and Checkpoint.open(disk / "run", SPEC).load().round == 2


def test_a_full_disk_keeps_the_last_good_checkpoint(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Checkpoint.open(run.folder, SPEC).load()
    later = replace(before, round=3, state=AdapterState.zeros(SPEC))
    disk = Disk(lasting=True, error=full_disk).install(monkeypatch)
    checkpoint = Checkpoint.open(run.folder, SPEC)
    # five steps for the state, five for the pointer: open, sync, replace, sync
    for fail_at in range(10):
        disk.fail_at, disk.steps = fail_at, 0
        with pytest.raises(
            FedloraError, match=r"could not be written \(No space left on device\)"
        ) as error:
            checkpoint.commit(later)
        assert error.value.exit_code == 1
        assert "\n" not in str(error.value)
        disk.restarted()
        # what fails then is the sync of a pointer that moved
        expected = later if fail_at >= 8 else before
        same(Checkpoint.open(run.folder, SPEC).load(), expected)
    checkpoint.commit(later)
    same(checkpoint.load(), later)
    assert not list(run.folder.glob(".*"))


def test_an_old_state_that_can_not_be_removed_stops_nothing(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(run.folder, SPEC)
    disk = Disk(fail_at=10, error=full_disk, lasting=True).install(monkeypatch)
    later = replace(checkpoint.load(), round=3)
    checkpoint.commit(later)
    assert (run.folder / "state-2.safetensors").exists()
    disk.restarted()
    checkpoint.commit(later)
    assert not (run.folder / "state-2.safetensors").exists()


def test_another_version_s_checkpoint_is_refused_by_name(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedlora.server.rounds.checkpoint.VERSION", 2)
    with pytest.raises(BadInput, match=r"progress.json version: found 1, expected 2"):
        Checkpoint.open(run.folder, SPEC)


def test_the_files_are_plain_text_beside_the_vectors(run: Run) -> None:
    for name in ("attempts.json", "progress.json"):
        body = json.loads(json.loads((run.folder / name).read_text())["body"])
        assert body["manifest"] == run.manifest.digest
