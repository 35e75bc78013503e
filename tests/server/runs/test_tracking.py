"""Trackers hear what a person watches, and nothing else; one that is missing is a line."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from fedlora.common.config.load import parse_config
from fedlora.common.config.schema import TrackingConfig
from fedlora.common.errors import BadInput
from fedlora.server.runs.metrics import WATCHED
from fedlora.server.runs.tracking import check_trackers, tracked

ALL = TrackingConfig(tensorboard=True, mlflow="http://127.0.0.1:5000", wandb=True)
FIGURES = {"accuracy": 0.5, "epsilon": None, "rounds": 3}


def module(monkeypatch: pytest.MonkeyPatch, name: str, **names: Any) -> None:
    made = ModuleType(name)
    vars(made).update(names)
    monkeypatch.setitem(sys.modules, name, made)


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What stand-ins of the three libraries were told, by the calls that each of them has."""
    told: list[Any] = []

    class SummaryWriter:
        def __init__(self, folder: str) -> None:
            told.append(("tensorboard", Path(folder).name))

        def add_scalar(self, *given: Any) -> None:
            told.append(given)

        def close(self) -> None:
            told.append("closed")

    class Active:
        def __enter__(self) -> None:
            told.append("mlflow begins")

        def __exit__(self, *_: object) -> None:
            told.append("mlflow ends")

    run = SimpleNamespace(
        log=lambda figures, step: told.append(("wandb", step, figures)),
        finish=lambda: told.append("finished"),
    )
    module(monkeypatch, "tensorboard")
    module(monkeypatch, "torch.utils.tensorboard", SummaryWriter=SummaryWriter)
    module(
        monkeypatch,
        "mlflow",
        set_tracking_uri=told.append,
        set_experiment=lambda name: None,
        start_run=lambda run_name: Active(),
        log_metrics=lambda figures, step: told.append(("mlflow", step, figures)),
    )

    def init(**named: Any) -> SimpleNamespace:
        told.append(named["mode"])
        return run

    module(monkeypatch, "wandb", init=init)
    return told


def test_each_tracker_is_told_the_figures_of_a_round(heard: list[Any], tmp_path: Path) -> None:
    seen: list[int] = []
    with tracked(ALL, tmp_path, lambda number, figures: seen.append(number)) as tell:
        tell(2, FIGURES)
    known = {"accuracy": 0.5, "rounds": 3}
    assert seen == [2] and {*known} <= {*WATCHED, "rounds"}
    assert ("accuracy", 0.5, 2) in heard
    assert ("mlflow", 2, known) in heard and ("wandb", 2, known) in heard
    assert "http://127.0.0.1:5000" in heard and "offline" in heard
    assert {"closed", "mlflow ends", "finished"} <= {each for each in heard if type(each) is str}


def test_a_folder_of_mlflow_is_a_database_in_it(heard: list[Any], tmp_path: Path) -> None:
    place = tmp_path / "ml"
    with tracked(TrackingConfig(mlflow=str(place)), tmp_path, lambda number, figures: None):
        pass
    assert heard[0] == f"sqlite:///{place / 'mlflow.db'}" and place.is_dir()


@pytest.mark.parametrize("name", ["tensorboard", "mlflow", "wandb"])
def test_a_library_that_is_missing_is_one_line(
    name: str, monkeypatch: pytest.MonkeyPatch, heard: list[Any]
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(BadInput, match=rf"no package {name}, expected .* fedlora\[tracking\]"):
        check_trackers(ALL)
    check_trackers(TrackingConfig())


def test_a_configuration_names_trackers() -> None:
    given = parse_config('[tracking]\ntensorboard = true\nmlflow = "http://127.0.0.1:5000"\n')
    assert given.tracking == TrackingConfig(True, "http://127.0.0.1:5000", False)
    with pytest.raises(BadInput, match=r"\[tracking\] wandb = 1: expected true or false"):
        parse_config("[tracking]\nwandb = 1\n")
