"""What a person sees: while a run goes on a bar, with accuracy, ε so far, examples a second."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console, ConsoleRenderable
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from fedlora.common.errors import FedloraError
from fedlora.common.privacy.figures import shown_epsilon


class RunProgress:
    """Two bars: records whose features are computed (head phase), and rounds."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._features = progress.add_task("features", total=None, visible=False, figures="")
        self._rounds = progress.add_task("rounds", total=None, figures="")

    def features(self, done: int, records: int) -> None:
        """So many of the records that a head phase needs went through the frozen model."""
        self._progress.update(self._features, completed=done, total=records, visible=True)

    def round(self, number: int, figures: Mapping[str, float | None]) -> None:
        """Round `number` was committed; `figures` has the number of all `rounds`."""
        shown = "  ".join(
            _figure(name, value)
            for name, value in figures.items()
            if value is not None and name != "rounds"
        )
        total = figures["rounds"]
        self._progress.update(self._rounds, completed=number, total=total, figures=shown)

    def hide_empty(self) -> None:
        """Of a run that never began there is nothing to see but why."""
        for task in self._progress.tasks:
            self._progress.update(task.id, visible=task.total is not None)


@contextmanager
def run_progress(console: Console) -> Iterator[RunProgress]:
    """Live bars on a terminal; nothing but the last state where output is not a terminal."""
    whole = Column(no_wrap=True, min_width=7)  # in a narrow terminal the figures are cut instead
    columns = (
        TextColumn("{task.description:>8}", table_column=Column(min_width=8)),
        BarColumn(bar_width=10),
        MofNCompleteColumn(table_column=whole),
        TimeRemainingColumn(table_column=whole.copy()),
        TextColumn("{task.fields[figures]}", table_column=Column(no_wrap=True)),
    )
    with Progress(*columns, console=console, transient=False) as progress:
        bars = RunProgress(progress)
        try:
            yield bars
        except FedloraError:
            bars.hide_empty()
            raise


def _figure(name: str, value: float) -> str:
    names = {"epsilon": "ε", "examples_per_second": "records/s"}
    shown = f"{value:.0f}" if value >= 100 else f"{value:.3g}"
    if name == "epsilon":
        shown = shown_epsilon(value)
    return f"{names.get(name, name)} {shown}"


def as_printed(found: ConsoleRenderable) -> str:
    """What a terminal of 100 columns would show of it, without colours."""
    console = Console(width=100, highlight=False, color_system=None)
    with console.capture() as printed:
        console.print(found)
    return printed.get().rstrip()
