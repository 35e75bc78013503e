"""The evaluation at the institutions: each is asked once for noisy counts of its hold-out.

It comes after the last round, of the adapter that is released, as one more attempt: begun durably
before anybody hears of it, reserved by each institution before it touches data. What came of it
lies in evaluation.json. An attempt that was killed is spent, like any other.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedlora.common.codec.strict import json_table
from fedlora.common.disk.files import read_bytes, write_text
from fedlora.common.errors import QuorumLost, Refused
from fedlora.common.model.state import AdapterState
from fedlora.server.rounds.checkpoint import Checkpoint
from fedlora.server.rounds.cohort import Cohort
from fedlora.server.rounds.loop import Around, Rules, ask

log = logging.getLogger(__name__)

EVALUATION = "evaluation.json"  # in a run's folder
MOST_BYTES = 1 << 28  # a thousand institutions of a thousand cells are a tenth of it


def count_hold_outs(
    folder: Path,
    checkpoint: Checkpoint,
    cohort: Cohort,
    released: AdapterState,
    rules: Rules,
    around: Around,
) -> None:
    """Ask for the counts of `released` and keep them, or why there are none; once."""
    manifest = checkpoint.manifest
    if manifest.evaluation is None or "total" in (before := kept_counts(folder)):
        return
    try:
        plan, answer = ask(checkpoint, cohort, released, manifest.rounds + 1, rules, around)
    except (Refused, QuorumLost) as error:
        log.warning("the institutions' hold-outs were not counted: %s", error)
        write_text(folder / EVALUATION, json.dumps({"lost": before.get("lost", str(error))}) + "\n")
        return
    table = {
        "attempt": plan.attempt,
        "adapter": plan.adapter,
        "replies": answer.replies,
        "failures": [[failure.client, failure.reason] for failure in answer.failures],
        "total": answer.total.tolist(),
        "each": {name: counts.tolist() for name, counts in sorted(answer.each.items())},
    }
    write_text(folder / EVALUATION, json.dumps(table) + "\n")


def kept_counts(folder: Path) -> Mapping[str, Any]:
    """What a run keeps of its evaluation; nothing before it."""
    path = folder / EVALUATION
    if not path.is_file():
        return {}
    return json_table(read_bytes(path, MOST_BYTES), str(path), MOST_BYTES)
