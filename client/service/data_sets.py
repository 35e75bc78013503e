"""A data set as its policy describes it: read, tokenised, and held against the policy's δ."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fedlora.client.node.folder import NodeFolder
from fedlora.client.node.policy import DataPolicy, Policy
from fedlora.common.config.schema import check_delta
from fedlora.common.data.data_file import named_data
from fedlora.common.data.records import Records, read_records, unit_groups
from fedlora.common.model.inputs import load_reader
from fedlora.common.tasks.known import task_kind, task_named
from fedlora.common.tasks.overview import overview
from fedlora.common.tasks.texts import TextTask, as_pooled


def check_data(folder: NodeFolder, policy: Policy, name: str) -> tuple[Records, int, list[str]]:
    """Records and number of units of a data set, read and tokenised for each base as a run does it.

    And what was understood of it, in lines for its owner. BadInput names the row.
    """
    data = policy.data[name]
    path = named_data(str(folder.under(data.path)), f"{folder.policy.name} [data.{name}] path")
    records = read_data(data, path)
    units = len(unit_groups(records.units, len(records)))
    check_delta(policy.limits.delta, units, f"{records.where}, by [limits] delta:")
    task, most, told = task_named(data.task, data.label_set), policy.limits.max_length, [""]
    if len(data.text) > 1 and isinstance(task, TextTask):
        task = as_pooled(task, "pairs")  # as runs are told to where they say nothing else
    for base in policy.bases.values():
        reader = load_reader(folder.base(base), task.medium, most)
        encoded = task.encode(records, reader, most)
        told = list(overview(records, encoded, task.labels, most))
    return records, units, told


def read_data(data: DataPolicy, path: Path) -> Records:
    """A data set as its policy describes it; a link out of the policy's folder is refused."""
    more = (data.group,) if data.group else ()
    columns = replace(task_kind(data.task).columns(data), unit=data.unit, more=more)
    return read_records(path, columns, data.label_set, root=path.parent)
