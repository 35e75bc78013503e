"""A configuration's files as records: training, public validation, test and label set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fedlora.common.config.schema import Config
from fedlora.common.data.records import (
    Records,
    file_digest,
    read_records,
    split_validation,
    unit_groups,
)
from fedlora.common.data.tasks import Task
from fedlora.common.errors import BadInput
from fedlora.common.privacy.modes import guarantee_named
from fedlora.server.runs.public_data import columns_of, read_labels, task_of


@dataclass(frozen=True, eq=False)
class Sources:
    """Records as read, before any model sees them. `digest` is the training file's."""

    task: Task
    train: Records
    validation: Records
    test: Records
    digest: str


def read_sources(config: Config) -> Sources:
    """Read what the [data] section names; BadInput says which file, row and column is wrong."""
    data = config.data
    for name, value in (("train", data.train), ("test", data.test)):
        if not value:
            raise BadInput(f'[data] {name} = "": expected a .jsonl, .csv or .parquet file')
    labels = read_labels(config)
    whole = read_records(Path(data.train), columns_of(config, private=True), labels)
    test = read_records(Path(data.test), columns_of(config, private=False), labels)
    if isinstance(data.validation, str):
        train, validation = (
            whole,
            read_records(Path(data.validation), columns_of(config, private=False), labels),
        )
    else:
        kept, aside = split_validation(
            unit_groups(whole.units, len(whole)), data.validation, config.seed
        )
        train, validation = whole.take(kept), whole.take(aside, f"{whole.where} (validation part)")
    units, institutions = len(unit_groups(train.units, len(train))), config.federation.clients
    guarantee = guarantee_named(config.privacy.mode)
    guarantee.check_delta(config.privacy.delta, units, whole.where, institutions)
    return Sources(task_of(config, labels), train, validation, test, file_digest(Path(data.train)))
