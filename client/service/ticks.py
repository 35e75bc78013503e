"""When an answer leaves that data were touched for: at a public tick, however long it took.

How long a step takes says how many records were drawn, and how long they are, which no noise
covers. So such an answer, whatever it says, leaves `every` seconds after its request was taken up,
or 2, 4, 8 … times as many: the first of these that its work did not outlast, and in a run never an
earlier one than before for work of the same kind. What is left is on which side of a tick the work
ended: once for each doubling in a run, and not once for each answer.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from fedlora.client.node.policy import Policy
from fedlora.client.service.work import Work
from fedlora.common.ledger.ledger import Budget
from fedlora.common.manifest.manifest import RunManifest
from fedlora.common.manifest.plan import Delta, RoundPlan
from fedlora.common.model.state import AdapterSpec

MOST_RUNS = 64  # whose ticks are remembered
Touched = tuple[str, str]  # the run, and what was done for it


class Watched(Work):
    """Does what `work` does, and notes for which run data were in sight, and for what."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._touched: Touched | None = None

    def taken(self) -> Touched | None:
        """What touched data since this was asked last; None where nothing did."""
        found, self._touched = self._touched, None
        return found

    def adopt(self, policy: Policy) -> None:
        self._work.adopt(policy)

    def check(self, manifest: RunManifest, projection: Path, budget: Budget) -> None:
        self._touched = (manifest.digest, "check")
        self._work.check(manifest, projection, budget)

    def consent(self, manifest: RunManifest, projection: Path, budget: Budget) -> str:
        self._touched = (manifest.digest, "consent")
        return self._work.consent(manifest, projection, budget)

    def spec(self, manifest: RunManifest, projection: Path) -> AdapterSpec:
        self._touched = (manifest.digest, "train")  # which follows
        return self._work.spec(manifest, projection)

    def train(
        self,
        manifest: RunManifest,
        projection: Path,
        budget: Budget,
        plan: RoundPlan,
        vector: bytes,
    ) -> tuple[Delta, str]:
        self._touched = (manifest.digest, "train")
        return self._work.train(manifest, projection, budget, plan, vector)


@dataclass(eq=False)
class Ticks:
    """The ticks of one trainer; `every` is in seconds, as are `now` and `sleep`."""

    every: float
    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    _last: dict[Touched, float] = field(default_factory=dict)

    def wait(self, touched: Touched | None, began: float) -> None:
        """Return at the tick of an answer whose request was taken up at `began`."""
        if touched is None:
            return
        tick = self._last.pop(touched, self.every)
        while (left := began + tick - self.now()) < 0:
            tick *= 2
        self._last[touched] = tick  # the newest last
        for old in list(self._last)[:-MOST_RUNS]:
            del self._last[old]
        self.sleep(left)
