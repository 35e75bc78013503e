"""One simulated run, from configuration to report: begin, train, finish, hand the result back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from fedlora.common.adapter.peft import LoadedAdapter, load_adapter
from fedlora.common.config.schema import Config
from fedlora.common.disk.files import lines_of
from fedlora.common.errors import BadInput
from fedlora.common.libraries import library
from fedlora.common.model.compute import threads
from fedlora.common.tasks.known import use_task
from fedlora.common.tasks.task import TaskKind
from fedlora.server.rounds.checkpoint import Progress
from fedlora.server.rounds.cohort import Cohort
from fedlora.server.runs.metrics import METRICS, Observe, nobody
from fedlora.server.runs.run import conduct, to_its_end
from fedlora.server.runs.tracking import check_trackers, tracked
from fedlora.server.strategies.strategy import Strategy
from fedlora.simulations.begin import Features, begin, checked
from fedlora.simulations.engines.gpu_shares import check_gpu_share
from fedlora.simulations.engines.sequential import sequential
from fedlora.simulations.experiments.given import Table, with_records
from fedlora.simulations.federation.partition import Owners
from fedlora.simulations.federation.record_loss import RecordLoss
from fedlora.simulations.federation.run_folder import SimulatedRun, alone_in, finish
from fedlora.simulations.options import DEFAULTS, Options, Own
from fedlora.simulations.report.pages import write_report


@dataclass(frozen=True, eq=False)
class Result:
    """A run that has ended. Everything lies in its folder as well: summary.json, report.html, …"""

    folder: Path
    summary: Mapping[str, Any]

    @property
    def epsilon(self) -> float | None:
        """The largest ε of an institution that the ledger proves; None without privacy."""
        found: float | None = self.summary["epsilon"]
        return found

    @property
    def statement(self) -> tuple[str, ...]:
        """What is guaranteed, to whom, and what it rests on, in sentences."""
        return tuple(self.summary["privacy_statement"])

    @cached_property
    def rounds(self) -> tuple[Mapping[str, Any], ...]:
        """The committed rounds, each what metrics.jsonl says of it."""
        return tuple(line.value for line in lines_of(self.folder / METRICS))

    def frame(self) -> Any:
        """`rounds` as a frame of pandas, indexed by round; BadInput where pandas is missing."""
        pandas = library("pandas", "frames")
        return pandas.DataFrame(list(self.rounds)).set_index("round")

    @cached_property
    def adapter(self) -> LoadedAdapter:
        """The released adapter on its base, loaded when it is first asked for."""
        return load_adapter(self.folder / "adapter")


def simulate(
    config: Config,
    folder: Path | str,
    options: Options = DEFAULTS,
    *,
    on_round: Observe = nobody,
    on_features: Features = lambda done, records: None,
    train: Table | None = None,
    test: Table | None = None,
    strategy: Strategy | None = None,
    partition: Owners | None = None,
    cohort: Callable[[SimulatedRun], Cohort] | None = None,
    task: TaskKind | None = None,
    loss: RecordLoss | None = None,
) -> Result:
    """Train a federation, score its adapter, and leave everything in `folder`.

    `on_round` is told each committed round's number and figures, `on_features` how far a head
    phase's features are. `train` and `test` are records given instead of files: lists of rows,
    columns by name, frames, datasets; they are kept in the folder. A strategy, a partition or a
    cohort of one's own takes the place of the configured one, and is named in the summary; a `loss`
    gives each record its own, (n, classes) scores to (n,), and is refused where records have a part
    in one another's.

    A `task` of one's own is known by its name from then on, in this process; a package offers one
    under the entry point `fedlora.tasks`.

    BadInput lists what is wrong; Refused, Spent and QuorumLost end a run early, whose last adapter
    lies in the folder all the same.
    """
    if task is not None:
        use_task(task)
        config = replace(config, model=replace(config.model, task=task.name))
    _check_arguments(folder, on_round, on_features)
    own = Own(strategy, partition, cohort, loss)
    config = with_records(checked(config), Path(folder), train, test)
    check_trackers(config.tracking)
    _check_workers(options)
    with threads(options.threads), alone_in(Path(folder)):
        run = begin(config, Path(folder), options, own, on_features)

        def trained() -> Progress:
            with tracked(config.tracking, run.folder, on_round) as told:
                if run.engine == "ray":
                    from fedlora.simulations.engines.ray import train_on_ray

                    return train_on_ray(run, told, options)
                return conduct(run, (cohort or sequential)(run), told)

        def finished(reached: Progress, ended: str) -> dict[str, Any]:
            summary = finish(run, reached, ended)
            write_report(run.folder)
            return summary

        return Result(run.folder, to_its_end(run.checkpoint, trained, finished))


def _check_arguments(folder: Path | str, *told: object) -> None:
    """BadInput for what would be found out only once a round is charged, or would land anywhere."""
    if not all(map(callable, told)):
        raise BadInput("on_round, on_features: expected functions")
    if str(folder) == "":
        raise BadInput("folder: found an empty path, expected the run's")


def _check_workers(options: Options) -> None:
    """BadInput, before anything is charged, where no worker could have what is asked for it."""
    check_gpu_share(options)
    if options.gpu_share:
        from fedlora.simulations.engines.ray import workers

        workers(options, 1)
