"""After a run: what each institution gains by a head of its own, or by LoRA's B too: released to
nobody.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fedlora.client.training.personal_adapter import personal_adapter
from fedlora.client.training.personal_head import check_head, personal_head
from fedlora.common.adapter.released import read_released
from fedlora.common.config.load import parse_config
from fedlora.common.data.records import Ints
from fedlora.common.disk.files import read_text, write_text
from fedlora.common.errors import BadInput
from fedlora.common.model.compute import threads
from fedlora.common.model.state import AdapterState
from fedlora.common.tasks.classification import recall_by_class
from fedlora.simulations.begin import begin
from fedlora.simulations.chosen import CONFIG
from fedlora.simulations.federation.population import Federation, client_name
from fedlora.simulations.federation.run_folder import alone_in
from fedlora.simulations.options import DEFAULTS, Options
from fedlora.simulations.report.pages import write_report

SUMMARY, KEY = "summary.json", "personal"  # a run's summary, and what is added to it
Told = Callable[[str], None]


def personalise(
    folder: Path | str,
    options: Options = DEFAULTS,
    told: Told = lambda name: None,
    lora: bool = False,
) -> dict[str, Any]:
    """Fit a head for each institution of a run that has ended; what is added to its summary.

    With `lora` LoRA's B too, above the released A. By institution: the accuracy of the released
    head, of its own, and with its own B on the public test file, each class weighted by its share
    of that institution's records. Neither these nor shares are private here, and nothing of them is
    released. BadInput where the run has not ended, or its task has no such head.
    """
    folder = Path(folder)
    summary = folder / SUMMARY
    if not summary.is_file():
        raise BadInput(f"{summary}: missing, expected a run that has ended")
    config = parse_config(read_text(folder / CONFIG))
    with threads(options.threads), alone_in(folder):
        federation = begin(config, folder, replace(options, resume=True)).federation
        found = _of_all(federation, read_released(folder / "adapter")[1], told, lora)
        table = json.loads(summary.read_text(encoding="utf-8")) | {KEY: found}
        write_text(summary, json.dumps(table, indent=2) + "\n")
        write_report(folder)
    return found


def _of_all(
    federation: Federation, released: AdapterState, told: Told, lora: bool
) -> dict[str, Any]:
    model, counts = federation.model, federation.label_counts()
    check_head(model)
    if counts is None:
        raise BadInput(
            f'[model] task = "{model.task.name}": expected sequence-classification, whose test'
            " records can be weighted by institution"
        )
    rows: dict[str, Any] = {}
    for client in federation.clients:
        rows[client_name(client)] = _of_one(federation, client, released, counts[client], lora)
        told(client_name(client))
    return {"by_client": rows} | {
        f"{name}_{title}": float(of([row[name] for row in rows.values()]))
        for name in ("released", "own", *(("adapter",) if lora else ()))
        for title, of in (("worst", np.min), ("mean", np.mean))
    }


def _of_one(
    federation: Federation, client: int, released: AdapterState, mix: Ints, lora: bool
) -> dict[str, Any]:
    data, features = federation.data_of(client), federation.public.features
    seen = features.get(data.owner, data.encoded, data.units.records, released)
    before = {"released": _weighted(federation, released, mix)}
    if not lora:
        head = personal_head(federation.model, data, seen, released)
        return before | {"pull": head.pull, "own": _weighted(federation, head.state, mix)}
    found = personal_adapter(federation.training, data, seen, released)
    return before | {
        "pull": found.own_head.pull,
        "own": _weighted(federation, found.own_head.state, mix),
        "passes": found.passes,
        "adapter": _weighted(federation, found.state, mix, head_only=False),
    }


def _weighted(
    federation: Federation, state: AdapterState, mix: Ints, head_only: bool = True
) -> float:
    """Recall of each class on the test file, weighted by an institution's label counts."""
    test = federation.public.test
    test.evaluate(state, head_only)
    recall = recall_by_class(test.totals["confusion"])
    return float(mix @ recall / max(mix.sum(), 1))
