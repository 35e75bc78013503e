"""What a client costs when there are many.

Memory, start-up and CPU time with 100, 1,000 and 10,000 clients. Each size runs in a fresh process:
clients of 32 AG News records, a cohort of about 20 by Poisson participation, record-level privacy
with a ledger.

    python simulations/benchmarks/scale.py [--json FILE] [--rounds 6]
"""

from __future__ import annotations

import time

STARTED = time.perf_counter()

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from fedlora.common.config.load import parse_config
from fedlora.server.runs.run import conduct
from fedlora.server.runs.summary import peak_rss_bytes
from fedlora.simulations.begin import begin
from fedlora.simulations.benchmarks.fresh_process import in_a_fresh_process
from fedlora.simulations.engines.sequential import sequential
from fedlora.simulations.federation.partition import Partition
from fedlora.simulations.options import Options

SIZES = (100, 1_000, 10_000)
RECORDS, COHORT = 32, 20
CONFIG = """
[model]
max_length = 64
pooling = "mean"
[lora]
rank = 4
targets = ["query", "value"]
layers = [5]
[data]
train = "../shared/data/ag_news/train.parquet"
test = "../shared/data/ag_news/test.parquet"
validation = 0.003
labels = ["0", "1", "2", "3"]
[federation]
clients = {clients}
partition = "iid"
rounds = {rounds}
participation = {participation}
evaluate_every = 100000
[training]
head_rounds = 0
steps = 1
sampling_rate = 0.5
expected_units = 16
optimizer = "adamw"
learning_rate = 1e-3
precision = "fp32"
attention = "sdpa"
[privacy]
epsilon = 8.0
delta = 1e-6
clip = 1.0
[server]
decay = "none"
"""


def main() -> None:
    """A federation of each size in a process of its own, or with --only one, here."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--only", type=int)
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(_measure(arguments.only, arguments.rounds)))
        return
    figures = [
        in_a_fresh_process(__file__, "--only", size, "--rounds", arguments.rounds) for size in SIZES
    ]
    _print(figures)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def _measure(clients: int, rounds: int) -> dict[str, Any]:
    torch.set_num_threads(1)  # CPU time, not waiting for another core
    config = parse_config(
        CONFIG.format(clients=clients, rounds=rounds, participation=COHORT / clients)
    )
    with TemporaryDirectory() as folder:
        run = begin(config, Path(folder), Options(device="cpu"))
        run.federation.partition = _many(len(run.federation.units), clients, config.seed)
        start = time.perf_counter() - STARTED
        before, replies = time.process_time(), []
        conduct(run, sequential(run))
        spent = time.process_time() - before
        lines = (run.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        replies = [json.loads(line)["replies"] for line in lines]
    return {
        "clients": clients,
        "peak_rss_bytes": peak_rss_bytes(),
        "start_seconds": start,
        "seconds_per_client_round": spent / sum(replies),
        "client_rounds": sum(replies),
    }


def _many(units: int, clients: int, seed: int) -> Partition:
    """More clients than there are records for: each holds 32 drawn from all, so clients overlap."""
    drawn = np.random.default_rng(seed).integers(0, units, clients * RECORDS)
    return Partition(np.arange(clients + 1, dtype=np.int64) * RECORDS, drawn.astype(np.int64))


def _print(figures: list[dict[str, Any]]) -> None:
    table = Table(
        "clients", "peak MB", "start s", "CPU s a client-round", "to 100 clients", box=None
    )
    for row in figures:
        table.add_row(
            f"{row['clients']:,}",
            f"{row['peak_rss_bytes'] / 1e6:.0f}",
            f"{row['start_seconds']:.1f}",
            f"{row['seconds_per_client_round']:.4f}",
            f"memory {row['peak_rss_bytes'] / figures[0]['peak_rss_bytes']:.2f}, "
            f"time {row['seconds_per_client_round'] / figures[0]['seconds_per_client_round']:.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
