"""How much noise the mean of the institutions' updates has: own to each, or shared under masks.

Both are measured in sums that the product's own code makes, of updates without a gradient: own
noise as a step adds it, shared noise as the state machines of secure aggregation unmask it. σ is
that of the schedule which a run would have.

    python simulations/benchmarks/noise_of_mean.py [--json FILE] [--rounds 16]
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from fedlora.client.training.step import ClipGroups, GradientSum, private_mean
from fedlora.common.config.load import parse_config
from fedlora.common.config.parts import Terms
from fedlora.common.config.schema import FaultsConfig
from fedlora.common.manifest.manifest import Network, RunManifest
from fedlora.common.manifest.plan import RoundPlan, Update
from fedlora.common.model.state import AdapterSpec, AdapterState, TensorSpec
from fedlora.common.privacy.randomness import OsRandom
from fedlora.common.secagg.cohort import threshold
from fedlora.server.defaults.decide import decided
from fedlora.server.defaults.public_facts import PublicFacts
from fedlora.server.runs.schedule import NetworkFacts, make_manifest
from fedlora.server.secagg.sums import SecureCohort
from fedlora.simulations.engines.masked import Institutions

EPSILONS, SIZES = (1.0, 3.0, 8.0), (3, 10, 30)
SPEC = AdapterSpec((TensorSpec("head.weight", (4, 384)), TensorSpec("head.bias", (4,))))
FACTS = PublicFacts(units=60_000, classes=4)
CONFIG = """
[federation]
clients = {clients}
rounds = 30
[training]
head_rounds = 30
[privacy]
noise = "{noise}"
epsilon = {epsilon}
delta = 1e-5
[aggregation]
secure = true
minimum_cohort = {minimum}
max_colluders = 1
"""
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Row:
    """Deviations in clips over the expected units, which is what a mean gradient is counted in."""

    epsilon: float
    institutions: int
    carriers: int  # t - c
    own_sigma: float
    shared_sigma: float
    own: float
    shared: float

    @property
    def predicted(self) -> float:
        """Own over shared: √(t - c), less what the looser accountant asks for."""
        return math.sqrt(self.carriers) * self.own_sigma / self.shared_sigma

    @property
    def measured(self) -> float:
        """The same of the measured deviations."""
        return self.own / self.shared


class Still:
    """An institution whose records have no gradient."""

    def __init__(self, name: str) -> None:
        self._name = name

    def train(self, plan: RoundPlan, state: AdapterState) -> Update:
        """An update of zeros, before its noise."""
        zeros = np.zeros(state.spec.size)
        return Update(self._name, plan.manifest, plan.round, plan.attempt, zeros)


def main() -> None:
    """The table over ε and the number of institutions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=16)
    arguments = parser.parse_args()
    rows = [_row(epsilon, size, arguments.rounds) for size in SIZES for epsilon in EPSILONS]
    _print(rows)
    if arguments.json:
        table = [vars(row) | {"predicted": row.predicted, "measured": row.measured} for row in rows]
        arguments.json.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


def _row(epsilon: float, institutions: int, rounds: int) -> Row:
    own, shared = (_manifest(noise, epsilon, institutions) for noise in ("own", "shared"))
    return Row(
        epsilon,
        institutions,
        threshold(institutions) - 1,
        own.phases[0].noise_multiplier,
        shared.phases[0].noise_multiplier,
        _own(own, institutions, rounds),
        _shared(shared, institutions, rounds),
    )


def _manifest(noise: str, epsilon: float, institutions: int) -> RunManifest:
    text = CONFIG.format(
        noise=noise, epsilon=epsilon, clients=institutions, minimum=max(3, threshold(institutions))
    )
    config = decided(parse_config(text), FACTS)
    facts = NetworkFacts(
        task=config.model.task,
        labels=("a", "b", "c", "d"),
        max_length=config.model.max_length,
        network=Network.of(config.model, config.lora),
        base_digest="sha256:none",
        spec_digest=SPEC.digest,
        projection_digest="",
        moved={"head": SPEC.size},
    )
    return make_manifest(Terms.of(config), facts)


def _own(manifest: RunManifest, institutions: int, rounds: int) -> float:
    """Of the mean of so many updates, each with the noise of its step."""
    (phase,) = manifest.phases
    groups = ClipGroups.flat(SPEC, phase.clip, phase.name)
    still = GradientSum(np.zeros(SPEC.size), 0, 0)

    def mean() -> Floats:
        made = [
            private_mean(still, groups, phase.noise_multiplier, phase.expected_units, OsRandom())
            for _ in range(institutions)
        ]
        return np.asarray(np.mean(made, axis=0), dtype=np.float64)

    scale = phase.expected_units / phase.clip
    return float(np.std([mean() for _ in range(rounds)])) * scale


def _shared(manifest: RunManifest, institutions: int, rounds: int) -> float:
    """Of the mean that masked sums give."""
    names = [f"client-{number}" for number in range(institutions)]
    everybody = Institutions(names, manifest, FaultsConfig(), Still, lambda plan: names, 1.0)
    cohort, state = SecureCohort(manifest, everybody), AdapterState.zeros(SPEC)

    def mean(attempt: int) -> Floats:
        plan = RoundPlan(manifest.digest, 0, attempt, attempt, state.digest)
        found = cohort.total(plan, state)
        if found.replies != institutions:
            raise SystemExit(f"attempt {attempt}: {found.replies} replies; {found.failures}")
        return found.total / found.replies

    (phase,) = manifest.phases
    scale = phase.expected_units / (phase.clip * phase.learning_rate)
    return float(np.std([mean(1 + number) for number in range(rounds)])) * scale


def _print(rows: list[Row]) -> None:
    table = Table(
        *("ε", "institutions", "t - c", "σ own", "σ shared", "own", "shared"),
        *("√n", "predicted", "measured"),
        box=None,
    )
    for row in rows:
        table.add_row(
            f"{row.epsilon:g}",
            str(row.institutions),
            str(row.carriers),
            *(f"{each:.3f}" for each in (row.own_sigma, row.shared_sigma, row.own, row.shared)),
            f"{math.sqrt(row.institutions):.2f}",
            f"{row.predicted:.3f}",
            f"{row.measured:.3f}",
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
