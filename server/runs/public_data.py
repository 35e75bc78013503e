"""What a coordinator needs and may see: the frozen model, public records, the first state.

Simulation and deployment build it alike. Institutions build the same network from the manifest.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fedlora.common.config.schema import Config, ModelConfig
from fedlora.common.data.records import Columns, Records, read_label_set, read_records
from fedlora.common.data.tasks import CausalLanguageModel, Encoded, SequenceClassification, Task
from fedlora.common.errors import BadInput
from fedlora.common.model.compute import COMPUTE, Compute, compute_of_run
from fedlora.common.model.features import FeatureCache, PooledTexts, Progress, pooled_features
from fedlora.common.model.network import AdapterModel, build_model
from fedlora.common.model.projection import PROJECTION, Projection
from fedlora.common.model.state import AdapterState
from fedlora.server.rounds.evaluation import Evaluator


@dataclass(frozen=True, eq=False)
class PublicRecords:
    """Public records as read, and the task that they are for."""

    task: Task
    validation: Records
    test: Records


def read_public(config: Config) -> PublicRecords:
    """What a coordinator without private data reads.

    BadInput where validation is a share of a training file.
    """
    data = config.data
    if not isinstance(data.validation, str):
        raise BadInput(
            f"[data] validation = {data.validation:g}: expected a public file, for a coordinator"
            " has no training file"
        )
    labels = read_labels(config)
    validation, test = (
        read_records(Path(each), columns_of(config, private=False), labels)
        for each in (data.validation, data.test)
    )
    return PublicRecords(task_of(config, labels), validation, test)


def read_labels(config: Config) -> tuple[str, ...]:
    """The public label set: as configured, or of the test file; never of a training file."""
    if config.model.task != "sequence-classification":
        return ()
    return tuple(config.data.labels or read_label_set(Path(config.data.test), config.data.label))


def task_of(config: Config, labels: tuple[str, ...]) -> Task:
    causal = config.model.task == "causal-lm"
    return CausalLanguageModel() if causal else SequenceClassification(labels)


def columns_of(config: Config, private: bool) -> Columns:
    """The columns to read; only the training file must name units and institutions."""
    data, federation = config.data, config.federation
    causal = config.model.task == "causal-lm"
    return Columns(
        text=(data.prompt or data.text) if causal else data.text,
        response=data.response if causal else "",
        label="" if causal else data.label,
        unit=data.unit if private else "",
        more=(federation.column,) if private and federation.partition == "by-column" else (),
    )


@dataclass(frozen=True, eq=False)
class PublicSide:
    """One resident model, and what scores its states."""

    model: AdapterModel
    compute: Compute
    features: FeatureCache
    validation: Evaluator
    test: Evaluator
    initial: AdapterState

    @classmethod
    def build(
        cls,
        config: Config,
        records: PublicRecords,
        folder: Path,
        progress: Progress | None = None,
        device: torch.device | None = None,
        texts: PooledTexts | None = None,
    ) -> PublicSide:
        """Load the model, encode the records, fit the projection. BadInput names what is wrong.

        The projection and the way to compute are settled once for a run and must not change in it:
        they lie in the run's `folder`.
        """
        model = build_model(config.model, config.lora, records.task, config.seed, device)
        if config.training.head_rounds:
            _ = model.head  # refuses a model whose head can't be trained by itself
        test, validation = (
            encode(config, model, records.test),
            encode(config, model, records.validation),
        )
        public = np.arange(len(validation), dtype=np.int64)
        score = public
        if config.model.projection:
            # Whitened rows of the fit look unlike any others: they must not score what was fitted
            # on them.
            fit, score = public[::2], public[1::2]
            model.projection = _projection(
                model, validation, fit, config.model, folder / PROJECTION, texts
            )
        # Measured on public records: how long a step takes must not depend on anybody's text.
        tuning = config.training
        compute = compute_of_run(model, validation, tuning.attention, tuning.precision, folder)
        features = FeatureCache(model, progress=progress, texts=texts)
        return cls(
            model=model,
            compute=compute,
            features=features,
            validation=Evaluator("validation", model, validation, score, features),
            test=Evaluator("test", model, test, np.arange(len(test)), features),
            initial=model.state(),
        )


def forget_beginning(folder: Path) -> None:
    """Drop what a killed beginning left: fitted on what was public then, and may be private now."""
    for name in (PROJECTION, COMPUTE):
        (folder / name).unlink(missing_ok=True)


def encode(config: Config, model: AdapterModel, records: Records) -> Encoded:
    return model.task.encode(records, model.tokenizer, config.model.max_length)


def _projection(
    model: AdapterModel,
    public: Encoded,
    rows: np.ndarray[tuple[int], np.dtype[np.int64]],
    settings: ModelConfig,
    path: Path,
    texts: PooledTexts | None,
) -> Projection:
    """The run's projection: read where it was fitted, else fitted on public validation data."""
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
