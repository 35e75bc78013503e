"""The workbench: the data set and the loaded model of one run, kept between rounds.

The base comes from the folder that the policy names for the manifest's digest; the network from the
manifest alone. How fast a step is, is measured on a fixed sentence: it must not depend on anybody's
text.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from fedlora.client.node.folder import NodeFolder
from fedlora.client.node.policy import DataPolicy, Policy
from fedlora.client.training.local import ClientData, LocalTraining
from fedlora.client.training.step import PerSampleGradients
from fedlora.common.config.schema import ALL_LINEAR, LoraConfig, ModelConfig, check_delta
from fedlora.common.data.records import Columns, Records, file_digest, read_records, unit_groups
from fedlora.common.data.tasks import CausalLanguageModel, SequenceClassification, Task
from fedlora.common.errors import BadInput
from fedlora.common.manifest.manifest import RunManifest
from fedlora.common.model.compute import compute_of_run
from fedlora.common.model.features import FeatureCache
from fedlora.common.model.network import AdapterModel, build_model
from fedlora.common.model.projection import Projection
from fedlora.common.model.tokenizer import load_tokenizer

PROBE = (
    "a sentence that anybody may read, of about the length of a short message to a bank or a"
    " hospital"
)
TRIED_LENGTH = 64  # tokens of a text that a base is tried on, where no run says how many


@dataclass(frozen=True, eq=False)
class Prepared:
    """One run's data and training; `data_digest` is the file's, and stays here."""

    data: ClientData
    training: LocalTraining
    data_digest: str
    records: int
    units: int


class Bench:
    """One model and one data set at a time: what the last run asked for."""

    def __init__(self, folder: NodeFolder, policy: Policy) -> None:
        self._folder = folder
        self._policy = policy
        self._run = ""
        self._gradients: PerSampleGradients | None = None
        self._prepared: Prepared | None = None

    def prepare(self, manifest: RunManifest, projection: Path) -> Prepared:
        """Load what is not loaded yet; a data file that changed is read anew.

        BadInput says what is wrong.
        """
        data = self._policy.data[
            self._policy.data_for(manifest.task, manifest.labels, manifest.unit)
        ]
        path = self._folder.under(data.path)
        if self._run != manifest.digest or self._gradients is None:
            self._run, self._prepared = "", None
            self._gradients = PerSampleGradients(self._model(manifest, projection))
            self._run = manifest.digest
        digest = file_digest(path)
        if self._prepared is None or self._prepared.data_digest != digest:
            self._prepared = self._read(manifest, data, path, digest, self._gradients)
        return self._prepared

    def _model(self, manifest: RunManifest, projection: Path) -> AdapterModel:
        base = self._folder.base(self._policy.bases[manifest.base_digest])
        model, lora = manifest.network.configs(str(base))
        settings = replace(
            model, digest=manifest.base_digest, task=manifest.task, max_length=manifest.max_length
        )
        built = build_model(settings, lora, task_of(manifest), manifest.seed, _device(self._policy))
        if manifest.projection_digest:
            built.projection = Projection.read(projection)
            # before it is kept for the run
            if built.projection.digest != manifest.projection_digest:
                raise BadInput(
                    f"manifest projection_digest: found {built.projection.digest}, expected "
                    f"{manifest.projection_digest}"
                )
        probe = Records([PROBE] * 12, [PROBE] * 12, np.zeros(12, dtype=np.int64), None, {}, "probe")
        encoded = built.task.encode(probe, built.tokenizer, manifest.max_length)
        compute_of_run(built, encoded, "auto", "auto", projection.parent)
        return built

    def _read(
        self,
        manifest: RunManifest,
        data: DataPolicy,
        path: Path,
        digest: str,
        gradients: PerSampleGradients,
    ) -> Prepared:
        records = read_data(data, path)
        if file_digest(path) != digest:
            raise BadInput(f"{path.name}: changed while it was read")
        units = unit_groups(records.units, len(records))
        # by the policy's δ, whatever the manifest's: a consent must not tell the number of units
        check_delta(self._policy.limits.delta, len(units), f"{path.name}, by [limits] delta:")
        model = gradients.model
        encoded = model.task.encode(records, model.tokenizer, manifest.max_length)
        training = LocalTraining(
            gradients, FeatureCache(model), self._policy.trainer.micro_batch_tokens
        )
        client = ClientData(self._policy.institution, encoded, units)
        return Prepared(client, training, digest, len(records), len(units))


def try_base(folder: NodeFolder, policy: Policy, digest: str) -> dict[str, float | BadInput]:
    """By each task that the policy has data for: seconds of the probe, or why it can't serve.

    As a run loads and tries it, with every linear layer adapted; spends nothing.
    """
    base = str(folder.base(policy.bases[digest]))
    longest = min(policy.limits.max_length, TRIED_LENGTH)
    found: dict[str, float | BadInput] = {}
    for data in policy.data.values():
        if data.task in found:
            continue
        pooling = "default" if data.task == "causal-lm" else "mean"
        settings = ModelConfig(base, digest, data.task, longest, pooling)
        lora = LoraConfig(rank=1, targets=(ALL_LINEAR,))
        try:
            found[data.task] = build_model(settings, lora, task_of(data), 0).probe_seconds
        except BadInput as error:
            found[data.task] = error
    return found


def check_data(folder: NodeFolder, policy: Policy, name: str) -> tuple[int, int]:
    """Records and units of a data set, read and tokenised for each base as a run does it.

    BadInput names the row.
    """
    data = policy.data[name]
    records = read_data(data, folder.under(data.path))
    units = len(unit_groups(records.units, len(records)))
    check_delta(policy.limits.delta, units, f"{records.where}, by [limits] delta:")
    for base in policy.bases.values():
        task_of(data).encode(records, load_tokenizer(folder.base(base)), policy.limits.max_length)
    return len(records), units


def read_data(data: DataPolicy, path: Path) -> Records:
    """A data set as its policy describes it; a link out of the policy's folder is refused."""
    causal = data.task == "causal-lm"
    columns = Columns(
        text=data.text,
        response=data.response if causal else "",
        label="" if causal else data.label,
        unit=data.unit,
    )
    return read_records(path, columns, data.labels, root=path.parent)


def task_of(asked: RunManifest | DataPolicy) -> Task:
    if asked.task == "sequence-classification":
        return SequenceClassification(asked.labels)
    if asked.task == "causal-lm":
        return CausalLanguageModel()
    raise BadInput(f"manifest task: found {asked.task!r}, expected a known one")


def _device(policy: Policy) -> torch.device:
    name = policy.trainer.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)
