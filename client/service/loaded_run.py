"""The run whose model and data are in memory, with torch: what a real node works with.

The base comes from the folder that the policy names for the manifest's digest; the network from the
manifest alone. How fast a step is, is measured on a fixed sentence: it must not depend on anybody's
text.
"""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fedlora.client.node.folder import NodeFolder
from fedlora.client.node.policy import DataPolicy, Policy
from fedlora.client.service.data_sets import read_data
from fedlora.client.training.hold_out import group_places, unit_points
from fedlora.client.training.local import ClientData, LocalTraining
from fedlora.client.training.memory import check_fits
from fedlora.client.training.moments import MomentStore, UnnoisedMoments
from fedlora.client.training.ranks import RankLost, Ranks, Recipe, of_one_kind
from fedlora.client.training.step import PerSampleGradients
from fedlora.client.training.timing import Steps, nobodys_texts, tokens_of_run
from fedlora.client.training.trainer import Trainer, check_model, check_state
from fedlora.common.config.schema import ALL_LINEAR, LoraConfig, ModelConfig, check_delta
from fedlora.common.data.data_file import origin_of
from fedlora.common.data.origin import Origin
from fedlora.common.data.records import unit_groups
from fedlora.common.data.unit_names import unit_names
from fedlora.common.errors import BadInput, Refused
from fedlora.common.ledger.ledger import Budget, Ledger
from fedlora.common.ledger.subject import Subject
from fedlora.common.manifest.manifest import RunManifest
from fedlora.common.manifest.plan import Delta, RoundPlan
from fedlora.common.model.compute import compute_of_run, stored_for_run, threads
from fedlora.common.model.features import FeatureCache
from fedlora.common.model.network import build_model
from fedlora.common.model.projection import Projection
from fedlora.common.model.state import AdapterSpec, AdapterState
from fedlora.common.privacy.modes import guarantee_of
from fedlora.common.protocol.vectors import vector_from_bytes
from fedlora.common.tasks.known import task_kind, task_named
from fedlora.common.tasks.task import RECORD, WORD

log = logging.getLogger(__name__)
PROBE = (
    "a sentence that anybody may read, of about the length of a short message to a bank or a"
    " hospital"
)
MOST_UNNOISED = 4  # runs whose un-noised moments are kept in memory
TRIED_LENGTH = 64  # tokens of a text that a base is tried on, where no run says how many


@dataclass(frozen=True, eq=False)
class Prepared:
    """One run's data and training."""

    data: ClientData
    training: LocalTraining

    @property
    def spec(self) -> AdapterSpec:
        """Which coordinates the run's adapter has."""
        return self.training.gradients.model.spec

    @property
    def data_digest(self) -> str:
        """The data file's; it stays here."""
        return self.data.origin.digest


class LoadedRun:
    """The `Work` of a real node: one model and one data set at a time, the last request's."""

    def __init__(self, folder: NodeFolder, policy: Policy, ledger: Ledger) -> None:
        self._folder, self._policy, self._ledger = folder, policy, ledger
        self._run = ""
        self._gradients: PerSampleGradients | None = None
        self._prepared: Prepared | None = None
        self._tokens = 0  # of a micro-batch
        self._unnoised: dict[str, UnnoisedMoments] = {}  # of the last runs that keep some

    def adopt(self, policy: Policy) -> None:
        """Go by this policy from now on: base and data are loaded anew."""
        self._policy = policy
        self._let_go()

    def check(self, manifest: RunManifest, projection: Path, budget: Budget) -> None:
        """Read the data, build the network; BadInput where they are not the manifest's.

        Refused where the budget counts another unit, or the data charge another budget.
        """
        with threads(self._policy.trainer.threads):
            prepared = self.prepare(manifest, projection)
        check_model(manifest, prepared.training.gradients.model)
        guarantee_of(manifest).check_network(prepared.spec)
        subject = Subject.of(manifest, prepared.data.origin)
        self._ledger.check(budget.name, subject)

    def consent(self, manifest: RunManifest, projection: Path, budget: Budget) -> str:
        """Read the data, reserve the run's cost in `budget`, return the digest of the data.

        What reading and the ledger refuse is raised.
        """
        with threads(self._policy.trainer.threads):
            prepared = self.prepare(manifest, projection)
            self._trainer(prepared, manifest, budget)
        return prepared.data_digest

    def spec(self, manifest: RunManifest, projection: Path) -> AdapterSpec:
        """The tensors that the run moves, from its network; reads no data."""
        with threads(self._policy.trainer.threads):
            return self._network(manifest, projection).model.spec

    def train(
        self,
        manifest: RunManifest,
        projection: Path,
        budget: Budget,
        plan: RoundPlan,
        vector: bytes | memoryview,
    ) -> tuple[Delta, str]:
        """The update of one attempt, (size,), and the digest of its data.

        `vector` is the adapter that the plan starts from, as little-endian float32; BadInput where
        it is another one, before data are read, for nothing would be charged for that.
        """
        with threads(self._policy.trainer.threads):
            spec = self._network(manifest, projection).model.spec
            state = AdapterState(spec, vector_from_bytes(vector, spec.size, "task"))
            check_state(guarantee_of(manifest), plan, state)
            prepared = self.prepare(manifest, projection)
            trainer = self._trainer(prepared, manifest, budget)
            try:
                update = trainer.train(plan, state)
            except RankLost:
                self._let_go()  # the next attempt starts anew
                raise
            return update.delta, prepared.data_digest

    def prepare(self, manifest: RunManifest, projection: Path) -> Prepared:
        """Load what is not loaded yet; a data file that changed is read anew.

        BadInput says what is wrong.
        """
        data = self._policy.data[
            self._policy.data_for(manifest.task, manifest.labels, manifest.unit)
        ]
        path, gradients = self._folder.under(data.path), self._network(manifest, projection)
        origin = origin_of(path)
        if self._prepared is None or self._prepared.data.origin != origin:
            self._prepared = self._read(manifest, data, path, origin, gradients)
        return self._prepared

    def _network(self, manifest: RunManifest, projection: Path) -> PerSampleGradients:
        """The run's, built and tried where another one's is loaded; no data are read for it."""
        if self._run != manifest.digest or self._gradients is None:
            self._let_go()
            gradients = self._built(manifest, projection)
            self._tokens = self._fitting_tokens(gradients, manifest, projection.parent)
            self._run, self._gradients = manifest.digest, gradients
        return self._gradients

    def _let_go(self) -> None:
        """Keep neither network nor data; ranks end with what held them."""
        if isinstance(self._gradients, Ranks):
            self._gradients.close()
        self._run, self._gradients, self._prepared = "", None, None

    def _trainer(self, prepared: Prepared, manifest: RunManifest, budget: Budget) -> Trainer:
        """A trainer that has consented; the same consent again reserves nothing more."""
        moments = self._moments(manifest)
        masked = manifest.secure is not None
        trainer = Trainer(
            prepared.data, prepared.training, self._ledger, budget, moments, masked=masked
        )
        trainer.consent(manifest)
        return trainer

    def _moments(self, manifest: RunManifest) -> MomentStore:
        """On the disk where each step is noised; else while this process lasts."""
        folder = self._folder.run(manifest.digest) / "moments"
        if guarantee_of(manifest).noise_in_step:
            return MomentStore(folder)
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier version
        found = self._unnoised.pop(manifest.digest, UnnoisedMoments())
        self._unnoised[manifest.digest] = found
        if len(self._unnoised) > MOST_UNNOISED:
            del self._unnoised[next(iter(self._unnoised))]
        return found

    def _built(self, manifest: RunManifest, projection: Path) -> PerSampleGradients:
        """The manifest's network on the policy's devices; BadInput where it can't be."""
        folder, devices = projection.parent, _devices(self._policy)
        base = self._folder.base(self._policy.bases[manifest.base_digest])
        model, lora = manifest.network.configs(str(base))
        settings = replace(
            model, digest=manifest.base_digest, task=manifest.task, max_length=manifest.max_length
        )
        if manifest.quantised:
            settings = replace(settings, dtype=manifest.quantised)
        recipe = Recipe(
            model=stored_for_run(settings, devices[0], folder),
            lora=lora,
            task=task_named(manifest.task, manifest.labels),
            seed=manifest.seed,
            checkpointing=self._policy.trainer.checkpointing,
            projection=_projection(manifest, projection),
        )
        built = recipe.build(devices[0])
        encoded = built.inputs.public(built.task, [PROBE] * 12, built.longest)
        compute_of_run(built, encoded, "auto", "auto", folder)
        alone = len(devices) == 1
        return PerSampleGradients(built) if alone else Ranks(built, recipe, devices[1:])

    def _fitting_tokens(
        self, gradients: PerSampleGradients, manifest: RunManifest, folder: Path
    ) -> int:
        """Tokens of a micro-batch; Refused where a step of them is more than this machine has free.

        Before data are read: what is free must say nothing of them. The log has the figures.
        """
        steps, model, asked = Steps.promised(manifest), gradients.model, self._policy.trainer
        texts = nobodys_texts(model)
        tokens = tokens_of_run(asked.micro_batch_tokens, gradients, texts, steps, folder)
        if not steps.drawn:
            return tokens
        try:
            check_fits(model, tokens, model.longest, steps.packed, steps.private, "[trainer]")
        except BadInput as fault:
            log.warning("%s %s", self._folder.policy.name, fault)
            raise Refused(
                "memory: a step of this run needs more than is free here; the node's own log says"
                " what to change"
            ) from fault
        return tokens

    def _read(
        self,
        manifest: RunManifest,
        data: DataPolicy,
        path: Path,
        origin: Origin,
        gradients: PerSampleGradients,
    ) -> Prepared:
        records = read_data(data, path)
        if origin_of(path) != origin:
            raise BadInput(f"{path.name}: changed while it was read")
        if records.spellings:
            log.warning("%s", records.spellings)
        units = unit_groups(records.units, len(records))
        # by the policy's δ, whatever the manifest's: a consent must not tell the number of units
        check_delta(self._policy.limits.delta, len(units), f"{path.name}, by [limits] delta:")
        model = gradients.model
        encoded = model.encoded(records)
        training = LocalTraining(gradients, FeatureCache(model), self._tokens)
        points = None
        if manifest.evaluation is not None:
            points = unit_points(manifest, unit_names(records), self._ledger)
        groups = group_places(records, manifest.groups)
        client = ClientData(self._policy.institution, encoded, units, origin, points, groups)
        return Prepared(client, training)


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
        pooling = {RECORD: "mean", WORD: "words"}.get(task_kind(data.task).reads, "default")
        settings = ModelConfig(base, digest, data.task, longest, pooling)
        lora = LoraConfig(rank=1, targets=(ALL_LINEAR,))
        try:
            task = task_named(data.task, data.label_set)
            found[data.task] = build_model(settings, lora, task, 0).probe_seconds
        except BadInput as error:
            found[data.task] = error
    return found


def _projection(manifest: RunManifest, path: Path) -> Projection | None:
    """The one that the manifest names; BadInput where another lies there."""
    if not manifest.projection_digest:
        return None
    found = Projection.read(path)
    if found.digest != manifest.projection_digest:  # before it is kept for the run
        raise BadInput(
            f"manifest projection_digest: found {found.digest}, expected"
            f" {manifest.projection_digest}"
        )
    return found


def _devices(policy: Policy) -> list[torch.device]:
    """As the policy names them; "auto": each GPU of the first one's kind, or the CPU. BadInput
    unless all are there and of one kind.
    """
    names, count = list(policy.trainer.device), torch.cuda.device_count()
    if names == ["auto"]:
        kinds = [torch.cuda.get_device_name(number) for number in range(count)]
        names = [f"cuda:{n}" for n, kind in enumerate(kinds) if kind == kinds[0]] or ["cpu"]
    devices = [torch.device(name) for name in names if name != "auto"]
    lost = [str(each) for each in devices if each.type == "cuda" and (each.index or 0) >= count]
    if lost or len(devices) < len(names):
        found = ", ".join(lost) or "auto among others"
        raise BadInput(f"[trainer] device: found {found}, expected what there is: {count} GPUs")
    of_one_kind(devices)
    return devices
