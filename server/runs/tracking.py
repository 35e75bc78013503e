"""[tracking]: TensorBoard, MLflow and W&B are told what a person watches, and nothing else.

Each library is imported where it is asked for; one that is missing is said in one line. W&B is told
offline: what leaves the machine, `wandb sync` sends when somebody wants it to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

from fedlora.common.config.schema import TrackingConfig
from fedlora.common.libraries import library
from fedlora.server.runs.metrics import Observe

EXTRA = "tracking"
Tell = Callable[[int, dict[str, float]], None]


def check_trackers(settings: TrackingConfig) -> None:
    """BadInput where a library is missing: to be asked before anything is charged."""
    for name in _asked(settings):
        library(name, EXTRA)


@contextmanager
def tracked(settings: TrackingConfig, folder: Path, observe: Observe) -> Iterator[Observe]:
    """`observe`, and whoever else is to be told, for as long as this lasts."""
    with ExitStack() as stack:
        told = [stack.enter_context(TRACKERS[each](folder, settings)) for each in _asked(settings)]

        def tell(number: int, figures: Mapping[str, float | None]) -> None:
            observe(number, figures)
            known = {name: value for name, value in figures.items() if value is not None}
            for one in told:
                one(number, known)

        yield tell


def _asked(settings: TrackingConfig) -> list[str]:
    """The libraries of the trackers that are on."""
    return [name for name in TRACKERS if getattr(settings, name)]


@contextmanager
def _tensorboard(folder: Path, settings: TrackingConfig) -> Iterator[Tell]:
    writer = library("torch.utils.tensorboard", EXTRA).SummaryWriter(str(folder / "tensorboard"))

    def tell(number: int, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            writer.add_scalar(name, value, number)

    try:
        yield tell
    finally:
        writer.close()


@contextmanager
def _mlflow(folder: Path, settings: TrackingConfig) -> Iterator[Tell]:
    mlflow = library("mlflow", EXTRA)
    mlflow.set_tracking_uri(_store(settings.mlflow))
    mlflow.set_experiment("fedlora")
    with mlflow.start_run(run_name=folder.resolve().name):
        yield lambda number, figures: mlflow.log_metrics(figures, step=number)


def _store(place: str) -> str:
    """A server as it is named; of a folder the database in it, which MLflow wants for one."""
    if ":" in place:
        return place
    folder = Path(place).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{folder / 'mlflow.db'}"


@contextmanager
def _wandb(folder: Path, settings: TrackingConfig) -> Iterator[Tell]:
    wandb = library("wandb", EXTRA)
    run = wandb.init(project="fedlora", name=folder.resolve().name, dir=str(folder), mode="offline")
    try:
        yield lambda number, figures: run.log(figures, step=number)
    finally:
        run.finish()


# by the name that setting and library share
TRACKERS: dict[str, Callable[[Path, TrackingConfig], AbstractContextManager[Tell]]] = {
    "tensorboard": _tensorboard,
    "mlflow": _mlflow,
    "wandb": _wandb,
}
