"""Data as institutions have them: one line says what is wrong, and what is right is read."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from fedlora.simulations import cli
from fedlora.simulations.federation.run_folder import alone_in

WORDS = ("it was good", "it was bad")
CONFIG = """
[model]
base = "{base}"
max_length = 16
[lora]
rank = 2
[data]
train = "{folder}/train.csv"
test = "{folder}/test.csv"
validation = 0.2
[federation]
clients = 2
partition = "iid"
[privacy]
mode = "none"
"""


class Case:
    """Files that a test writes, and a command that reads them."""

    def __init__(
        self,
        base: Path,
        folder: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        self.folder, self._monkeypatch, self._capsys = folder, monkeypatch, capsys
        self.config = folder / "run.toml"
        self.config.write_text(CONFIG.format(base=base, folder=folder), encoding="utf-8")

    def write(self, name: str, *labels: str, times: int = 20) -> None:
        """A file in which each label goes with texts of its own, and of no other file."""
        first = 100 if name == "train.csv" else 0
        rows = [
            f"{WORDS[row % len(labels) % 2]} w{first + row},{each}"
            for row, each in enumerate(labels * times)
        ]
        path = self.folder / name
        path.write_text("\n".join(["text,label", *rows]) + "\n", encoding="utf-8")

    def says(self, *words: str) -> tuple[int, str, str]:
        """Exit code, output and complaints of a command."""
        self._monkeypatch.setattr(sys, "argv", ["fedlora-sim", *words])
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0), *self._capsys.readouterr()


@pytest.fixture
def case(
    tiny_bert: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Case:
    return Case(tiny_bert, tmp_path, monkeypatch, capsys)


def test_labels_from_zero_against_labels_from_one(case: Case) -> None:
    case.write("train.csv", "0", "1")
    case.write("test.csv", "1", "2")
    code, _, told = case.says("check", str(case.config))
    assert code == 2 and "row 1 label: found 0, expected one of the 2 public labels 1, 2" in told


def test_a_label_in_one_file_only_is_named(case: Case) -> None:
    case.write("train.csv", "yes", "no")
    case.write("test.csv", "yes", "no", "perhaps")
    code, out, _ = case.says("check", str(case.config))
    assert code == 0 and "train.csv: never has perhaps, which test.csv has" in out


def test_codes_that_are_names_are_labels(case: Case) -> None:
    for name in ("train.csv", "test.csv"):
        case.write(name, "43239", "99213")
    code, out, _ = case.says("check", str(case.config))
    assert code == 0 and "labels: 43239 20, 99213 20" in out


def test_labels_that_differ_by_white_space_are_refused(case: Case) -> None:
    case.write("train.csv", "ham", "spam")
    case.write("test.csv", "ham", "spam", "spam ")
    code, _, told = case.says("run", str(case.config), "--out", str(case.folder / "run"))
    assert code == 2 and '"spam" and "spam ", which differ in white space' in told
    assert not (case.folder / "run" / "ledger.sqlite").exists()


def test_check_shows_what_was_understood(case: Case) -> None:
    case.write("train.csv", "yes", "no")
    case.write("test.csv", "yes", "no", times=5)
    code, out, _ = case.says("check", str(case.config))
    assert code == 0
    train = re.search(r"^train: train.csv, (\d+) records$", out, re.MULTILINE)
    aside = re.search(r"^validation: train.csv \(validation part\), (\d+) rec", out, re.MULTILINE)
    assert train and aside and int(train[1]) + int(aside[1]) == 40
    for line in (
        "  each record is a privacy unit",
        "  tokens: 6 to 6 of at most 16, in the middle 6; nothing is cut",
        "test: test.csv, 10 records",
        "  labels: no 5, yes 5",
        "  test.csv row 2: it was bad w1 -> no",
    ):
        assert line in out.splitlines()
    code, out, _ = case.says("check", str(case.config), "--set", "model.max_length=5")
    assert code == 0 and f"cut to fit: the text of {train[1]}" in out


def test_two_runs_do_not_write_into_one_folder(case: Case) -> None:
    for name in ("train.csv", "test.csv"):
        case.write(name, "yes", "no")
    with alone_in(case.folder / "run"):
        code, _, told = case.says("run", str(case.config), "--out", str(case.folder / "run"))
    assert code == 2 and "found a run that is being written there, expected one at a time" in told
    assert [path.name for path in (case.folder / "run").iterdir()] == ["running.lock"]


def test_one_answer_to_each_line(case: Case) -> None:
    """Whatever U+2028, NEL or form feed it holds; an empty one too, and no byte order mark."""
    case.write("train.csv", "yes", "no")
    case.write("test.csv", "yes", "no", times=5)
    folder = str(case.folder / "run")
    short = ("--set", "federation.rounds=1", "--device", "cpu", "--threads", "1")
    assert case.says("run", str(case.config), "--out", folder, *short)[0] == 0
    lines = ["\ufeffit was good", "a\u2028b\x85c\fd\x0be", "", "  ", '["not, a list', "last\r"]
    (case.folder / "texts.txt").write_bytes(("\n".join(lines) + "\n").encode())
    code, out, _ = case.says("predict", folder, str(case.folder / "texts.txt"))
    answers = [json.loads(line) for line in out.split("\n") if line]
    assert code == 0 and all(each["answer"] in ("yes", "no") for each in answers)
    expected = ["it was good", *lines[1:5], "last"]
    assert [each["text"] for each in answers] == expected
