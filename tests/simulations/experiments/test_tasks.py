"""A small federation of each task, from its file to an answer; ε is what classification's is."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from fedlora.common.config.task_names import LANGUAGES
from fedlora.simulations import cli
from tests.tasks import IDS, MADE, Made

ROUNDS = """
[server]
average_last = 0.0
"""


SECTIONS = {
    "sequence-classification": "errors",
    "image-classification": "errors",
    "multi-label": "labels",
    "token-classification": "labels",
}


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["fedlora-sim", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code


@pytest.mark.parametrize("made", MADE, ids=IDS)
def test_a_federation_of_each_task(
    made: Made,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, count, seed in (("train", 60, 1), ("validation", 20, 2), ("test", 20, 3)):
        made.write(tmp_path / f"{name}.jsonl", count, seed)
    base = request.getfixturevalue(made.base)
    config = tmp_path / "run.toml"
    config.write_text(made.config(base, tmp_path, ROUNDS), encoding="utf-8")
    (tmp_path / "lines.txt").write_text(made.line + "\n", encoding="utf-8")
    folder = str(tmp_path / "run")
    short = ("--set", "federation.rounds=3", "--threads", "1", "--device", "cpu")
    # of few units LoRA has rounds where it is asked
    asked = () if made.task in LANGUAGES else ("--set", "training.moves=lora")
    run(monkeypatch, "run", str(config), "--out", folder, *short, *asked)
    summary: dict[str, Any] = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["task"] == made.task and math.isfinite(summary[made.metric])
    assert 7.9 < summary["epsilon"] <= 8.0  # calibrated to it, whatever the loss
    weights = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    moved = any(value.any() for name, value in weights.items() if ".lora_B." in name)
    assert moved == summary["phases"][-1]["released"]  # validation may keep the head alone
    page = (tmp_path / "run" / "report.html").read_text()
    assert made.metric.replace("_", " ") in page.lower()
    assert f'id="{SECTIONS.get(made.task, "answers")}"' in page
    if made.metric == "perplexity":
        assert len(summary["samples"]) == 5 and all(each["expected"] for each in summary["samples"])
        assert "Answers to public prompts" in page
        assert all(0 <= summary[each] <= 100 for each in ("chrf", "bleu"))
        assert "chrF of answers" in page
    capsys.readouterr()
    run(monkeypatch, "predict", folder, str(tmp_path / "lines.txt"))
    (answer,) = capsys.readouterr().out.splitlines()
    assert json.loads(answer)["answer"] is not None
