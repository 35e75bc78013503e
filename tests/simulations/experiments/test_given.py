"""Records given as objects are a run's files, and the run is as from the command line."""

from __future__ import annotations

import json
import stat
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow
import pytest

from fedlora.common.config.load import parse_config
from fedlora.common.config.schema import config_to_toml
from fedlora.common.data.data_file import file_digest
from fedlora.common.data.records import Columns, read_records
from fedlora.common.errors import BadInput
from fedlora.simulations import check, plan, simulate
from fedlora.simulations.experiments.given import with_records
from tests.media import png
from tests.simulations.experiments.test_simulate import config, cpu, data
from tests.simulations.test_cli import call

__all__ = ["data"]


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class Frame:
    """As pandas and polars have it: columns by name, each with a `tolist` of its own."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.columns = list(rows[0])
        self._rows = rows

    def __getitem__(self, name: str) -> np.ndarray[Any, Any]:
        return np.array([row[name] for row in self._rows])


class Dataset:
    """As Hugging Face's datasets: `column_names`, and a column is iterable."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.column_names = list(rows[0])
        self._rows = rows

    def __getitem__(self, name: str) -> Any:
        return iter([row[name] for row in self._rows])


def test_every_kind_of_table_is_the_same_file(data: Path, tiny_bert: Path, tmp_path: Path) -> None:
    rows = rows_of(data / "train.jsonl")
    kinds = {
        "rows": rows,
        "columns": {name: [row[name] for row in rows] for name in rows[0]},
        "frame": Frame(rows),
        "arrow": pyarrow.Table.from_pylist(rows),
        "dataset": Dataset(rows),
    }
    settings = config(tiny_bert, data, "record", "data.unit=person")
    digests = set()
    for name, table in kinds.items():
        given = with_records(settings, tmp_path / name, train=table)
        path = Path(given.data.train)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600 and given.data.test == settings.data.test
        digests.add(file_digest(path))
    assert len(digests) == 1
    assert set(rows_of(path)[0]) == {"text", "label", "person"}  # and nothing that no run reads


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ([{"text": "w1"}], r'train row 1: found columns \["text"\], expected "label" among them'),
        ({"text": ["w1", "w2"], "label": [0]}, r"columns of \[2, 1\] rows"),
        (["w1"], "train row 1: found str"),
        ("train.csv", "found str, expected rows or columns"),
        (7, "found int, expected rows or columns"),
        ([{"text": object(), "label": 0}], "found object, expected text or a number"),
        ([], "found no records"),
        ([{"text": "w1", "label": float("nan")}], "row 1 label: found nothing"),
    ],
)
def test_what_is_no_table(
    table: object, said: str, data: Path, tiny_bert: Path, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match=said):
        check(config(tiny_bert, data, "record"), train=table)


def test_lists_that_a_frame_has_as_arrays_stay_lists(
    data: Path, tiny_bert: Path, tmp_path: Path
) -> None:
    """As pandas reads lists of a Parquet file: one label would have been no list any more."""
    settings = config(tiny_bert, data, "record", "model.task=multi-label", "data.label=labels")
    frame = {"text": ["w1", "w2"], "labels": [np.array(["good"]), np.array(["good", "bad"])]}
    given = with_records(settings, tmp_path, train=frame)
    assert [row["labels"] for row in rows_of(Path(given.data.train))] == [["good"], ["good", "bad"]]


def test_a_check_says_what_a_run_would_begin_with(data: Path, tiny_bert: Path) -> None:
    settings = config(tiny_bert, data, "record", "data.unit=person", "federation.rounds=auto")
    settings = replace(settings, data=replace(settings.data, test=0.2))
    found = check(settings)
    assert found.records + found.validation + found.test == 75
    assert len(found.institutions) == 3 and sum(found.institutions) == found.units < found.records
    assert found.labels == ("0", "1") and "federation.rounds" in found.chosen
    assert found.config.federation.rounds > 0
    assert "Taken from the training file, and public" in found.notes[-1]
    assert "institutions  3" in " ".join(str(found).split("\n")).replace("   ", "  ")
    with pytest.raises(BadInput, match="expected at least one for each"):
        check(replace(settings, federation=replace(settings.federation, clients=999)))


def test_python_and_the_command_line_state_the_same_epsilon(
    data: Path,
    tiny_bert: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """To the digit: from objects, from files, and by the command line."""
    settings = config(tiny_bert, data, "record")
    empty = replace(settings, data=replace(settings.data, train="", test=""))
    rows = rows_of(data / "train.jsonl"), rows_of(data / "test.jsonl")
    seen: list[int] = []
    given = simulate(
        empty,
        tmp_path / "given",
        cpu(),
        train=rows[0],
        test=rows[1],
        on_round=lambda number, _: seen.append(number),
    )
    (tmp_path / "c.toml").write_text(config_to_toml(settings))
    words = ("run", str(tmp_path / "c.toml"), "--out", str(tmp_path / "cli"), "--device", "cpu")
    assert call(monkeypatch, capsys, *words)[0] == 0
    said = json.loads((tmp_path / "cli" / "summary.json").read_text())
    planned = plan(empty, cpu(), train=rows[0], test=rows[1])
    assert given.epsilon == said["epsilon"] == planned.epsilon
    assert seen == [line["round"] for line in given.rounds] == [1, 2, 3, 4]
    assert given.summary["schedule"] == said["schedule"]
    again = simulate(empty, given.folder, cpu(resume=True), train=rows[0], test=rows[1])
    assert again.epsilon == given.epsilon
    with pytest.raises(BadInput, match="another configuration"):
        simulate(empty, given.folder, cpu(resume=True), train=rows[0][1:], test=rows[1])


def test_rounds_are_a_frame_where_pandas_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedlora.simulations import Result

    (tmp_path / "metrics.jsonl").write_text('{"round": 1, "accuracy": 0.5}\n')
    result = Result(tmp_path, {})
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(BadInput, match=r"no package pandas, expected .* fedlora\[frames\]"):
        result.frame()

    class Made:
        def __init__(self, rows: list[Any]) -> None:
            self.rows = rows

        def set_index(self, name: str) -> tuple[str, list[Any]]:
            return name, self.rows

    pandas = ModuleType("pandas")
    pandas.DataFrame = Made  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pandas", pandas)
    assert result.frame() == ("round", [{"round": 1, "accuracy": 0.5}])


def test_images_that_python_gives_lie_beside_their_table(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    red, blue = png(rng, 1), png(rng, 0)
    (tmp_path / "red.png").write_bytes(red)
    images = [red, {"bytes": blue, "path": None}, tmp_path / "red.png", str(tmp_path / "red.png")]
    table = [{"image": image, "label": "a"} for image in images]
    text = '[model]\ntask = "image-classification"\n[data]\nimage = "image"\nlabels = ["a", "b"]'
    given = with_records(parse_config(text), tmp_path / "run", train=table)
    columns = Columns("", media="image", label="label")
    records = read_records(Path(given.data.train), columns, given.data.labels)
    assert [each.data for each in records.parts["media"]] == [red, blue, red, red]
    assert all(path.stat().st_mode & 0o077 == 0 for path in (tmp_path / "run" / "data").iterdir())
    with pytest.raises(BadInput, match="train row 1 image: found int, expected bytes, or the path"):
        with_records(parse_config(text), tmp_path / "run", train=[{"image": 7, "label": "a"}])
