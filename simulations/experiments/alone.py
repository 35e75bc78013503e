"""Each institution by itself, beside all of them together: what a federation gives over training
alone, on the same public test records.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fedlora.common.config.schema import Config
from fedlora.common.data.records import Records, unit_groups
from fedlora.simulations.begin import dealt, sources_of
from fedlora.simulations.experiments.methods import one_institution
from fedlora.simulations.federation.population import client_name
from fedlora.simulations.federation.public_part import choice_for


def runs(config: Config, folder: Path) -> Iterator[tuple[str, Config, pa.Table]]:
    """Name, configuration and training records: of all together, then of each institution.

    Of a configuration whose training file is Parquet. Public parts that are shares of it are files
    in `folder`, the same ones for all.
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
    one, many = one_institution(config), config.federation.clients
    names = partition.names or tuple(client_name(client) for client in range(many))
    for client in range(many):
        held = units.take(partition.units_of(client)).records
        yield names[client], one, table.take(rows[held])


def _rows(records: Records) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Where records stood in their file."""
    return np.arange(len(records)) if records.rows is None else records.rows
