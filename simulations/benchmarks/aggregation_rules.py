"""Which rule is how far from the mean of the institutions' ΔW = B·A, and what it comes to.

A head phase, then rounds in which each of five institutions (Dirichlet 0.5) makes several local
steps on LoRA. Of every such round without privacy: ‖B·A of the next adapter - mean(Bᵢ·Aᵢ)‖ over
‖mean(Bᵢ·Aᵢ)‖, of all layers together (Frobenius); the worst round is shown. Accuracy is that of
LoRA's best round by validation, on test records, without privacy and at ε. FedEx-LoRA is no rule of
a run: its row says which rank an adapter would have to gain to carry its residual of one of
FedAvg's rounds to 1e-5.

    python simulations/benchmarks/aggregation_rules.py --train FILE --test FILE [--epsilon 8]
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from fedlora.common.config.load import parse_config
from fedlora.common.data.records import read_label_set
from fedlora.common.manifest.plan import RoundPlan, Update
from fedlora.common.model.features import PooledTexts
from fedlora.common.model.state import AdapterState
from fedlora.common.privacy.modes import guarantee_of
from fedlora.server.rounds.cohort import CohortSum, Failure
from fedlora.server.strategies.strategy import ServerState
from fedlora.simulations import Options, simulate
from fedlora.simulations.engines.sequential import SequentialCohort
from fedlora.simulations.federation.run_folder import SimulatedRun

Floats = npt.NDArray[np.float64]
RULES = {
    "fedavg": "",
    "ffa": '[lora]\nvariant = "ffa"',
    "rolora": '[lora]\nvariant = "rolora"',
    "flexlora": '[aggregation]\nstrategy = "flexlora"',
}
OPEN = 'mode = "none"\n[server]\nwarmup = 0.0\ndecay = "none"'  # a step is the mean itself
CONFIG = """
[model]
max_length = 32
[data]
train = "{train}"
test = "{test}"
labels = {labels}
validation = 0.1
[federation]
clients = 5
rounds = {rounds}
spare_rounds = 0
evaluate_every = 2
[training]
{local}
head_rounds = 20
carry_optimizer = false
{rule}
[privacy]
{privacy}
"""
ADAMW = 'optimizer = "adamw"\nsteps = 4\nsampling_rate = 0.06\nlearning_rate = 2e-3'
SGD = "steps = 2\nsampling_rate = 0.1"  # at rates that the rules choose
EXACT = 1e-5


@dataclass
class Watched(SequentialCohort):
    """The in-process engine; `errors` has one of each round that moved LoRA."""

    run: SimulatedRun
    errors: list[float] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)  # that carry what FedAvg's round is off by
    _updates: list[npt.NDArray[Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        run = self.run
        super().__init__(run.federation, run.manifest, run.ledger, run.moments, run.gather)

    def total(self, plan: RoundPlan, state: AdapterState) -> CohortSum:
        """As ever, and noted."""
        self._updates.clear()
        found = super().total(plan, state)
        manifest = self.run.manifest
        private = guarantee_of(manifest).private
        if manifest.phases[plan.phase].name != "head" and not private:
            after, _ = self.run.strategies[plan.phase].apply(
                state, ServerState(), found.total / found.replies
            )
            self._note(state, after)
        return found

    def _answer(
        self, client: int, plan: RoundPlan, state: AdapterState, size: int
    ) -> Update | Failure:
        answer = super()._answer(client, plan, state, size)
        if isinstance(answer, Update):
            self._updates.append(answer.delta.astype(np.float64))
        return answer

    def _note(self, state: AdapterState, after: AdapterState) -> None:
        frozen = {
            name.removeprefix("backbone.").replace(".default.", "."): value.detach().numpy()
            for name, value in self.run.public.model.network.named_parameters()
            if ".lora_A." in name
        }
        each = [list(_products(state, state.vector + one, frozen)) for one in self._updates]
        off, size, ranks = 0.0, 0.0, []
        for layer, product in enumerate(_products(after, after.vector, frozen)):
            mean = np.mean([products[layer] for products in each], axis=0)
            values = np.linalg.svd(product - mean, compute_uv=False)
            rest = np.sqrt(np.cumsum(values[::-1] ** 2))[::-1]  # without the first k
            ranks.append(int(np.sum(rest > EXACT * np.linalg.norm(mean))))
            off += float(np.sum(values**2))
            size += float(np.sum(mean**2))
        self.errors.append(math.sqrt(off / size))
        self.ranks.append(max(ranks))


def _products(
    state: AdapterState, vector: npt.NDArray[np.floating], frozen: dict[str, Any]
) -> Iterator[Floats]:
    """B·A of each layer; an A that is not in the vector is the network's own."""
    named: dict[str, Any] = dict(frozen)
    for tensor, place in state.spec.slices():
        named[tensor.name] = vector[place].reshape(tensor.shape).astype(np.float64)
    for name in sorted(named):
        if ".lora_B." in name:
            yield named[name] @ named[name.replace(".lora_B.", ".lora_A.")].astype(np.float64)


def main() -> None:
    """A row for each rule."""
    wanted = _arguments().parse_args()
    console, found, texts = Console(width=120), [], PooledTexts()
    labels = list(read_label_set(wanted.test, "label"))
    with TemporaryDirectory() as name:
        folder = Path(name)
        for part, count in (("train", wanted.records), ("test", wanted.tested)):
            table = pq.read_table(getattr(wanted, part))
            rows = np.random.default_rng(7).permutation(len(table))[:count]
            pq.write_table(table.take(rows), folder / f"{part}.parquet")
        for rule in RULES:
            found.append({"rule": rule, **_run(rule, 0.0, folder, labels, texts)})
            if wanted.epsilon:
                private = _run(rule, wanted.epsilon, folder, labels, texts)
                found[-1] |= {f"private {key}": value for key, value in private.items()}
            console.print(found[-1])
    console.print(_table(found, wanted.epsilon))
    if wanted.json is not None:
        wanted.json.write_text(json.dumps({"found": found, "arguments": vars(wanted)}, default=str))


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--records", type=int, default=1_500, help="of the training file")
    parser.add_argument("--tested", type=int, default=400, help="of the test file")
    parser.add_argument("--epsilon", type=float, default=8.0, help="0: without privacy alone")
    parser.add_argument("--json", type=Path, help="write what was found to this file")
    return parser


def _run(
    rule: str, epsilon: float, folder: Path, labels: list[str], texts: PooledTexts
) -> dict[str, Any]:
    """Twenty rounds of the head, then LoRA: six rounds of AdamW, or eight of private SGD."""
    text = CONFIG.format(
        train=folder / "train.parquet",
        test=folder / "test.parquet",
        labels=json.dumps(labels),
        rule=RULES[rule],
        rounds=28 if epsilon else 26,
        local=SGD if epsilon else ADAMW,
        privacy=f"epsilon = {epsilon}" if epsilon else OPEN,
    )
    watched: list[Watched] = []

    def cohort(run: SimulatedRun) -> Watched:
        watched.append(Watched(run))
        return watched[0]

    options = Options(texts=texts, device="cpu")
    result = simulate(parse_config(text), folder / f"{rule}-{epsilon:g}", options, cohort=cohort)
    head, lora = (phase["test"]["accuracy"] for phase in result.summary["phases"])
    return {
        "head": head,
        "lora": lora,
        "errors": watched[0].errors,
        "ranks": watched[0].ranks,
        "epsilon": result.epsilon,
    }


def _table(found: list[dict[str, Any]], epsilon: float) -> Table:
    titles = ("rule", "off the mean ΔW", "rank to carry it", "head", "then LoRA")
    table = Table(
        *titles, *(("head, private", f"LoRA at ε = {epsilon:g}") if epsilon else ()), box=None
    )
    for row in found:
        scores = [f"{row['head']:.3f}", f"{row['lora']:.3f}"]
        if epsilon:
            scores += [f"{row['private head']:.3f}", f"{row['private lora']:.3f}"]
        table.add_row(row["rule"], f"{max(row['errors']):.1e}", str(max(row["ranks"])), *scores)
    fedavg = found[0]
    table.add_row(
        "fedex", "0 by definition", f"{max(fedavg['ranks'])} a round", *["not built"] * len(scores)
    )
    return table


if __name__ == "__main__":
    main()
