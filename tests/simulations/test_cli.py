"""The command line says what is wrong in one line to a fault, and with the right exit code."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from fedlora.common.adapter import peft
from fedlora.common.config.load import load_config
from fedlora.common.config.schema import open_fields
from fedlora.common.tasks.task import RECORD
from fedlora.common.tasks.token_classification import TokenClassification
from fedlora.simulations import cli


def call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["fedlora-sim", *words])
    try:
        cli.main()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def test_every_fault_is_a_line_and_the_exit_code_is_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    bad = tmp_path / "bad.toml"
    bad.write_text("[privacy]\nepsilon = nan\ndelta = 'x'\n[modle]\nbase = 1\n")
    code, _, err = call(monkeypatch, capsys, "run", str(bad))
    assert code == 2 and "Traceback" not in err
    lines = err.strip().splitlines()
    assert len(lines) == 3 and all(line.startswith("fedlora-sim: bad.toml") for line in lines)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("run", "no-such-file.toml"), "no-such-file.toml"),
        (("run", "quickstart", "--engine", "batched"), "expected one of sequential, ray"),
        (("run", "quickstart", "--engine", "warp"), "expected one of sequential, ray"),
        (
            (
                "run",
                "quickstart",
                "--set",
                "aggregation.secure=true",
                "--set",
                "federation.clients=4",
            ),
            "expected at most the 4 institutions of a round",
        ),
        (
            ("run", "quickstart", "--set", "privacy.mode=client"),
            "expected [aggregation] secure = true",
        ),
        (("run", "quickstart", "--gpu-share", "0.5"), "expected --engine ray"),
        (("run", "quickstart", "--device", "tpu"), "expected cpu, cuda or auto"),
        (("sweep", "quickstart", "--over", "epsilon"), "section.key=VALUE"),
        (("report", "no-such-run"), "expected a run that has finished"),
        (("predict", "no-such-run", "texts.txt"), "texts.txt"),
        (("predict", "no-such-run", "."), "(Is a directory), expected a file of UTF-8, one text"),
        (("no-such-command",), "No such command"),
        (("run",), "fedlora-sim: run: found neither a configuration nor --train"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_can_not_be_done_exits_with_2(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    words: tuple[str, ...],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = call(monkeypatch, capsys, *words)
    assert code == 2 and "Traceback" not in err
    assert said in " ".join((out + err).split())


class Answering:
    """An adapter that answers each input by what it is."""

    def __init__(self, medium: str | None = None, task: object = None) -> None:
        given = task or SimpleNamespace(medium=medium, reads=RECORD)
        self.model = SimpleNamespace(task=given)

    def predict(self, asked: list[object]) -> list[str]:
        return [str(each) for each in asked]


def test_a_line_is_a_path_where_records_are_files(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Also one that looks like a list, which a text model would take for a pair."""
    monkeypatch.setattr(peft, "load_adapter", lambda *_: Answering("images"))
    (tmp_path / "files.txt").write_text('a/b.png\n["a", "b"]\n', encoding="utf-8")
    code, out, _ = call(monkeypatch, capsys, "predict", "run", str(tmp_path / "files.txt"))
    answers = [json.loads(line)["answer"] for line in out.splitlines()]
    assert code == 0 and answers == [str(tmp_path / each) for each in ("a/b.png", '["a", "b"]')]


def test_tags_stand_beside_their_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """As many as were read: which words a text has, nobody else could tell."""
    loaded = Answering(task=TokenClassification(("O", "B-place", "I-place")))
    monkeypatch.setattr(loaded, "predict", lambda asked: [["O", "O", "B-place"], ["O"]])
    monkeypatch.setattr(peft, "load_adapter", lambda *_: loaded)
    (tmp_path / "texts.txt").write_text('a, b and c\n["a b", "c"]\n', encoding="utf-8")
    code, out, _ = call(monkeypatch, capsys, "predict", "run", str(tmp_path / "texts.txt"))
    words = [json.loads(line)["words"] for line in out.splitlines()]
    assert code == 0 and words == [["a", ",", "b"], ["a b"]]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_no_letter_of_an_answer_is_lost_to_an_encoding(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    encoding: str,
) -> None:
    """Where standard output lacks a letter it stands as JSON's own escape, and was a "?"."""
    monkeypatch.setattr(peft, "load_adapter", lambda *_: Answering())
    (tmp_path / "texts.txt").write_text("não ε\n", encoding="utf-8")
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    assert call(monkeypatch, capsys, "predict", "run", str(tmp_path / "texts.txt"))[0] == 0
    sys.stdout.flush()
    assert json.loads(written.getvalue().decode()) == {"text": "não ε", "answer": "não ε"}


def test_ctrl_c_prints_the_command_that_resumes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from fedlora.simulations.experiments import simulate

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(simulate, "simulate", interrupted)
    monkeypatch.chdir(tmp_path)
    code, _, err = call(monkeypatch, capsys, "run", "quickstart", "--out", "a b")
    assert code == 1
    said = " ".join(err.split())
    assert "fedlora-sim run quickstart --out 'a b' --resume" in said
    assert "where no run had begun the same command begins again" in said


def test_help_is_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(monkeypatch, capsys, "--help")
    assert code == 0
    for command in ("quickstart", "plan", "run", "sweep", "report", "predict", "serve"):
        assert command in out


def table_of(folder: Path, rows: int) -> Path:
    """A person's own file, with names of columns of their own."""
    path = folder / "my.csv"
    lines = [f"w{k % 50} w{k % 7} {'good' if k % 2 else 'bad'},{'ab'[k % 2]}" for k in range(rows)]
    path.write_text("body,topic\n" + "\n".join(lines) + "\n")
    return path


def test_a_file_of_ones_own_needs_no_configuration(
    tiny_bert: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A tenth is set aside as public, which the statement says; what was chosen can be edited."""
    out = tmp_path / "run"
    words = ["run", "--train", str(table_of(tmp_path, 120)), "--text", "body", "--label", "topic"]
    words += ["--epsilon", "8", "--base", str(tiny_bert), "--clients", "2", "--out", str(out)]
    few = ["--set", "federation.rounds=3", "--set", "privacy.delta=1e-4"]
    code, _, error = call(monkeypatch, capsys, *words, *few)
    assert code == 0, error
    summary = json.loads((out / "summary.json").read_text())
    assert [phase["phase"] for phase in summary["phases"]] == ["head"]  # of so few units
    assert summary["epsilon"] <= 8.0 and 6 <= sum(map(sum, summary["confusion"])) <= 18
    statement = " ".join(summary["privacy_statement"])
    assert "public: the test part, validation part and label set." in statement and re.search(
        "about 1[01]0 units", statement
    )
    assert "training.head_rounds" in summary["chosen"]
    assert (out / "report.html").is_file()
    decided = load_config(out / "config.toml")
    assert open_fields(decided) == () and decided.federation.rounds == 3
    code, _, error = call(monkeypatch, capsys, *words, *few, "--resume")
    assert code == 0, error
    code, _, error = call(monkeypatch, capsys, "merge", str(out), "--out", str(tmp_path / "model"))
    assert code == 0 and (tmp_path / "model" / "model.safetensors").is_file(), error
    assert call(monkeypatch, capsys, "export", str(out), "--out", "x", "--merge", "--onnx")[0] == 2
    for more, name in (
        ((), "adapter_model.safetensors"),
        (("--merge",), "model.safetensors"),
        (("--onnx",), "model.onnx"),
    ):
        target = tmp_path / name
        words = ["export", str(out), "--out", str(target), *more]
        code, _, error = call(monkeypatch, capsys, *words)
        assert code == 0 and (target / name).is_file(), error
        assert call(monkeypatch, capsys, *words)[0] == 2  # nothing is overwritten
    weights = (out / "adapter" / "adapter_model.safetensors").read_bytes()
    (out / "adapter" / "adapter_model.safetensors").write_bytes(weights[:-1] + b"\x01")
    code, _, error = call(
        monkeypatch, capsys, "export", str(out), "--out", str(tmp_path / "damaged")
    )
    assert code == 2 and not (tmp_path / "damaged").exists(), error
