"""Public means public: what a run sets aside, fits on and scores is nobody's private record.

Before: units were set aside by position, under the seed. One record fewer kept 39 of 120 of them,
twenty seeds made 1,399 of 2,000 public, and a test file that was the training file was scored.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.common.config.load import parse_config
from fedlora.common.config.schema import Config, DataConfig
from fedlora.common.data.records import Records
from fedlora.common.errors import BadInput, Refused
from fedlora.common.ledger.ledger import Ledger
from fedlora.common.model.network import AdapterModel
from fedlora.common.tasks.classification import SequenceClassification
from fedlora.server.runs.public_data import PublicRecords, _fit_and_score
from fedlora.server.runs.run import conduct
from fedlora.simulations import cli
from fedlora.simulations.begin import begin
from fedlora.simulations.engines.sequential import sequential
from fedlora.simulations.federation.public_part import (
    KEY,
    ByKey,
    BySeed,
    account_key,
    choice_for,
    kept_choice,
    set_aside,
)
from fedlora.simulations.federation.run_folder import finish
from fedlora.simulations.options import Options
from tests.conftest import WORDS

HERE = ByKey(bytes(32))
CONFIG = """
seed = {seed}
[model]
base = "{base}"
pooling = "mean"
max_length = 16
[lora]
rank = 2
[data]
train = "{data}/train.jsonl"
test = "{data}/test.jsonl"
validation = "{data}/validation.jsonl"
labels = ["bad", "good"]
[federation]
clients = 2
partition = "iid"
rounds = 1
spare_rounds = 0
[training]
steps = 1
sampling_rate = 0.5
expected_units = 10
learning_rate = 0.1
[privacy]
epsilon = 2.0
delta = 1e-4
"""


def records(names: list[str], units: list[str] | None = None) -> Records:
    return Records(names, None, None, units, {}, "train.jsonl")


def aside(names: list[str], share: float, part: str = "validation") -> set[str]:
    return set(set_aside(records(names), part, share, HERE)[0].texts)


def test_one_record_fewer_changes_nobody_elses_part() -> None:
    names = [f"record {number}" for number in range(2_000)]
    whole = aside(names, 0.06)
    assert len(whole) == 140
    for lost in (0, 700, 1_999):
        assert aside(names[:lost] + names[lost + 1 :], 0.06) == whole - {names[lost]}
    assert aside(names[::-1], 0.06) == whole and aside(names, 0.03) < whole
    assert not aside(names, 0.5, "test") & aside(names, 0.5)


def test_over_seeds_and_runs_no_more_becomes_public(tmp_path: Path) -> None:
    names, data = [f"record {number}" for number in range(2_000)], DataConfig(test="t.csv")
    public = set[str]()
    for seed in range(20):
        choice_for(data, tmp_path / str(seed))
        choose = kept_choice(tmp_path / str(seed), seed)
        public.update(set_aside(records(names), "validation", 0.06, choose)[0].texts)
    assert public == aside(names, 0.06)
    assert (tmp_path / "3" / KEY).stat().st_mode & 0o777 == 0o600


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=60),
    st.floats(0.001, 0.5),
    st.floats(0.001, 0.5),
    st.binary(min_size=32, max_size=32),
)
def test_whole_units_are_set_aside_and_none_twice(
    owners: list[int], test: float, validation: float, key: bytes
) -> None:
    names = [str(owner) for owner in owners]
    whole = records([f"{number}" for number in range(len(owners))], names)
    try:
        scored, rest = set_aside(whole, "test", test, ByKey(key))
        tuned, private = set_aside(rest, "validation", validation, ByKey(key))
    except BadInput as error:
        assert "no unit of" in str(error)
        return
    parts = [set(each.units or ()) for each in (scored, tuned, private)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == len(set(names))
    assert sum(map(len, (scored, tuned, private))) == len(whole)


@pytest.mark.parametrize(
    ("share", "said"),
    [
        (1e-9, "takes no unit of 3, expected a larger share, more units or a file"),
        (1 - 1e-9, "leaves no unit of 3, expected a smaller share, more units or a file"),
    ],
)
@pytest.mark.parametrize("part", ["test", "validation"])
def test_a_part_without_a_unit_says_of_how_many_and_what_would_help(
    part: str, share: float, said: str
) -> None:
    with pytest.raises(BadInput) as caught:
        set_aside(records(["a", "b", "c"]), part, share, HERE)
    assert caught.value.faults == (f"[data] {part} = {share}: {said}",)


def test_records_of_the_same_words_share_their_part() -> None:
    chosen, left = set_aside(records([f"w{n % 20}" for n in range(60)]), "validation", 0.4, HERE)
    assert len({*chosen.texts} | {*left.texts}) == 20 and not {*chosen.texts} & {*left.texts}
    assert len(chosen) == 3 * len({*chosen.texts})


def test_who_chooses_is_the_account_and_no_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "one"))
    first = account_key()
    assert account_key() == first and len(first) == 32
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "other"))
    assert account_key() != first
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    with pytest.raises(BadInput, match="public files need none"):
        account_key()
    (tmp_path / "other" / "fedlora" / KEY).write_bytes(b"short")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "other"))
    with pytest.raises(BadInput, match="found 5 bytes, expected 32 random ones"):
        account_key()


def test_a_run_of_an_earlier_version_goes_on_as_it_began(tmp_path: Path) -> None:
    choose = kept_choice(tmp_path, 11)
    assert choose == BySeed(11)
    names = [b"%d" % number for number in range(20)]
    assert np.flatnonzero(choose(names, 0.2, False)).tolist() == [4, 7, 12, 16]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder, rng = tmp_path / "data", np.random.default_rng(0)
    folder.mkdir()
    for name, count in (("train", 60), ("test", 12), ("validation", 12)):
        rows = [
            {"text": " ".join(rng.choice(WORDS, 6)), "label": ("good", "bad")[row % 2]}
            for row in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def config(base: Path, data: Path, *overrides: str, seed: int = 7) -> Config:
    return parse_config(CONFIG.format(base=base, data=data, seed=seed), "run.toml", overrides)


def as_csv(train: Path) -> Path:
    rows = [json.loads(line) for line in train.read_text().splitlines()]
    lines = [f"{row['label']},{row['text']}\n" for row in reversed(rows)]
    path = train.with_suffix(".csv")
    path.write_text("label,text\n" + "".join(lines))
    return path


def copied(train: Path) -> Path:
    return Path(shutil.copy(train, train.with_name("renamed.jsonl")))


def part_of(train: Path) -> Path:
    path = train.with_name("part.jsonl")
    path.write_text("".join(train.read_text().splitlines(keepends=True)[5:25]))
    return path


def spelled_anew(train: Path) -> Path:
    """Other case, other white space, other forms of the same letters."""
    rows = [json.loads(line) for line in train.read_text().splitlines()]
    path = train.with_name("anew.jsonl")
    anew = ({**row, "text": f" {row['text'].upper()}\u200b ".replace(" ", "  ")} for row in rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in anew))
    return path


@pytest.mark.parametrize("disguise", [lambda train: train, copied, as_csv, part_of, spelled_anew])
@pytest.mark.parametrize("name", ["test", "validation", "public"])
def test_a_public_file_that_is_the_training_file_is_refused(
    tiny_bert: Path, data: Path, tmp_path: Path, disguise: object, name: str
) -> None:
    file = disguise(data / "train.jsonl")  # type: ignore[operator]
    settings = config(tiny_bert, data, f'data.{name}="{file}"', "model.projection=4")
    with pytest.raises(BadInput, match=rf"\[data\] {name} = .*: found only texts of train.jsonl"):
        begin(settings, tmp_path / "run", Options(device="cpu"))
    assert not (tmp_path / "run" / "ledger.sqlite").exists()


@pytest.mark.parametrize(("part", "said"), [("test", False), ("validation", True)])
def test_texts_that_are_in_both_are_counted_in_the_log_and_no_statement_covers_them(
    tiny_bert: Path,
    data: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    part: str,
    said: bool,
) -> None:
    lines = (data / "train.jsonl").read_text().splitlines(keepends=True)[:3]
    path = data / f"{part}.jsonl"
    path.write_text((data / "test.jsonl").read_text() + "".join(lines))
    settings = config(tiny_bert, data, f'data.{part}="{path}"')
    caplog.set_level(logging.INFO)
    run = begin(settings, tmp_path / "run", Options(device="cpu"))
    assert f"{part}.jsonl: 3 of its 15 texts are in train.jsonl too" in caplog.text
    caveat = f"Some texts of the [data] {part} file, which was named as public, are training"
    assert any(caveat in line for line in run.caveats) == said
    assert not any("3" in line for line in run.caveats if caveat in line)


@pytest.mark.parametrize("part", ["validation", "test"])
def test_a_share_has_no_place_beside_a_budget_that_runs_share(
    tiny_bert: Path,
    data: Path,
    tmp_path: Path,
    part: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, ledger = tmp_path / "run.toml", tmp_path / "shared.sqlite"
    path.write_text(CONFIG.format(base=tiny_bert, data=data, seed=7))
    words = ["run", str(path), "--out", str(tmp_path / "run"), "--ledger", str(ledger)]
    monkeypatch.setattr(sys, "argv", ["fedlora-sim", *words, "--set", f"data.{part}=0.2"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and not ledger.exists()
    assert line.startswith(f"fedlora-sim: --ledger: found [data] {part} = 0.2, a share of the")


def runs(base: Path, data: Path, root: Path, *overrides: str) -> Iterator[Ledger]:
    """One run after the other on one ledger, each of another seed and among other clients."""
    for number in range(9):
        settings = config(base, data, *overrides, seed=number)
        settings = replace(settings, federation=replace(settings.federation, clients=2 + number))
        options = Options(device="cpu", ledger=root / "shared.sqlite")
        run = begin(settings, root / str(number), options)
        finish(run, conduct(run, sequential(run)))
        yield run.ledger
        run.ledger.close()


def test_a_shared_ledger_takes_as_many_runs_as_its_budget_bears(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    """Before: none but the first, for each run's own ε was the cap of all."""
    budget = ("privacy.budget_epsilon=7.0", "privacy.budget_delta=1e-3")
    spent = []
    with pytest.raises(Refused, match="past its cap of 7"):
        for ledger in runs(tiny_bert, data, tmp_path, *budget):
            spent.append(ledger.spent("population population").epsilon)
    assert len(spent) == 3 and 5.9 < spent[-1] <= 6.0
    assert np.diff(spent, prepend=0.0) == pytest.approx([spent[0]] * 3)


def test_clients_of_another_population_have_another_budget(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    options = Options(device="cpu", ledger=tmp_path / "shared.sqlite")
    others = data.with_name("others.jsonl")
    others.write_text(
        "".join(reversed((data / "train.jsonl").read_text().splitlines(keepends=True)))
    )
    for name, file in (("population", data / "train.jsonl"), ("others", others)):
        settings = config(tiny_bert, data, f"privacy.population={name}", f'data.train="{file}"')
        run = begin(settings, tmp_path / name, options)
        summary = finish(run, conduct(run, sequential(run)))
        assert 1.9 < summary["epsilon"] <= 2.0
        run.ledger.close()
    with pytest.raises(Refused, match="budget population others"):
        begin(settings, tmp_path / "again", options)


@pytest.mark.parametrize("way", ["file", "copy", "glob"])
def test_a_file_opens_no_new_budget_by_naming_another_population(
    tiny_bert: Path, data: Path, tmp_path: Path, way: str
) -> None:
    """Before: 1.999 of each population's 2.0, as often as somebody thought of a name."""
    options = Options(device="cpu", ledger=tmp_path / "shared.sqlite")
    run = begin(config(tiny_bert, data), tmp_path / "first", options)
    finish(run, conduct(run, sequential(run)))
    run.ledger.close()
    train = data / ("trai[n].jsonl" if way == "glob" else "train.jsonl")
    if way == "copy":
        train = Path(shutil.copy(train, tmp_path / "copy.jsonl"))
    renamed = config(tiny_bert, data, "privacy.population=others", f'data.train="{train}"')
    with pytest.raises(Refused, match="budget population others: found data that charged budget"):
        begin(renamed, tmp_path / "again", options)


@given(st.integers(2, 30))
def test_half_of_a_validation_part_is_fitted_on_and_the_other_half_scores(count: int) -> None:
    task, tested = SequenceClassification(("bad", "good")), records(["w"])
    read = records([f"w{number}" for number in range(count)])
    part = task.unlabelled(np.zeros(count, dtype=np.int32), np.arange(count + 1, dtype=np.int64))
    model = cast(AdapterModel, None)  # encodes texts that are named
    fit, fitted, score = _fit_and_score(model, PublicRecords(task, read, tested), part, True)
    assert fitted is part and sorted([*fit, *score]) == list(range(count))
    assert len(fit) - len(score) in (0, 1)


def test_a_projection_is_fitted_on_the_public_texts_that_are_named(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    rng = np.random.default_rng(5)
    rows = [{"text": " ".join(rng.choice(WORDS, 6)), "label": "bad"} for _ in range(30)]
    (data / "public.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fitted = {}
    for name, file in (("half", ""), ("named", f"{data}/public.jsonl")):
        settings = config(tiny_bert, data, "model.projection=4", f'data.public="{file}"')
        run = begin(settings, tmp_path / name, Options(device="cpu"))
        fitted[name] = run.manifest.projection_digest
        assert len(run.public.validation.rows) == (6 if name == "half" else 12)
    assert fitted["half"] != fitted["named"]
