"""One simulated run, from configuration to report: the order of events, and nothing else.

    1. build the federation; make the manifest, or read the one of the run that is resumed
    2. the round loop over a cohort: in this process, or Flower's on Ray
    3. the test file, once; the adapter; the summary; the report

Everything that a later reader needs lies in the run's folder; the report reads only files.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedlora.client.training.moments import MomentStore
from fedlora.common.config.schema import Config, FaultsConfig, config_to_toml
from fedlora.common.disk.files import write_text
from fedlora.common.errors import BadInput, Refused
from fedlora.common.ledger.ledger import Ledger
from fedlora.common.manifest.manifest import RunManifest
from fedlora.common.model.features import PooledTexts
from fedlora.common.model.features import Progress as FeatureProgress
from fedlora.common.privacy.calibration import default_cache
from fedlora.server.rounds.checkpoint import Checkpoint, Progress
from fedlora.server.rounds.cohort import Cohort
from fedlora.server.runs.metrics import Conducted, Observe
from fedlora.server.runs.public_data import forget_beginning
from fedlora.server.runs.run import conclude, conduct
from fedlora.server.runs.summary import write_summary
from fedlora.simulations.federation.population import Federation, client_name

# in a run's folder: which data and which ledger it began with
DATA, LEDGER = "data.sha256", "ledger.id"


@dataclass(frozen=True)
class Paths:
    """A run's folder, and where its ledger is: shared between runs where `ledger` says so."""

    folder: Path
    ledger: Path
    checkpoint: Path

    @classmethod
    def of(cls, folder: Path, ledger: Path | None = None) -> Paths:
        folder = folder.resolve()
        return cls(folder, (ledger or folder / "ledger.sqlite").resolve(), folder / "checkpoint")

    def open_ledger(self) -> Ledger:
        """The ledger; its signed head lies apart, with the run or beside a shared ledger."""
        own = self.ledger.parent == self.folder
        head = (
            self.checkpoint / "ledger-head.json" if own else self.ledger.with_suffix(".head.json")
        )
        key = self.checkpoint / "ledger.key" if own else self.ledger.with_suffix(".key")
        return Ledger.open(self.ledger, head, key)


@dataclass(eq=False)
class Run:
    """A run that was begun or resumed: what a cohort and the round loop need."""

    config: Config
    paths: Paths
    federation: Federation
    checkpoint: Checkpoint
    ledger: Ledger
    engine: str
    began: float = field(default_factory=time.monotonic)

    @property
    def manifest(self) -> RunManifest:
        return self.checkpoint.manifest

    @property
    def conducted(self) -> Conducted:
        return Conducted(
            self.config,
            self.paths.folder,
            self.federation.public,
            self.checkpoint,
            self.engine,
            self.began,
        )

    @property
    def moments(self) -> MomentStore:
        return MomentStore(self.paths.folder / "clients")


def begin(
    config: Config,
    paths: Paths,
    resume: bool = False,
    engine: str = "sequential",
    progress: FeatureProgress | None = None,
    device: torch.device | None = None,
    texts: PooledTexts | None = None,
) -> Run:
    """Build everything; `texts` are shared with other runs of this process.

    BadInput where the folder holds another run, or, with `resume`, none; Refused without the run's
    own ledger.
    """
    began = time.monotonic()
    _check_folder(config, paths, resume)
    if engine == "ray" and config.faults != FaultsConfig():
        raise BadInput(
            "--engine ray: [faults] are made up by the sequential engine only, expected none"
        )
    if not resume:
        forget_beginning(paths.folder)
    federation = Federation.build(config, paths.folder, progress, device, texts)
    if resume:
        _check_kept(
            paths.folder / DATA, federation.data_digest, f"{config.data.train}: found other bytes"
        )
        checkpoint = Checkpoint.open(paths.checkpoint, federation.model.spec)
        ledger = _same_ledger(paths)
    else:
        manifest, ledger = federation.manifest(default_cache()), paths.open_ledger()
        write_text(paths.folder / "config.toml", config_to_toml(config))
        write_text(paths.folder / DATA, federation.data_digest + "\n")
        write_text(paths.folder / LEDGER, ledger.id + "\n")
        write_text(paths.folder / "manifest.json", manifest.to_bytes().decode() + "\n")
        # last: from here on it is a run, and can be resumed
        checkpoint = Checkpoint.create(paths.checkpoint, manifest, federation.public.initial)
    checkpoint.check_against_ledger(ledger.attempts_used(checkpoint.manifest.digest))
    # After the checkpoint: a kill in between must not spend a budget for a run that never was.
    federation.charge(checkpoint.manifest, ledger)
    return Run(config, paths, federation, checkpoint, ledger, engine, began)


def _same_ledger(paths: Paths) -> Ledger:
    """The ledger that the run began with; Refused where it is another one, or gone."""
    if not paths.ledger.exists():
        raise Refused(f"{paths.ledger}: found no ledger, expected the one that the run began with")
    ledger = paths.open_ledger()
    if (paths.folder / LEDGER).read_text(encoding="utf-8").strip() != ledger.id:
        raise Refused(f"{paths.ledger}: found another ledger than the run began with")
    return ledger


def _check_kept(path: Path, found: str, what: str) -> None:
    if path.read_text(encoding="utf-8").strip() != found:
        raise BadInput(f"{what} than the run began with, expected the same file")


def train(run: Run, cohort: Cohort, observe: Observe = lambda number, figures: None) -> Progress:
    """The round loop, with a line of metrics.jsonl for each committed round."""
    return conduct(run.conducted, cohort, observe)


def finish(
    run: Run, progress: Progress, synthetic: bool = False, ended: str = ""
) -> dict[str, Any]:
    """Score the test file, export the adapter, write summary.json; what stands in it is returned.

    `ended` says why a run that did not reach its last round stopped where it did.
    """
    federation = run.federation
    summary = conclude(run.conducted, progress, _reserved_by_client(run)) | {
        "truncated": {name: int(count) for name, count in federation.train.truncated.items()},
        **_by_class(run),
        "partition": federation.partition_table(),
        "synthetic": synthetic,
        "ended": ended,
    }
    write_summary(run.paths.folder, summary)
    return summary


def _reserved_by_client(run: Run) -> dict[str, float]:
    """What the ledger proves: each client's consent to this run covers its whole schedule."""
    result = {}
    for client in run.federation.clients:
        spend = run.ledger.reserved_for(run.federation.budget_name(client), run.manifest.digest)
        result[client_name(client)] = 0.0 if spend is None else spend.epsilon
    return result


def _by_class(run: Run) -> dict[str, Any]:
    """Confusion, recall, and clients' accuracy: each class's recall, weighted by label mix."""
    confusion = run.federation.public.test.totals.get("confusion")
    if confusion is None:
        return {"labels": []}
    total = confusion.sum(axis=1)
    recall = np.divide(np.diag(confusion), total, out=np.zeros(len(total)), where=total > 0)
    labels = list(run.manifest.labels)
    mixes = run.federation.label_counts()
    return {
        "labels": labels,
        "confusion": confusion.astype(int).tolist(),
        "recall_by_class": {
            label: float(value) for label, value in zip(labels, recall, strict=True)
        },
        "accuracy_by_client": {
            client_name(client): float(mix @ recall / max(mix.sum(), 1))
            for client, mix in enumerate(mixes)
        },
    }


def _check_folder(config: Config, paths: Paths, resume: bool) -> None:
    begun = (paths.checkpoint / "manifest.json").exists()
    if begun and not resume:
        raise BadInput(
            f"{paths.folder}: found a run, expected an empty folder; --resume goes on with it"
        )
    if not resume:
        return
    if not begun:
        raise BadInput(f"{paths.folder}: found no run to resume")
    before = (paths.folder / "config.toml").read_text(encoding="utf-8")
    if before != config_to_toml(config):
        raise BadInput(
            f"{paths.folder}/config.toml: found another configuration than the one given to"
            " --resume"
        )
