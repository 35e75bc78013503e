"""A configuration's files as records: training, public validation, test and label set."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from pathlib import Path

from fedlora.common.config.schema import DataConfig
from fedlora.common.config.toml import shown
from fedlora.common.data.data_file import origin_of
from fedlora.common.data.origin import Origin
from fedlora.common.data.records import Records, read_records
from fedlora.common.data.unit_names import spelled_once
from fedlora.common.errors import BadInput
from fedlora.common.tasks.known import task_named
from fedlora.common.tasks.overview import label_counts, listed
from fedlora.server.runs.public_data import PublicRecords, columns_of, named_sources, read_labels
from fedlora.simulations.federation.public_part import Choose, set_aside

log = logging.getLogger(__name__)

# how many they are would be a figure of the training records
SHARED = (
    "Some texts of the [data] {part} file, which was named as public, are training records as well:"
    " of them ε says nothing."
)


@dataclass(frozen=True, eq=False)
class Sources:
    """Records as read, before any model sees them. `origin` is the training file's.

    `shared` are the public parts that a run learns from or chooses by, and that have texts of
    training records too.
    """

    train: Records
    public: PublicRecords
    origin: Origin
    shared: tuple[str, ...] = ()

    @property
    def caveats(self) -> tuple[str, ...]:
        """Sentences that a privacy statement must end with."""
        return tuple(SHARED.format(part=part) for part in self.shared)


def read_sources(
    data: DataConfig, task: str, choose: Choose, more: tuple[str, ...] = ()
) -> Sources:
    """Read what the [data] section names, with the columns `more` of the training file.

    `choose` says what is public where a part is a share of the training file. BadInput says which
    file, row and column is wrong, or that a file named as public holds the training records.
    """
    for name, value in (("train", data.train), ("test", data.test)):
        if not value:
            raise BadInput(f'[data] {name} = "": expected a .jsonl, .csv or .parquet file')
    named_sources(data)
    labels, public = read_labels(data, task), columns_of(data, task)
    private = replace(public, unit=data.unit, more=more)
    train = whole = read_records(Path(data.train), private, labels)
    if train.spellings:
        log.warning("%s", train.spellings)
    shared: list[str] = []

    def part(name: str, source: float | str, train: Records) -> tuple[Records, Records]:
        """A public file's records, or a share of the training file's units; and what is left."""
        if not isinstance(source, str):
            return set_aside(train, name, source, choose)
        records = read_records(Path(source), public, labels)
        if _some_private(records, name, source, whole) and name != "test":
            shared.append(name)
        return records, train

    test, train = part("test", data.test, train)
    validation, train = part("validation", data.validation, train)
    for line in one_sided(train, test, labels):
        log.warning("%s", line)
    texts = part("public", data.public, train)[0] if data.public else None
    records = PublicRecords(task_named(task, labels), validation, test, texts)
    return Sources(train, records, origin_of(Path(data.train)), tuple(shared))


def one_sided(train: Records, test: Records, labels: Sequence[str]) -> list[str]:
    """A line for each of the two whose records never have a label that the other one's have."""
    counts = {records.where: label_counts(records, labels) for records in (train, test)}
    found = []
    for (here, mine), (there, theirs) in permutations(counts.items(), 2):
        missing = [each for each in labels if theirs.get(each) and not mine.get(each)]
        if missing and mine:
            found.append(f"{here}: never has {listed(missing)}, which {there} has")
    return found


def _some_private(records: Records, name: str, source: str, train: Records) -> bool:
    """Whether a file named as public has words of the training file too; how many is in the log.

    BadInput where it holds nothing else, whatever its name, format, order or spelling.
    """
    private = set(spelled_once(train))
    both = sum(each in private for each in spelled_once(records))
    if both == len(records):
        raise BadInput(
            f"[data] {name} = {shown(source)}: found only texts of {train.where}, the training"
            " file, expected public ones"
        )
    if both:
        found = (records.where, both, len(records), train.where)
        log.info("%s: %d of its %d texts are in %s too", *found)
    return both > 0
