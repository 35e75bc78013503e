"""A simulated run and its folder: where its ledger lies, and what is left when it has ended.

Everything that a later reader needs lies in the run's folder; the report reads only files.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedlora.client.training.moments import MomentStore
from fedlora.common.config.schema import FaultsConfig
from fedlora.common.disk.locks import exclusive
from fedlora.common.errors import BadInput
from fedlora.common.ledger.ledger import Ledger
from fedlora.common.tasks.task import LANGUAGE, TRANSLATION
from fedlora.server.rounds.checkpoint import Progress
from fedlora.server.runs.run import Run, conclude
from fedlora.server.runs.samples import SHOWN, likeness, samples
from fedlora.simulations.federation.population import Federation, client_name

RUNNING = "running.lock"  # in a run's folder


@dataclass(frozen=True)
class Paths:
    """A run's folder, and where its ledger is: shared between runs where `ledger` says so."""

    folder: Path
    ledger: Path
    checkpoint: Path

    @classmethod
    def of(cls, folder: Path, ledger: Path | str | None = None) -> Paths:
        """Absolute; without `ledger` the run has one of its own in its folder."""
        folder = folder.resolve()
        own = Path(ledger or folder / "ledger.sqlite").resolve()
        return cls(folder, own, folder / "checkpoint")

    def open_ledger(self) -> Ledger:
        """The ledger; its signed head lies apart, with the run or beside a shared ledger."""
        own = self.ledger.parent == self.folder
        head = (
            self.checkpoint / "ledger-head.json" if own else self.ledger.with_suffix(".head.json")
        )
        key = self.checkpoint / "ledger.key" if own else self.ledger.with_suffix(".key")
        return Ledger.open(self.ledger, head, key)


@dataclass(frozen=True, eq=False, kw_only=True)
class SimulatedRun(Run):
    """A run whose institutions are simulated beside it."""

    federation: Federation
    ledger: Ledger
    paths: Paths
    deadline: float  # seconds of an attempt, where there is anybody to wait for
    faults: FaultsConfig
    own: Mapping[str, str]  # which parts are the researcher's own, and their names
    chosen: tuple[str, ...] = ()  # fields of the configuration that were left to the rules

    @property
    def moments(self) -> MomentStore:
        """The clients' optimisers between rounds."""
        return MomentStore(self.folder / "clients")


def alone_in(folder: Path) -> AbstractContextManager[None]:
    """The folder for one run at a time; BadInput where another process writes into it."""
    folder.mkdir(parents=True, exist_ok=True)
    found = f"{folder}: found a run that is being written there, expected one at a time"
    return exclusive(folder / RUNNING, BadInput(found), 0)


def finish(
    run: SimulatedRun, progress: Progress, ended: str = "", synthetic: bool = False
) -> dict[str, Any]:
    """Score the test file, export the adapter, write summary.json; what stands in it is returned.

    `ended` says why a run that did not reach its last round stopped where it did.
    """
    federation = run.federation

    def more() -> dict[str, Any]:
        return {
            "truncated": {name: int(count) for name, count in federation.train.truncated.items()},
            **_details(run),
            "partition": federation.partition_table(),
            "synthetic": synthetic,
            "own": dict(run.own),
            "chosen": list(run.chosen),
            "ended": ended,
        }

    return conclude(run, progress, _reserved_by_client(run), more)


def _reserved_by_client(run: SimulatedRun) -> dict[str, float]:
    """What the ledger proves: each client's consent to this run covers its whole schedule."""
    result = {}
    for client in run.federation.clients:
        name = run.federation.budget_name(client)
        spend = run.ledger.reserved_for(name, run.manifest.digest)
        result[client_name(client)] = 0.0 if spend is None else spend.epsilon
    return result


def _details(run: SimulatedRun) -> dict[str, Any]:
    """What the task keeps of the test file, and, of classes, clients' accuracy: each class's
    recall, weighted by label mix.
    """
    public, labels = run.federation.public, list(run.manifest.labels)
    found = public.model.task.details(public.test.totals)
    counts = run.federation.label_counts()
    recall = found.get("recall_by_class")
    if recall is not None and counts is not None:
        shares = np.array([recall[label] for label in labels])
        found["accuracy_by_client"] = {
            client_name(client): float(mix @ shares / max(mix.sum(), 1))
            for client, mix in enumerate(counts)
        }
    if public.model.task.reads in (LANGUAGE, TRANSLATION):
        answered = list(samples(public.model, public.test.data))
        found |= {"samples": answered[:SHOWN], **likeness(answered)}
    return {"labels": labels} | found
