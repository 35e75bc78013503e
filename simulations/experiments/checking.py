"""What was understood of a configuration and its records, before anything is loaded or spent."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console, ConsoleOptions
from rich.table import Table as Printed
from rich.text import Text

from fedlora.common.config.schema import Config, ModelConfig, open_fields
from fedlora.common.data.records import unit_groups
from fedlora.common.model.base import check_base, resolve_base
from fedlora.common.model.inputs import load_reader
from fedlora.common.tasks.overview import overview
from fedlora.common.tasks.texts import as_pooled
from fedlora.common.terminal import printable
from fedlora.simulations.begin import checked, dealt, sources_of
from fedlora.simulations.chosen import decided_for, taken_as_public
from fedlora.simulations.experiments.given import Table, with_records
from fedlora.simulations.experiments.progress import as_printed
from fedlora.simulations.federation.public_part import choice_for
from fedlora.simulations.federation.sources import Sources, one_sided


@dataclass(frozen=True)
class Check:
    """A configuration that a run can begin with. Printed, it is a few lines."""

    config: Config  # with a value in every place
    chosen: tuple[str, ...]  # fields that rules chose
    records: int  # of the training part
    units: int  # of privacy
    validation: int  # public records
    test: int
    labels: tuple[str, ...]
    institutions: tuple[int, ...]  # units of each
    notes: tuple[str, ...]  # what its owner should know of the records; what counts as public
    overview: tuple[str, ...]  # of each part as a run would read it, samples too: for its owner

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[Printed | Text]:
        sizes, printed = sorted(self.institutions), Printed(show_header=False, box=None)
        printed.add_row("training", f"{self.records:,} records, {self.units:,} units of privacy")
        spread = f"{sizes[0]:,} to {sizes[-1]:,} units" if sizes else "none"
        printed.add_row("institutions", f"{len(sizes):,}, {spread} each")
        printed.add_row("public", f"{self.validation:,} validation, {self.test:,} test records")
        if self.labels:
            shown = ", ".join(self.labels[:8]) + (", …" if len(self.labels) > 8 else "")
            printed.add_row("labels", Text(printable(f"{len(self.labels):,}: {shown}")))
        for path in self.chosen:
            section, field = path.split(".")
            printed.add_row("chosen", f"{path} = {getattr(getattr(self.config, section), field)}")
        for note in self.notes:
            printed.add_row("note", Text(printable(note)))
        yield printed
        for line in self.overview:
            yield Text(printable(line))

    def __str__(self) -> str:
        return as_printed(self)


def check(config: Config, *, train: Table | None = None, test: Table | None = None) -> Check:
    """Read the records, choose what is open, deal out: no weight is loaded, nothing charged.

    `train` and `test` are records given instead of files. BadInput lists what is wrong with the
    configuration, or names file, row and column of a record.
    """
    asked = checked(config)
    with TemporaryDirectory() as folder:
        given = with_records(asked, Path(folder), train, test)
        sources = sources_of(given, choice_for(given.data, Path(folder)))
    chosen, config = open_fields(asked), decided_for(given, sources)
    base = resolve_base(config.model.base)
    check_base(base)
    units = unit_groups(sources.train.units, len(sources.train))
    partition = dealt(config, sources.train, units)
    notes = taken_as_public(config, chosen)
    settings = replace(config.data, train=asked.data.train, test=asked.data.test)
    spellings = (sources.train.spellings,) if sources.train.spellings else ()
    return Check(
        config=replace(config, data=settings),
        chosen=chosen,
        records=len(sources.train),
        units=len(units),
        validation=len(sources.public.validation),
        test=len(sources.public.test),
        labels=sources.public.task.labels,
        institutions=tuple(partition.sizes.tolist()),
        notes=(*spellings, *_one_sided(sources), *notes),
        overview=tuple(_overview(sources, base, config.model)),
    )


def _overview(sources: Sources, base: Path, model: ModelConfig) -> Iterator[str]:
    """Lines on the training, validation and test records, as the base reads them."""
    task, longest = as_pooled(sources.public.task, model.pooling), model.max_length
    reader = load_reader(base, task.medium, longest)
    parts = (sources.train, sources.public.validation, sources.public.test)
    for name, records in zip(("train", "validation", "test"), parts, strict=True):
        encoded = task.encode(records, reader, longest)
        yield f"{name}: {records.where}, {len(records)} records"
        for line in overview(records, encoded, task.labels, longest):
            yield f"  {line}"


def _one_sided(sources: Sources) -> list[str]:
    return one_sided(sources.train, sources.public.test, sources.public.task.labels)
