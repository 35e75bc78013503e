"""What each phase of a run came to: the head alone, then LoRA on top of it.

Validation chose a phase's best round, and which of them is released; the test file only tells how
far apart they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fedlora.common.manifest.manifest import Phase, RunManifest
from fedlora.server.rounds.checkpoint import Ended, Progress
from fedlora.server.rounds.evaluation import Evaluator


def phase_table(
    manifest: RunManifest, progress: Progress, test: Evaluator, lines: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """A row for each phase that was begun: rounds, its best one's scores, whether it is released.

    `lines` are those of metrics.jsonl. The released state is scored last.
    """
    found = list(_begun(manifest, progress))
    released = max(
        place for place, (_, _, end) in enumerate(found) if end.state == progress.release
    )
    ordered = sorted(range(len(found)), key=lambda place: place == released)
    scores = {place: test.evaluate(found[place][2].state) for place in ordered}
    return [
        {
            "phase": phase.name,
            "rounds": rounds,
            "best_round": end.round,
            "validation": _of_round(end.round, scores[place], lines),
            "test": scores[place],
            "released": place == released,
        }
        for place, (phase, rounds, end) in enumerate(found)
    ]


def _begun(manifest: RunManifest, progress: Progress) -> Iterator[tuple[Phase, int, Ended]]:
    """Phases that were begun, their committed rounds, and what each came to."""
    left = progress.round
    for phase, end in zip(manifest.phases, progress.phases, strict=False):
        rounds = min(left, phase.rounds)
        if rounds or phase is manifest.phases[0]:
            yield phase, rounds, end
        left -= rounds


def _of_round(
    number: int, names: Mapping[str, float], lines: Sequence[Mapping[str, Any]]
) -> dict[str, float]:
    """A round's figures on validation; none where it was not looked at."""
    scored = [line for line in lines if line["round"] == number and "loss" in line]
    return {name: scored[-1][name] for name in names} if scored else {}
