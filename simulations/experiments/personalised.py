"""After a run: what each institution gains by a head of its own, which is released to nobody."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fedlora.client.training.personal_head import check_head, personal_head
from fedlora.common.adapter.released import read_released
from fedlora.common.config.load import parse_config
from fedlora.common.data.records import Ints
from fedlora.common.disk.files import read_text, write_text
from fedlora.common.errors import BadInput
from fedlora.common.model.compute import threads
from fedlora.common.model.state import AdapterState
from fedlora.common.tasks.classification import recall_by_class
from fedlora.simulations.begin import DEFAULTS, Options, begin
from fedlora.simulations.chosen import CONFIG
from fedlora.simulations.federation.population import Federation, client_name
from fedlora.simulations.federation.run_folder import alone_in
from fedlora.simulations.report.pages import write_report

SUMMARY, KEY = "summary.json", "personal"  # a run's summary, and what is added to it
Told = Callable[[str], None]


def personalise(
    folder: Path, options: Options = DEFAULTS, told: Told = lambda name: None
) -> dict[str, Any]:
    """Fit a head for each institution of a run that has ended; what is added to its summary.

    By institution: the accuracy of the released head and of its own on the public test file, each
    class weighted by its share of that institution's records. Neither heads nor shares are private
    here, and nothing of them is released. BadInput where the run has not ended, or its task has no
    such head.
    """
    summary = folder / SUMMARY
    if not summary.is_file():
        raise BadInput(f"{summary}: missing, expected a run that has ended")
    config = parse_config(read_text(folder / CONFIG))
    with threads(options.threads), alone_in(folder):
        federation = begin(config, folder, replace(options, resume=True)).federation
        found = _of_all(federation, read_released(folder / "adapter")[1], told)
        table = json.loads(summary.read_text(encoding="utf-8")) | {KEY: found}
        write_text(summary, json.dumps(table, indent=2) + "\n")
        write_report(folder)
    return found


def _of_all(federation: Federation, released: AdapterState, told: Told) -> dict[str, Any]:
    model, features, counts = (
        federation.model,
        federation.public.features,
        federation.label_counts(),
    )
    check_head(model)
    if counts is None:
        raise BadInput(
            f'[model] task = "{model.task.name}": expected sequence-classification, whose test'
            " records can be weighted by institution"
        )
    rows: dict[str, Any] = {}
    for client in federation.clients:
        data = federation.data_of(client)
        seen = features.get(data.owner, data.encoded, data.units.records, released)
        own = personal_head(model, data, seen, released)
        rows[client_name(client)] = {
            "pull": own.pull,
            "released": _weighted(federation, released, counts[client]),
            "own": _weighted(federation, own.state, counts[client]),
        }
        told(client_name(client))
    return {"by_client": rows} | {
        f"{name}_{title}": float(of([row[name] for row in rows.values()]))
        for name in ("released", "own")
        for title, of in (("worst", np.min), ("mean", np.mean))
    }


def _weighted(federation: Federation, state: AdapterState, mix: Ints) -> float:
    """Recall of each class on the test file, weighted by an institution's label counts."""
    test = federation.public.test
    test.evaluate(state, head_only=True)
    recall = recall_by_class(test.totals["confusion"])
    return float(mix @ recall / max(mix.sum(), 1))
