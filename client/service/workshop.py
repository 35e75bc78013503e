"""What the resident trainer has done with torch: consent and training of one run at a time."""

from __future__ import annotations

from pathlib import Path

from fedlora.client.node.folder import NodeFolder
from fedlora.client.node.policy import Policy
from fedlora.client.service.preparation import Bench
from fedlora.client.training.moments import MomentStore
from fedlora.client.training.trainer import Trainer
from fedlora.common.ledger.ledger import Budget, Ledger
from fedlora.common.manifest.manifest import RunManifest
from fedlora.common.manifest.plan import RoundPlan
from fedlora.common.model.compute import threads
from fedlora.common.model.state import AdapterSpec, AdapterState
from fedlora.common.protocol.messages import vector_from_bytes, vector_to_bytes


class Workshop:
    """The `Work` of a real node: its data, its models, its ledger."""

    def __init__(self, folder: NodeFolder, policy: Policy, ledger: Ledger) -> None:
        self._folder = folder
        self._ledger = ledger
        self._threads = policy.trainer.threads
        self._bench = Bench(folder, policy)

    def consent(self, manifest: RunManifest, projection: Path, budget: Budget) -> str:
        with threads(self._threads):
            prepared = self._bench.prepare(manifest, projection)
            self._trainer(manifest, projection, budget)
        return prepared.data_digest

    def spec(self, manifest: RunManifest, projection: Path) -> AdapterSpec:
        with threads(self._threads):
            return self._bench.prepare(manifest, projection).training.gradients.model.spec

    def train(
        self,
        manifest: RunManifest,
        projection: Path,
        budget: Budget,
        plan: RoundPlan,
        vector: bytes,
    ) -> tuple[bytes, str]:
        with threads(self._threads):
            trainer = self._trainer(manifest, projection, budget)
            prepared = self._bench.prepare(manifest, projection)
            spec = prepared.training.gradients.model.spec
            state = AdapterState(spec, vector_from_bytes(vector, spec.size, "task"))
            return vector_to_bytes(trainer.train(plan, state).delta), prepared.data_digest

    def _trainer(self, manifest: RunManifest, projection: Path, budget: Budget) -> Trainer:
        """A trainer that has consented; the same consent again reserves nothing more."""
        prepared = self._bench.prepare(manifest, projection)
        moments = MomentStore(self._folder.run(manifest.digest) / "moments")
        trainer = Trainer(
            prepared.data,
            prepared.training,
            self._ledger,
            budget,
            moments,
            masked=manifest.secure is not None,
        )
        trainer.consent(manifest)
        return trainer
