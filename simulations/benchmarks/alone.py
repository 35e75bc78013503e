"""Each institution by itself at the whole ε, beside all of them together: what a federation gives.

The institutions of a configuration are dealt out as its run deals them; then each trains alone on
its records, and is scored on the same public test records as all are. What the configuration says
of one institution holds for each; what it leaves open, the rules choose for each by itself.

    python simulations/benchmarks/alone.py CONFIG --out FOLDER [--set KEY=VALUE …] [--json OUT]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fedlora.common.config.load import load_config
from fedlora.common.config.schema import AggregationConfig, Config, FaultsConfig
from fedlora.common.data.records import Records, unit_groups
from fedlora.common.model.features import PooledTexts
from fedlora.simulations.begin import Options, dealt, sources_of
from fedlora.simulations.experiments.simulate import simulate
from fedlora.simulations.federation.population import client_name
from fedlora.simulations.federation.public_part import choice_for


def main() -> None:
    """Print a line for each institution, and one for all together."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("config", type=Path, help="of a Parquet training file")
    parser.add_argument("--out", type=Path, required=True, help="a folder for the runs")
    parser.add_argument("--set", action="append", default=[], help="section.key=VALUE")
    parser.add_argument("--json", type=Path, help="write what was found to this file")
    wanted = parser.parse_args()
    config = load_config(wanted.config, wanted.set)
    options = Options(device="cpu", texts=PooledTexts())
    found = {
        name: simulate(settings, wanted.out / name, options, train=table).summary
        for name, settings, table in runs(config, wanted.out)
    }
    measure = "accuracy" if "accuracy" in found["together"] else "loss"
    alone = [found[name][measure] for name in found if name != "together"]
    for name, summary in found.items():
        print(f"{name}: {summary[measure]:.4f}, ε {summary['epsilon'] or 'none'}")
    print(f"alone, mean: {fmean(alone):.4f}, from {min(alone):.4f} to {max(alone):.4f}")
    if wanted.json is not None:
        kept = {name: {measure: each[measure]} for name, each in found.items()}
        wanted.json.write_text(json.dumps(kept, indent=2))


def runs(config: Config, folder: Path) -> Iterator[tuple[str, Config, pa.Table]]:
    """Name, configuration and training records: of all together, then of each institution.

    Public parts that are shares of the training file are files here, the same ones for all.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sources = sources_of(config, choice_for(config.data, folder))
    table = pq.read_table(config.data.train)
    paths: dict[str, Any] = {}
    for name in ("validation", "test"):
        if not isinstance(getattr(config.data, name), str):
            path = folder / f"{name}.parquet"
            pq.write_table(table.take(_rows(getattr(sources.public, name))), path)
            paths[name] = str(path)
    config, rows = replace(config, data=replace(config.data, **paths)), _rows(sources.train)
    units = unit_groups(sources.train.units, len(sources.train))
    partition = dealt(config, sources.train, units)
    yield "together", config, table.take(rows)
    one = replace(
        config,
        federation=replace(
            config.federation, clients=1, participation=1.0, partition="iid", column=""
        ),
        aggregation=AggregationConfig(),
        privacy=replace(config.privacy, noise="own"),
        faults=FaultsConfig(),
    )
    many = config.federation.clients
    names = partition.names or tuple(client_name(client) for client in range(many))
    for client in range(many):
        held = units.take(partition.units_of(client)).records
        yield names[client], one, table.take(rows[held])


def _rows(records: Records) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Where records stood in their file."""
    return np.arange(len(records)) if records.rows is None else records.rows


if __name__ == "__main__":
    main()
