"""What a coordinator needs and may see: the frozen model, public records, the first state.

Simulation and deployment build it alike. Institutions build the same network from the manifest.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from fedlora.common.config.parts import NetworkRecipe
from fedlora.common.config.schema import DataConfig, ModelConfig
from fedlora.common.data.data_file import named_data
from fedlora.common.data.records import Columns, Ints, Records, read_records
from fedlora.common.data.unit_names import spelled_once
from fedlora.common.errors import BadInput
from fedlora.common.manifest.manifest import Network, RunManifest
from fedlora.common.manifest.turns import most_moved
from fedlora.common.model.compute import Compute, compute_of_run, stored_for_run
from fedlora.common.model.features import FeatureCache, PooledTexts, Progress, pooled_features
from fedlora.common.model.network import AdapterModel, build_model
from fedlora.common.model.projection import PROJECTION, Projection
from fedlora.common.model.state import PHASES, AdapterState
from fedlora.common.model.stored import QUANTISED
from fedlora.common.tasks.batch import Encoded
from fedlora.common.tasks.known import task_kind, task_named
from fedlora.common.tasks.task import Task
from fedlora.server.rounds.evaluation import Evaluator
from fedlora.server.runs.schedule import NetworkFacts

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class PublicRecords:
    """Public records as read, and the task that they are for."""

    task: Task
    validation: Records
    test: Records
    # what a projection is fitted on and a run starts from; None: half of the validation part
    texts: Records | None = None

    @property
    def learnable(self) -> int:
        """How many records may be learnt from: the rest of them scores."""
        return (len(self.validation) + 1) // 2 if self.texts is None else len(self.texts)


def read_public(data: DataConfig, task: str) -> PublicRecords:
    """What a coordinator without private data reads.

    BadInput where validation is a share of a training file.
    """
    if not isinstance(data.validation, str):
        raise BadInput(
            f"[data] validation = {data.validation:g}: expected a public file, for a coordinator"
            " has no training file"
        )
    named_sources(replace(data, train=""))  # a coordinator's machine has none
    labels = read_labels(data, task)
    files = (data.validation, str(data.test), *filter(None, [data.public]))
    validation, test, *fitted = (
        read_records(Path(each), columns_of(data, task), labels) for each in files
    )
    return PublicRecords(task_named(task, labels), validation, test, *fitted)


def named_sources(data: DataConfig) -> None:
    """BadInput, by field, where one of the files that a configuration names can't serve."""
    names = ("train", "test", "validation", "public")
    for name, value in ((name, getattr(data, name)) for name in names):
        if isinstance(value, str) and value:
            named_data(value, f"[data] {name}")


def read_labels(data: DataConfig, task: str) -> tuple[str, ...]:
    """The public label set: as configured, or of the test file.

    Of the training file only where the test part is a share of it, which a statement says.
    """
    public = data.test if isinstance(data.test, str) else data.train
    return task_kind(task).label_set(Path(public), data)


def columns_of(data: DataConfig, task: str) -> Columns:
    """The columns of a public file: it names neither units nor institutions."""
    return task_kind(task).columns(data)


@dataclass(frozen=True, eq=False)
class Machine:
    """Where and how a network is computed. It changes speed and memory, and nothing else."""

    device: torch.device | None = None  # None: the CPU
    attention: str = "auto"
    precision: str = "auto"
    checkpointing: bool = False
    texts: PooledTexts | None = None  # pooled before, in this process
    progress: Progress | None = None  # told of records that went through the frozen model


@dataclass(frozen=True, eq=False)
class PublicSide:
    """One resident model, and what scores its states."""

    recipe: NetworkRecipe
    model: AdapterModel
    compute: Compute
    features: FeatureCache
    validation: Evaluator
    test: Evaluator
    initial: AdapterState
    # public records that may be learnt from, and which of them: none of those that score
    learnt: Encoded
    learnt_rows: Ints

    @classmethod
    def build(
        cls,
        recipe: NetworkRecipe,
        records: PublicRecords,
        folder: Path,
        machine: Machine,
        turned: AdapterState | None = None,
    ) -> PublicSide:
        """Load the model, encode the records, fit the projection. BadInput names what is wrong.

        LoRA starts as it was drawn, or as in `turned`, of the same network below another head.

        The projection and the way to compute are settled once for a run and must not change in it:
        they lie in the run's `folder`.
        """
        settings, texts = stored_for_run(recipe.model, machine.device, folder), machine.texts
        model = build_model(settings, recipe.lora, records.task, recipe.seed, machine.device)
        if machine.checkpointing:
            model.recompute()
        if turned is not None:
            model.load(_on_turned(model.state(), turned))
        if recipe.head_phase:
            _ = model.head  # refuses a model whose head can't be trained by itself
        test, validation = model.encoded(records.test), model.encoded(records.validation)
        learns = bool(settings.projection or recipe.public_epochs)
        fit, fitted, score = _fit_and_score(model, records, validation, learns)
        if settings.projection:
            path = folder / PROJECTION
            model.projection = _projection(model, fitted, fit, settings, path, texts)
        # Measured on public records: how long a step takes must not depend on anybody's text.
        compute = compute_of_run(model, validation, machine.attention, machine.precision, folder)
        features = FeatureCache(model, progress=machine.progress, texts=texts)
        return cls(
            recipe=recipe,
            model=model,
            compute=compute,
            features=features,
            validation=Evaluator("validation", model, validation, score, features),
            test=Evaluator("test", model, test, np.arange(len(test)), features),
            initial=model.state(),
            learnt=fitted,
            learnt_rows=fit,
        )

    def check_of(self, manifest: RunManifest) -> None:
        """BadInput unless the projection is the one that a run's manifest names.

        Else what is validated and released would be of another network than institutions train.
        """
        found = self.facts.projection_digest
        if found != manifest.projection_digest:
            raise BadInput(
                f"{PROJECTION}: found {found or 'none'}, expected"
                f" {manifest.projection_digest or 'none'}, which the run began with"
            )

    @property
    def facts(self) -> NetworkFacts:
        """What a manifest says of this network."""
        model, settings = self.model, self.recipe.model
        return NetworkFacts(
            task=settings.task,
            labels=model.task.labels,
            max_length=settings.max_length,
            network=Network.of(
                settings, model.lora
            ),  # names for "auto": nodes build what they read
            base_digest=model.base_digest,
            spec_digest=model.spec.digest,
            projection_digest="" if model.projection is None else model.projection.digest,
            moved={name: most_moved(model.spec, name, model.lora.variant) for name in PHASES},
            quantised=settings.dtype if settings.dtype in QUANTISED else "",
        )


def _fit_and_score(
    model: AdapterModel, records: PublicRecords, validation: Encoded, learns: bool
) -> tuple[Ints, Encoded, Ints]:
    """Rows that may be learnt from, and of what, and the validation rows that score then.

    What was fitted on a row, or has learnt it, looks too good there: such rows must not score, nor
    be tested. A file may be named twice, and a text may be in two files.
    """
    rows, texts = np.arange(len(validation), dtype=np.int64), records.texts
    if not learns and texts is not None:
        log.warning(
            "[data] public: nothing learns from it, for [model] projection and [training]"
            " public_epochs are 0"
        )
    if not learns:
        return rows[:0], validation, rows
    words = spelled_once(records.validation)
    kept = words if texts is None else spelled_once(texts)
    encoded, fit, score = validation, rows[::2], rows[1::2]
    if texts is not None:
        encoded, fit, score = model.encoded(texts), np.arange(len(kept), dtype=np.int64), rows
    seen = {*spelled_once(records.test), *(words[row] for row in score)}
    found = fit[np.array([kept[row] not in seen for row in fit], dtype=np.bool_)]
    if len(found) < len(fit):
        known = len(fit) - len(found)
        log.info("public records: %d of %d score or are tested, and don't teach", known, len(fit))
    return found, encoded, score


def _on_turned(state: AdapterState, turned: AdapterState) -> AdapterState:
    """The head of `state` on the LoRA of `turned`."""
    vector = state.vector.copy()
    vector[~state.spec.head_mask()] = turned.vector[~turned.spec.head_mask()]
    return AdapterState(state.spec, vector)


def _projection(
    model: AdapterModel,
    public: Encoded,
    rows: Ints,
    settings: ModelConfig,
    path: Path,
    texts: PooledTexts | None,
) -> Projection:
    """The run's projection: read where it was fitted, else fitted on public text."""
    if path.is_file():
        return Projection.read(path)
    features = pooled_features(model, public, rows, texts=texts).cpu().numpy()
    fitted = Projection.fit(
        (features / settings.head_scale).astype(np.float32),
        settings.projection,
        settings.projection_ridge,
        settings.kernel_directions,
        settings.kernel_gamma,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    fitted.write(path)
    # Not `fitted`: another memory order is another rounding, and a resumed run would not have the
    # same bits.
    return Projection.read(path)
