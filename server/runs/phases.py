"""What each phase of a run came to: the head alone, then LoRA on top of it.

Validation chose which end is released; the test file only tells how far apart they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fedlora.common.manifest.manifest import Phase, RunManifest
from fedlora.common.model.state import AdapterState
from fedlora.server.rounds.checkpoint import Progress
from fedlora.server.rounds.evaluation import Evaluator


def phase_table(
    manifest: RunManifest, progress: Progress, test: Evaluator, lines: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """A row for each phase that was begun: rounds, scores at its end, whether that is released.

    `lines` are those of metrics.jsonl. The released state is scored last.
    """
    ends = list(_ends(manifest, progress))
    released = max(place for place, (_, _, state) in enumerate(ends) if state == progress.release)
    ordered = sorted(range(len(ends)), key=lambda place: place == released)
    scores = {place: test.evaluate(ends[place][2]) for place in ordered}
    return [
        {
            "phase": phase.name,
            "rounds": rounds,
            "validation": _last(phase.name, scores[place], lines),
            "test": scores[place],
            "released": place == released,
        }
        for place, (phase, rounds, _) in enumerate(ends)
    ]


def _ends(manifest: RunManifest, progress: Progress) -> Iterator[tuple[Phase, int, AdapterState]]:
    """Phases that were begun, their committed rounds, and the state that each came to."""
    states = [*(each.state for each in progress.ended), progress.released]
    left = progress.round
    for phase, state in zip(manifest.phases, states, strict=False):
        rounds = min(left, phase.rounds)
        if rounds or phase is manifest.phases[0]:
            yield phase, rounds, state
        left -= rounds


def _last(
    phase: str, names: Mapping[str, float], lines: Sequence[Mapping[str, Any]]
) -> dict[str, float]:
    """The last figures of a phase on validation; none where it was not looked at."""
    scored = [line for line in lines if line["phase"] == phase and "loss" in line]
    return {name: scored[-1][name] for name in names} if scored else {}
