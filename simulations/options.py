"""How a run is carried out, and the parts of it that are the researcher's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fedlora.common.errors import BadInput
from fedlora.common.manifest.manifest import RunManifest
from fedlora.common.model.features import PooledTexts
from fedlora.server.rounds.cohort import Cohort
from fedlora.server.strategies.strategy import Strategy
from fedlora.simulations.federation.partition import Owners
from fedlora.simulations.federation.record_loss import OWN_LOSS, RecordLoss
from fedlora.simulations.federation.run_folder import SimulatedRun

MOST_THREADS = 1024
EXPECTED = {
    "strategy": "an object with a method apply",
    "partition": "a function",
    "cohort": "a function",
    "loss": "a function",
}
COHORT = (
    "The cohort is the researcher's own ({name}): ε covers what the trainers of the federation"
    " released, and nothing that came from elsewhere."
)


@dataclass(frozen=True, eq=False)
class Options:
    """How a run is carried out: neither what it learns nor what it guarantees depends on it."""

    engine: str = "sequential"  # or "ray"
    device: str = "auto"  # cpu, cuda, or auto: a GPU where there is one
    threads: int = 0  # CPU threads; 0 leaves the choice to torch
    resume: bool = False  # go on with the run in the folder
    ledger: Path | None = None  # shared between runs; None: the run's own
    gpu_share: float = 0.0  # of each worker on Ray, where it computes on GPUs; 0: chosen
    texts: PooledTexts | None = None  # features that runs of this process have in common

    def __post_init__(self) -> None:
        """BadInput where there can be no such number of threads."""
        if not isinstance(self.threads, int) or not 0 <= self.threads <= MOST_THREADS:
            raise BadInput(f"threads: found {self.threads!r:.100}, expected 0 to {MOST_THREADS}")


@dataclass(frozen=True, eq=False)
class Own:
    """Parts of the researcher's own, each instead of the configured one.

    A strategy sees nothing but means, so that it costs no privacy. A partition names the client of
    each unit. A cohort asks whom it likes; ε covers what it gets from the federation's trainers. A
    loss is of each record by itself, or refused.
    """

    strategy: Strategy | None = None
    partition: Owners | None = None
    cohort: Callable[[SimulatedRun], Cohort] | None = None
    loss: RecordLoss | None = None

    def __post_init__(self) -> None:
        """BadInput before anything is charged where a part is not what is called."""
        faults = [
            f"{name}: found {part!r:.100}, expected {EXPECTED[name]} of one's own"
            for name, part in vars(self).items()
            if part is not None and not _is_one(name, part)
        ]
        if faults:
            raise BadInput(faults)

    @property
    def names(self) -> dict[str, str]:
        """Of those that are there."""
        given = {name: part for name, part in vars(self).items() if part is not None}
        named = {name: getattr(part, "__name__", "") for name, part in given.items()}
        return {name: named[name] or type(part).__name__ for name, part in given.items()}

    @property
    def caveats(self) -> tuple[str, ...]:
        """Sentences that a privacy statement must end with."""
        said = {"cohort": COHORT, "loss": OWN_LOSS}
        names = self.names
        return tuple(text.format(name=names[part]) for part, text in said.items() if part in names)

    def strategies(self, manifest: RunManifest) -> tuple[Strategy, ...]:
        """One for each phase, or none."""
        return () if self.strategy is None else (self.strategy,) * len(manifest.phases)


def _is_one(name: str, part: object) -> bool:
    """Whether it can be called; of a strategy, the object and not its class."""
    if name == "strategy":
        return callable(getattr(part, "apply", None)) and not isinstance(part, type)
    return callable(part)


NOTHING_OWN, DEFAULTS = Own(), Options()
