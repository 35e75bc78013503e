"""A configuration's files as records: training, public validation, public test, and the public label set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fedlora.common.config import Config, check_delta
from fedlora.common.data import (
    Columns,
    Records,
    file_digest,
    read_label_set,
    read_records,
    split_validation,
    unit_groups,
)
from fedlora.common.errors import BadInput
from fedlora.common.tasks import CausalLanguageModel, SequenceClassification, Task


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
    classes = config.model.task == "sequence-classification"
    labels = (data.labels or read_label_set(Path(data.test), data.label)) if classes else ()
    whole = read_records(Path(data.train), _columns(config, private=True), labels)
    test = read_records(Path(data.test), _columns(config, private=False), labels)
    if isinstance(data.validation, str):
        train, validation = (
            whole,
            read_records(Path(data.validation), _columns(config, private=False), labels),
        )
    else:
        kept, aside = split_validation(unit_groups(whole.units, len(whole)), data.validation, config.seed)
        train, validation = whole.take(kept), whole.take(aside, f"{whole.where} (validation part)")
    if config.privacy.mode == "record":
        check_delta(config.privacy.delta, len(unit_groups(train.units, len(train))), whole.where)
    task: Task = SequenceClassification(tuple(labels)) if classes else CausalLanguageModel()
    return Sources(task, train, validation, test, file_digest(Path(data.train)))


def _columns(config: Config, private: bool) -> Columns:
    """The columns to read; only the training file must name units and institutions."""
    data, federation = config.data, config.federation
    causal = config.model.task == "causal-lm"
    return Columns(
        text=(data.prompt or data.text) if causal else data.text,
        response=data.response if causal else "",
        label="" if causal else data.label,
        unit=data.unit if private else "",
        more=(federation.column,) if private and federation.partition == "by-column" else (),
    )
