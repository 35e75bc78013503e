"""How long runs took to go on after a kill: a file for each seed of `make chaos`, and p50 and p95 over all of them."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "runs" / "chaos"


def record(seed: int, code: int, kills: Sequence[tuple[str, float]]) -> None:
    """(victim, seconds to the next committed round) of each kill of a seed, and how its run ended."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    table = {"seed": seed, "code": code, "kills": [[victim, round(took, 2)] for victim, took in kills]}
    (FOLDER / f"recoveries-{seed}.json").write_text(json.dumps(table) + "\n")


def summary() -> str:
    """Of all seeds whose files lie there."""
    tables = [json.loads(path.read_text()) for path in sorted(FOLDER.glob("recoveries-*.json"))]
    by_victim: dict[str, list[float]] = {}
    for table in tables:
        for victim, seconds in table["kills"]:
            by_victim.setdefault(victim, []).append(seconds)
    everything = [seconds for found in by_victim.values() for seconds in found]
    if not everything:
        return f"{FOLDER}: found no recoveries"
    codes = sorted(table["code"] for table in tables)
    rows = [f"{len(tables)} runs, {len(everything)} kills, exit codes {codes}"]
    for name, found in (("all", everything), *sorted(by_victim.items())):
        p50, p95 = _quantile(found, 0.5), _quantile(found, 0.95)
        rows.append(f"  {name:12} {len(found):4} kills, recovery p50 {p50:5.1f} s, p95 {p95:5.1f} s")
    return "\n".join(rows)


def _quantile(found: Sequence[float], share: float) -> float:
    if len(found) == 1:
        return found[0]
    return statistics.quantiles(found, n=100, method="inclusive")[round(100 * share) - 1]


if __name__ == "__main__":
    sys.stdout.write(summary() + "\n")
