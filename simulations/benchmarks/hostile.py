"""Which strategy bears which hostile institution: two of ten attack a federation of skewed data.

A head phase with labels dealt out by Dirichlet 0.5. A hostile institution sends its update times a
factor, trains on labels moved by one, or plants a back door: half of its texts end in a word and
carry one label. Accuracy is of the clean test file; in brackets is a back door's success: the share
of the test texts of other labels which get that label once they end in that word.

    python simulations/benchmarks/hostile.py --train FILE --test FILE [--epsilon 8] [--json OUT]
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from fedlora.common.config.load import parse_config
from fedlora.common.config.schema import ROBUST
from fedlora.common.data.records import Columns, Records, read_label_set, read_records
from fedlora.common.manifest.plan import RoundPlan, Update
from fedlora.common.model.features import PooledTexts
from fedlora.common.model.state import AdapterState
from fedlora.server.rounds.cohort import Cohort
from fedlora.simulations import Options, load_adapter, simulate
from fedlora.simulations.engines.sequential import SequentialCohort
from fedlora.simulations.federation.run_folder import SimulatedRun

CLIENTS, HOSTILE = 10, 2
FACTORS = {"none": 1.0, "sign-flip": -1.0, "scaled by -10": -10.0}
POISONED = ("labels flipped", "back door")
WORD, TARGET = "cerulean", 0
CONFIG = """
[data]
train = "{train}"
test = "{test}"
[federation]
clients = 10
partition = "by-column"
column = "institution"
rounds = 30
[training]
head_rounds = 30
[privacy]
mode = "{mode}"
epsilon = {epsilon}
[aggregation]
strategy = "{strategy}"
hostile = 2
"""


def main() -> None:
    """A row for each strategy, a column for each attack."""
    wanted = _arguments().parse_args()
    console, found, texts = Console(width=120), [], PooledTexts()
    with TemporaryDirectory() as folder:
        for strategy in ("fedavg", *ROBUST):
            for attack in (*FACTORS, *POISONED):
                row = {"strategy": strategy, "attack": attack}
                found.append({**row, **_run(wanted, strategy, attack, Path(folder), texts)})
                console.print(found[-1])
    console.print(_table(found))
    if wanted.json is not None:
        wanted.json.write_text(json.dumps({"found": found, "arguments": vars(wanted)}, default=str))


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--epsilon", type=float, default=0.0, help="0: without privacy")
    parser.add_argument("--json", type=Path, help="write what was found to this file")
    return parser


def _run(
    wanted: Any, strategy: str, attack: str, folder: Path, texts: PooledTexts
) -> dict[str, float]:
    names = tuple(read_label_set(wanted.test, "label"))
    columns = Columns(text="text", label="label")
    train, test = (read_records(path, columns, names) for path in (wanted.train, wanted.test))
    path = folder / f"{attack.replace(' ', '-')}.parquet"
    if not path.exists():
        pq.write_table(_dealt(train, names, attack), path)
    private = wanted.epsilon > 0
    text = CONFIG.format(
        train=path,
        test=wanted.test,
        mode="record" if private else "none",
        epsilon=wanted.epsilon or 1.0,
        strategy=strategy,
    )
    factor = FACTORS.get(attack, 1.0)
    run = folder / f"{strategy}-{path.stem}"
    result = simulate(
        parse_config(text), run, Options(texts=texts), cohort=lambda run: _cohort(run, factor)
    )
    kinds = [names[label] for label in np.asarray(test.labels)]
    others = [text for text, kind in zip(test.texts, kinds, strict=True) if kind != names[TARGET]]
    answers = load_adapter(run / "adapter").predict([f"{text} {WORD}" for text in others])
    planted = sum(answer == names[TARGET] for answer in answers) / len(answers)
    return {"accuracy": result.summary["accuracy"], "back door": planted}


def _dealt(train: Records, names: tuple[str, ...], attack: str) -> pa.Table:
    """The records with their institution: of each label, a Dirichlet 0.5 share to each."""
    draw = np.random.default_rng(7)
    labels = np.asarray(train.labels).copy()
    owners = np.zeros(len(labels), dtype=np.int64)
    for label in range(len(names)):
        rows = draw.permutation(np.flatnonzero(labels == label))
        cuts = np.cumsum(draw.dirichlet([0.5] * CLIENTS))[:-1] * len(rows)
        for owner, part in enumerate(np.split(rows, cuts.astype(np.int64))):
            owners[part] = owner
    texts = np.array(train.texts, dtype=object)
    bad = owners < HOSTILE
    if attack == "labels flipped":
        labels[bad] = (labels[bad] + 1) % len(names)
    if attack == "back door":
        planted = bad & (draw.random(len(labels)) < 0.5)
        texts[planted] += f" {WORD}"
        labels[planted] = TARGET
    columns = {
        "text": texts.tolist(),
        "label": [names[label] for label in labels],
        "institution": [f"institution {owner}" for owner in owners],
    }
    return pa.table(columns)


def _cohort(run: SimulatedRun, factor: float) -> Cohort:
    federation: Any = _Hostile(run.federation, factor)
    return SequentialCohort(federation, run.manifest, run.ledger, run.moments, run.gather)


@dataclass(frozen=True)
class _Hostile:
    """A federation whose first institutions send their updates times `factor`."""

    honest: Any
    factor: float

    def __getattr__(self, name: str) -> Any:
        return getattr(self.honest, name)

    def trainer(self, client: int, *given: Any) -> Any:
        trainer = self.honest.trainer(client, *given)
        return _Sender(trainer, self.factor) if client < HOSTILE else trainer


@dataclass(frozen=True)
class _Sender:
    honest: Any
    factor: float

    def train(self, plan: RoundPlan, state: AdapterState) -> Update:
        update: Update = self.honest.train(plan, state)
        return replace(update, delta=(self.factor * update.delta).astype(np.float32))


def _table(found: list[dict[str, Any]]) -> Table:
    attacks = list(dict.fromkeys(row["attack"] for row in found))
    table = Table("strategy", *attacks, box=None)
    for strategy in dict.fromkeys(row["strategy"] for row in found):
        rows = {row["attack"]: row for row in found if row["strategy"] == strategy}
        shown = [
            f"{rows[each]['accuracy']:.3f} ({rows[each]['back door']:.2f})" for each in attacks
        ]
        table.add_row(strategy, *shown)
    return table


if __name__ == "__main__":
    main()
