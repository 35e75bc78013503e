"""Each institution by itself has its own records, and the public ones that all are scored on."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from fedlora.simulations.begin import begin
from fedlora.simulations.experiments.alone import runs
from fedlora.simulations.experiments.given import with_records
from tests.simulations.experiments.test_simulate import config, cpu, data

__all__ = ["data"]


def test_institutions_alone_have_what_each_has_in_the_federation(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    every = [{**row, "text": f"{row['text']} w{number}"} for number, row in enumerate(rows)]
    pq.write_table(pa.Table.from_pylist(every), tmp_path / "train.parquet")
    settings = config(tiny_bert, data, "none", f'data.train="{tmp_path}/train.parquet"')
    (_, whole, table), *alone = runs(settings, tmp_path / "runs")
    public = {row["text"] for row in pq.read_table(str(whole.data.validation)).to_pylist()}
    held = [{row["text"] for row in each.to_pylist()} for _, _, each in alone]
    assert sum(map(len, held)) == len(table) == len(set().union(*held))
    assert not public & set().union(*held) and len(public) + len(table) == len(every)
    for _, one, _ in alone:
        assert one.federation.clients == 1 and one.data == whole.data
    together = begin(with_records(whole, tmp_path, table), tmp_path / "together", cpu())
    assert [len(each) for each in held] == list(together.federation.partition.sizes)
    together.ledger.close()
