"""What a trainer has done for it once it has said yes; `client.service.loaded_run` does it."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from fedlora.client.node.policy import Policy
from fedlora.common.ledger.ledger import Budget
from fedlora.common.manifest.manifest import RunManifest
from fedlora.common.manifest.plan import Delta, RoundPlan
from fedlora.common.model.state import AdapterSpec


class Work(Protocol):
    """All that is done with a model and with data; `projection` is the run's, on this disk."""

    def adopt(self, policy: Policy) -> None:
        """Go by this policy from now on; nothing stays that was loaded under another."""

    def check(self, manifest: RunManifest, projection: Path, budget: Budget) -> None:
        """Whether network, data and budget are what the manifest names; reserves nothing."""

    def consent(self, manifest: RunManifest, projection: Path, budget: Budget) -> str:
        """Check them again, reserve the schedule; the digest of the data set."""

    def spec(self, manifest: RunManifest, projection: Path) -> AdapterSpec:
        """Which coordinates the run's adapter has; reads no data."""

    def train(
        self,
        manifest: RunManifest,
        projection: Path,
        budget: Budget,
        plan: RoundPlan,
        vector: bytes | memoryview,
    ) -> tuple[Delta, str]:
        """Reserve, train and commit one attempt: its update, and the digest of its data."""
