"""When an answer leaves that data were touched for: at a public tick, however long it took.

How long a step takes says how many records were drawn, and how long they are, which no noise
covers. So such an answer, whatever it says, leaves `every` seconds after its request was taken up,
or 2, 4, 8 … times as many: the first of these that its work did not outlast, and in a run never an
earlier one than before for work of the same kind, which the run's folder keeps. What is left is on
which side of a tick the work ended: once for each doubling in a run, and not once for each answer.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from fedlora.client.node.policy import Policy
from fedlora.client.service.work import Work
from fedlora.common.codec.strict import from_canonical, to_canonical
from fedlora.common.disk.files import read_bytes, write_atomically
from fedlora.common.errors import BadInput
from fedlora.common.ledger.ledger import Budget
from fedlora.common.manifest.manifest import RunManifest
from fedlora.common.manifest.plan import Delta, RoundPlan
from fedlora.common.model.state import AdapterSpec

log = logging.getLogger(__name__)

TICKS = "ticks.json"  # in a run's folder
CHECK, CONSENT, TRAIN = "check", "consent", "train"  # the kinds of work
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

    def in_sight(self, manifest: RunManifest, kind: str) -> None:
        """Note that data are about to be touched, by whomever: looking for marks is enough."""
        self._touched = (manifest.digest, kind)

    def adopt(self, policy: Policy) -> None:
        self._work.adopt(policy)

    def check(self, manifest: RunManifest, projection: Path, budget: Budget) -> None:
        self.in_sight(manifest, CHECK)
        self._work.check(manifest, projection, budget)

    def consent(self, manifest: RunManifest, projection: Path, budget: Budget) -> str:
        self.in_sight(manifest, CONSENT)
        return self._work.consent(manifest, projection, budget)

    def spec(self, manifest: RunManifest, projection: Path) -> AdapterSpec:
        self.in_sight(manifest, TRAIN)  # which follows
        return self._work.spec(manifest, projection)

    def train(
        self,
        manifest: RunManifest,
        projection: Path,
        budget: Budget,
        plan: RoundPlan,
        vector: bytes | memoryview,
    ) -> tuple[Delta, str]:
        self.in_sight(manifest, TRAIN)
        return self._work.train(manifest, projection, budget, plan, vector)


@dataclass(frozen=True)
class _Kept:
    """The last tick of a run, in seconds, for each kind of work; 0 where there was none."""

    check: float = 0.0
    consent: float = 0.0
    train: float = 0.0


@dataclass(frozen=True)
class Ticks:
    """The ticks of one trainer; `every` is in seconds, as are `now` and `sleep`.

    `place` is a run's folder, by its manifest's digest. A run that has none yet, or none any more,
    is a new one: a federation may offer so many a day.
    """

    every: float
    place: Callable[[str], Path]
    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep

    def wait(self, touched: Touched | None, began: float) -> None:
        """Return at the tick of an answer whose request was taken up at `began`.

        Where that can't be kept, BadInput or OSError, at a tick too.
        """
        if touched is None:
            return
        manifest, kind = touched
        try:
            tick = self._tick(self.place(manifest) / TICKS, kind, began)
        except (BadInput, OSError) as error:
            log.error("an answer does not leave: %s", error)
            self._until(began + self._first(0.0, began))
            raise
        self._until(began + tick)

    def _until(self, end: float) -> None:
        self.sleep(max(0.0, end - self.now()))

    def _tick(self, path: Path, kind: str, began: float) -> float:
        """The answer's tick, on disk before it is waited for."""
        kept = _read(path)
        while (tick := self._first(getattr(kept, kind), began)) > getattr(kept, kind):
            kept = replace(kept, **{kind: tick})
            if path.parent.is_dir():
                write_atomically(path, to_canonical(kept), mode=0o600)
        return tick

    def _first(self, least: float, began: float) -> float:
        """The first tick of `least` seconds or more that is not over."""
        tick = self.every
        while tick < least or began + tick < self.now():
            tick *= 2
        return tick


def _read(path: Path) -> _Kept:
    """What a run's folder keeps; BadInput where it is nothing that was kept."""
    if not path.exists():
        return _Kept()
    kept = from_canonical(_Kept, read_bytes(path), str(path))
    for name, seconds in vars(kept).items():
        if seconds < 0:
            raise BadInput(f"{path} {name}: found {seconds}, expected seconds, at least 0")
    return kept
