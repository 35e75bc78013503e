"""metrics.jsonl has what was committed, lost.jsonl every other attempt with its reason."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedlora.server.rounds.checkpoint import Checkpoint
from fedlora.server.rounds.cohort import Failure, Lost
from fedlora.server.rounds.loop import RoundRecord
from fedlora.server.runs.metrics import ENDED, MetricsLog, lost_attempts, nobody
from tests.server.fakes import START, manifest_of


def record(round_: int, attempt: int) -> RoundRecord:
    return RoundRecord(round_, "adapter", attempt, 1.0, 3, 3, ())


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_line_has_the_updates_length_and_that_of_its_noise(tmp_path: Path) -> None:
    manifest = manifest_of(5, mode="record", noise_multiplier=2.0)
    checkpoint = Checkpoint.create(tmp_path / "checkpoint", manifest, START)
    log = MetricsLog(tmp_path, checkpoint, 0.0, nobody)
    log.write(replace(record(1, checkpoint.begin_attempt(0)), update_norm=0.25), checkpoint.load())
    (line,) = lines(tmp_path)
    phase, moved = manifest.phases[0], START.spec.size
    alone = phase.learning_rate * 2.0 * phase.clip / phase.expected_units * (moved / 3) ** 0.5
    assert line["update_norm"] == 0.25 and line["noise_norm"] == pytest.approx(alone)


def test_each_lost_attempt_has_its_reason_once(tmp_path: Path) -> None:
    checkpoint = Checkpoint.create(tmp_path / "checkpoint", manifest_of(5), START)
    log = MetricsLog(tmp_path, checkpoint, 0.0, nobody)
    progress = checkpoint.load()
    for attempt in range(1, 5):
        assert checkpoint.begin_attempt(0) == attempt
        if attempt in (2, 3):
            failures = (Failure("east", "not connected"),)
            log.lose(Lost(2, "adapter", attempt, 1.0, 3, 2, failures, f"reason {attempt}"))
        else:
            log.write(record(1 if attempt == 1 else 2, attempt), progress)
    assert [line["lost"] for line in lines(tmp_path)] == [[], [[2, "reason 2"], [3, "reason 3"]]]
    # the fourth was written but not committed, the fifth begun: the process was killed
    checkpoint.begin_attempt(0)
    MetricsLog(tmp_path, checkpoint, 0.0, nobody)
    MetricsLog(tmp_path, checkpoint, 0.0, nobody)
    expected = [(1, ENDED), (2, "reason 2"), (3, "reason 3"), (4, ENDED), (5, ENDED)]
    assert lost_attempts(tmp_path) == expected
    kept = [json.loads(line) for line in (tmp_path / "lost.jsonl").read_text().splitlines()]
    assert len(kept) == 5 and kept[0]["failures"] == [
        {"client": "east", "reason": "not connected", "refused": False}
    ]
