"""A data set as its policy describes it: read, tokenised, and held against the policy's δ."""

from __future__ import annotations

from pathlib import Path

from fedlora.client.node.folder import NodeFolder
from fedlora.client.node.policy import DataPolicy, Policy
from fedlora.common.config.schema import check_delta
from fedlora.common.data.records import Columns, Records, read_records, unit_groups
from fedlora.common.data.tasks import task_named
from fedlora.common.model.tokenizer import load_tokenizer


def check_data(folder: NodeFolder, policy: Policy, name: str) -> tuple[Records, int]:
    """Records and number of units of a data set, read and tokenised for each base as a run does it.

    BadInput names the row.
    """
    data = policy.data[name]
    records = read_data(data, folder.under(data.path))
    units = len(unit_groups(records.units, len(records)))
    check_delta(policy.limits.delta, units, f"{records.where}, by [limits] delta:")
    task = task_named(data.task, data.labels)
    for base in policy.bases.values():
        task.encode(records, load_tokenizer(folder.base(base)), policy.limits.max_length)
    return records, units


def read_data(data: DataPolicy, path: Path) -> Records:
    """A data set as its policy describes it; a link out of the policy's folder is refused."""
    causal = data.task == "causal-lm"
    columns = Columns(
        text=data.text,
        response=data.response if causal else "",
        label="" if causal else data.label,
        unit=data.unit,
    )
    return read_records(path, columns, data.labels, root=path.parent)
