"""Wrong arguments, lost and damaged files: one clear line each, before anything is charged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from fedlora.common.config.schema import Config
from fedlora.common.config.toml import literal
from fedlora.common.errors import BadInput
from fedlora.server.strategies.fedavg import FedAvg
from fedlora.simulations.begin import begin, checked
from fedlora.simulations.cli import _input
from fedlora.simulations.experiments.compare import compare
from fedlora.simulations.experiments.configuration import load_config
from fedlora.simulations.experiments.simulate import simulate
from fedlora.simulations.experiments.sweep import sweep
from fedlora.simulations.options import Options
from tests.simulations.experiments.test_simulate import config, cpu, write_data


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"strategy": "fedavg"}, "strategy: found 'fedavg', expected an object with a method"),
        ({"strategy": FedAvg}, "strategy: found .*FedAvg.*, expected an object with a method"),
        ({"partition": "iid"}, "partition: found 'iid', expected a function"),
        ({"cohort": 3}, "cohort: found 3, expected a function"),
        ({"on_round": 5}, "on_round, on_features: expected functions"),
    ],
    ids=["strategy", "its-class", "partition", "cohort", "on-round"],
)
def test_wrong_parts_of_ones_own_are_refused_before_a_charge(
    tiny_bert: Path, tmp_path: Path, parts: dict[str, Any], said: str
) -> None:
    settings = config(tiny_bert, write_data(tmp_path), "record")
    with pytest.raises(BadInput, match=said):
        simulate(settings, tmp_path / "run", cpu(), **parts)
    assert not (tmp_path / "run" / "ledger.sqlite").exists()


def test_a_run_that_lost_the_key_of_its_public_part_does_not_go_on(
    tiny_bert: Path, tmp_path: Path
) -> None:
    settings = config(tiny_bert, write_data(tmp_path), "record", "data.validation=0.2")
    folder = tmp_path / "run"
    begin(settings, folder, cpu()).ledger.close()
    (folder / "public-part.key").unlink()
    with pytest.raises(BadInput, match=r"public-part\.key: missing, expected the key that chose"):
        begin(settings, folder, cpu(resume=True))


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("config.toml", b"\xff", "config.toml: found a byte that is not UTF-8"),
        ("data.sha256", b"\xff", "data.sha256: found a byte that is not UTF-8"),
        ("chosen.json", b"{", "chosen.json: found no list of names"),
        ("metrics.jsonl", b"\xff\n", "metrics.jsonl: found a byte that is not UTF-8"),
    ],
)
def test_damaged_files_of_a_run_are_named(
    tiny_bert: Path, tmp_path: Path, name: str, damage: bytes, said: str
) -> None:
    settings = config(tiny_bert, write_data(tmp_path), "none")
    folder = tmp_path / "run"
    begin(settings, folder, cpu()).ledger.close()
    (folder / name).write_bytes(damage)
    with pytest.raises(BadInput, match=said):
        simulate(settings, folder, cpu(resume=True))


def test_another_configuration_is_named_by_what_differs(tiny_bert: Path, tmp_path: Path) -> None:
    settings = config(tiny_bert, write_data(tmp_path), "record")
    begin(settings, tmp_path / "run", cpu()).ledger.close()
    other = replace(settings, privacy=replace(settings.privacy, epsilon=9.0))
    with pytest.raises(BadInput, match=r"privacy\.epsilon = 9\.0, the run began with 8\.0"):
        begin(other, tmp_path / "run", cpu(resume=True))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda c: load_config(None, "privacy.epsilon=3"), "overrides: found 'privacy.epsilon=3'"),
        (lambda c: sweep(c, "privacy.epsilon", "12", "runs"), "expected section.key, and a list"),
        (lambda c: compare(c, "runs", methods="head"), "methods: found 'head', expected a list"),
        (
            lambda c: compare(c, "runs", epsilons=cast(Any, ["none"])),
            "epsilons: found 'none', expected",
        ),
        (
            lambda c: checked(cast(Any, "tiny.toml")),
            "found 'tiny.toml', expected what load_config gives",
        ),
        (lambda c: Options(threads=-1), "threads: found -1, expected 0 to 1024"),
        (lambda c: simulate(c, ""), "folder: found an empty path"),
        (lambda c: _input('{"text": "a"}'), "found a JSON object, expected one text to a line"),
    ],
)
def test_arguments_of_another_kind_are_named(
    call: Callable[[Config], Any], said: str, tiny_bert: Path, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match=said):
        call(config(tiny_bert, write_data(tmp_path), "record"))


def test_numbers_of_numpy_are_numbers() -> None:
    assert literal(np.float64(3)) == "3.0" and literal((np.int64(2),)) == "[2]"
    assert load_config(None, privacy={"epsilon": np.float32(3)}).privacy.epsilon == 3.0


def test_a_configuration_that_is_nearly_a_packaged_one_is_asked_after() -> None:
    with pytest.raises(BadInput, match=r'quickstrt: no such file.*did you mean "quickstart"'):
        load_config("quickstrt")
