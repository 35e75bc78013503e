"""A configuration's files as records: training, public validation, test and label set."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from pathlib import Path

from fedlora.common.config.schema import DataConfig
from fedlora.common.data.data_file import file_digest
from fedlora.common.data.records import Records, read_records, split_validation, unit_groups
from fedlora.common.errors import BadInput
from fedlora.common.tasks.known import task_named
from fedlora.common.tasks.overview import label_counts, listed
from fedlora.server.runs.public_data import PublicRecords, columns_of, read_labels

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Sources:
    """Records as read, before any model sees them. `digest` is the training file's."""

    train: Records
    public: PublicRecords
    digest: str


def read_sources(data: DataConfig, task: str, seed: int, more: tuple[str, ...] = ()) -> Sources:
    """Read what the [data] section names, with the columns `more` of the training file.

    `seed` draws what is a share of the training file: the test part, then the validation part of
    what is left. BadInput says which file, row and column is wrong.
    """
    for name, value in (("train", data.train), ("test", data.test)):
        if not value:
            raise BadInput(f'[data] {name} = "": expected a .jsonl, .csv or .parquet file')
    labels, public = read_labels(data, task), columns_of(data, task)
    private = replace(public, unit=data.unit, more=more)
    train = read_records(Path(data.train), private, labels)
    if train.spellings:
        log.warning("%s", train.spellings)

    def part(name: str, source: float | str, train: Records) -> tuple[Records, Records]:
        """A public file's records, or a share of the training file's units; and what is left."""
        if isinstance(source, str):
            return read_records(Path(source), public, labels), train
        kept, aside = split_validation(unit_groups(train.units, len(train)), source, seed)
        return train.take(aside, f"{train.where} ({name} part)"), train.take(kept)

    test, train = part("test", data.test, train)
    validation, train = part("validation", data.validation, train)
    for line in one_sided(train, test, labels):
        log.warning("%s", line)
    records = PublicRecords(task_named(task, labels), validation, test)
    return Sources(train, records, file_digest(Path(data.train)))


def one_sided(train: Records, test: Records, labels: Sequence[str]) -> list[str]:
    """A line for each of the two whose records never have a label that the other one's have."""
    counts = {records.where: label_counts(records, labels) for records in (train, test)}
    found = []
    for (here, mine), (there, theirs) in permutations(counts.items(), 2):
        missing = [each for each in labels if theirs.get(each) and not mine.get(each)]
        if missing and mine:
            found.append(f"{here}: never has {listed(missing)}, which {there} has")
    return found
