"""The lines that a run leaves: metrics.jsonl for rounds, lost.jsonl for attempts without one."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedlora.common.disk.files import append_line, lines_of, text_of, write_text
from fedlora.common.manifest.manifest import RunManifest
from fedlora.common.model.state import AdapterSpec
from fedlora.common.privacy.modes import guarantee_of
from fedlora.server.rounds.checkpoint import Checkpoint, Progress
from fedlora.server.rounds.cohort import Lost
from fedlora.server.rounds.counted import kept_counts
from fedlora.server.rounds.loop import RoundRecord
from fedlora.server.runs.noise import noise_of_mean
from fedlora.server.runs.summary import peak_rss_bytes

METRICS, LOST = "metrics.jsonl", "lost.jsonl"
ENDED = "the process that began it ended before it was committed, or kept no reason"
SCORES = ("accuracy", "entity_f1", "micro_f1", "spearman", "loss")
WATCHED = (*SCORES, "epsilon", "examples_per_second")
# a round's number, and what a person watches: those, and the number of all rounds
Observe = Callable[[int, Mapping[str, float | None]], None]


def nobody(number: int, figures: Mapping[str, float | None]) -> None:
    """Nobody watches."""


def epsilon_after(manifest: RunManifest, attempts: list[int]) -> float | None:
    """ε of the attempts begun so far, by phase; None where the run is not private."""
    guarantee = guarantee_of(manifest)
    return guarantee.epsilon_of(attempts) if guarantee.private else None


class MetricsLog:
    """Appends to metrics.jsonl, whose lines beyond the last commit (killed in between) go first,
    and to lost.jsonl, which gets a line for each attempt that neither of them has.
    """

    def __init__(
        self, folder: Path, checkpoint: Checkpoint, began: float, observe: Observe
    ) -> None:
        self._checkpoint = checkpoint
        self._began = began
        self._observe = observe
        self._path, self._lost = folder / METRICS, folder / LOST
        committed = checkpoint.load().round
        told = self._path.read_bytes() if self._path.exists() else b""
        lines = text_of(told, str(self._path), "a line of figures a round").splitlines()
        kept = [line for line in lines if _round_of(line) <= committed]
        write_text(self._path, "".join(line + "\n" for line in kept))
        rounds = [json.loads(line) for line in kept]
        self._earlier = max((line["elapsed_seconds"] for line in rounds), default=0.0)
        self._counted = {int(line["attempt"]) for line in rounds}
        self._counted |= {int(n) for n in (kept_counts(folder).get("attempt"),) if n is not None}
        for attempt in range(1, checkpoint.attempts_in_all + 1):
            if attempt not in self._counted and attempt not in dict(lost_attempts(folder)):
                append_line(self._lost, {"attempt": attempt, "reason": ENDED})

    def lose(self, lost: Lost) -> None:
        """Append the line of an attempt that brought no round."""
        append_line(self._lost, asdict(lost))

    def write(self, record: RoundRecord, progress: Progress) -> None:
        """Append the line of a round that was committed, and tell who watches."""
        line = self._line(record, progress.state.spec)
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
        self._counted.add(record.attempt)
        figures = {name: line.get(name) for name in WATCHED}
        self._observe(record.round, {**figures, "rounds": self._checkpoint.manifest.rounds})

    def _line(self, record: RoundRecord, spec: AdapterSpec) -> dict[str, Any]:
        checkpoint, manifest = self._checkpoint, self._checkpoint.manifest
        phase = manifest.recipe_of(record.round)
        attempts = [checkpoint.attempts_begun(index) for index in range(len(manifest.accounted))]
        # by the public normaliser: how many units were really drawn does not leave a node
        examples = record.replies * phase.steps * phase.expected_units
        return {
            "round": record.round,
            "phase": record.phase,
            "attempt": record.attempt,
            "seconds": record.seconds,
            "elapsed_seconds": self._earlier + time.monotonic() - self._began,
            "epsilon": epsilon_after(manifest, attempts),
            "asked": record.asked,
            "replies": record.replies,
            "failures": [[failure.client, failure.reason] for failure in record.failures],
            "lost": self._lost_before(record.attempt),
            **({} if record.secure is None else {"secure": asdict(record.secure)}),
            "peak_rss_bytes": peak_rss_bytes(),  # of this process, as are its seconds
            "cpu_seconds": time.process_time(),
            "examples_per_second": examples / max(record.seconds, 1e-9),
            "update_norm": record.update_norm,
            "noise_norm": noise_of_mean(manifest, phase, spec, record.replies),
            **record.metrics,
        }

    def _lost_before(self, attempt: int) -> list[tuple[int, str]]:
        """Attempts since the last round, and why each brought none."""
        first = max((each for each in self._counted if each < attempt), default=0)
        return [each for each in lost_attempts(self._lost.parent) if first < each[0] < attempt]


def lost_attempts(folder: Path) -> list[tuple[int, str]]:
    """By number: the attempts of a run that brought no round, and why."""
    tables = (line.table or {} for line in lines_of(folder / LOST))
    found = {
        int(each["attempt"]): str(each["reason"])
        for each in tables
        if isinstance(each.get("attempt"), int) and "reason" in each
    }
    return sorted(found.items())


def _round_of(line: str) -> float:
    """The round of a line of metrics.jsonl.

    Infinite where the line was cut off, or is none that was written.
    """
    try:
        table = json.loads(line)
        figures = [
            float(table[name])
            for name in ("elapsed_seconds", "seconds", "examples_per_second", "replies")
        ]
        return float(table["round"]) if all(map(math.isfinite, figures)) else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf
