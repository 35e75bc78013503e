"""Bases that once trained something else than they said, or ended in a traceback.

The folders of `../shared/cases` are run as a person runs them, where they lie beside the checkout;
each kind is tested on small bases too, here or beside what it tests. Whatever is refused is refused
in one line, with exit code 2, before a ledger is opened.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fedlora.client.service.dialogue import PRIVATE_REASON
from fedlora.client.service.loaded_run import LoadedRun
from fedlora.common.adapter.peft import load_adapter
from fedlora.common.config.load import load_config, parse_config
from fedlora.common.config.schema import Config
from fedlora.common.data.records import Records
from fedlora.common.model import compute
from fedlora.common.model.base import base_digest
from fedlora.common.protocol.messages import Decline
from fedlora.common.tasks.batch import Tokenised
from fedlora.server.rounds.checkpoint import Progress
from fedlora.server.runs.run import conduct
from fedlora.simulations import cli
from fedlora.simulations.begin import begin
from fedlora.simulations.engines.sequential import sequential
from fedlora.simulations.federation.run_folder import finish
from fedlora.simulations.options import Options
from tests.client.institution import POLICY, Institution, manifest_of, offer_of
from tests.conftest import SHARED, WORDS

CASES = SHARED.parent / "cases"
REFUSED = {
    "10-test-is-train": '[data] test = "test.csv": found only texts of train.csv, the training',
    "01-no-tokenizer": "found no tokenizer",
    "02-missing-weights": "found no weights in the files for bert.pooler.dense.bias",
    "03-prefixed-weights": "(37 such), expected all that are not trained; the files' names begin",
    "12-lora-target-typo": '[lora] targets = "valeu"',
    "16-encoder-decoder": "expected an encoder or a decoder",
    "17-embedding-target": "found an embedding (embeddings.word_embeddings)",
    "18-quantised-base": "quantised by bitsandbytes",
    "21-nan-weights": "found values that are not finite in encoder.layer.0",
    "23-head-rounds-own-head": "expected pooling = mean or layers",
}
CONFIG = """
seed = 7
[model]
base = "{base}"
pooling = "mean"
max_length = 16
[lora]
rank = 2
[data]
train = "{data}/train.jsonl"
test = "{data}/test.jsonl"
labels = ["good", "não"]
validation = 0.2
[federation]
clients = 2
partition = "iid"
rounds = 3
[training]
steps = 1
sampling_rate = 0.5
expected_units = 10
learning_rate = 0.1
[privacy]
mode = "{mode}"
delta = 1e-4
"""


@pytest.fixture
def case(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a shared case, which is the working directory."""
    folder = CASES / str(request.param)
    if not folder.is_dir():
        pytest.skip("the cases (../shared/cases) are not beside this checkout")
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, count in (("train", 40), ("test", 12)):
        rows = [
            {"text": " ".join(rng.choice(WORDS, 5)), "label": ("good", "não")[row % 2]}
            for row in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str
) -> tuple[int, str]:
    """Exit code and errors of fedlora-sim."""
    monkeypatch.setattr(sys, "argv", ["fedlora-sim", *words])
    try:
        cli.main()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    return code, capsys.readouterr().err


def whole(config: Config, folder: Path) -> dict[str, Any]:
    run = begin(config, folder)
    return finish(run, conduct(run, sequential(run)))


def refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], run: str, out: Path
) -> str:
    """The one line of a private run that is refused before it has a budget to charge."""
    words = ("run", run, "--out", str(out / "run"))
    code, err = call(monkeypatch, capsys, *words, "--set", "privacy.mode=record")
    assert code == 2 and "Traceback" not in err, err
    assert len(err.splitlines()) == 1 and err.startswith("fedlora-sim: "), err
    assert not (out / "run" / "ledger.sqlite").exists()
    assert not (out / "run" / "checkpoint").exists()
    return err


@pytest.mark.parametrize(("case", "said"), REFUSED.items(), indirect=["case"])
def test_a_case_is_refused_before_anything_is_charged(
    case: Path,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert said in refused(monkeypatch, capsys, "run.toml", tmp_path)


def test_a_base_without_a_weight_is_refused_before_anything_is_charged(
    tiny_bert: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = without_a_weight(tiny_bert, tmp_path)
    (tmp_path / "run.toml").write_text(CONFIG.format(base=base, data=data, mode="record"))
    line = refused(monkeypatch, capsys, str(tmp_path / "run.toml"), tmp_path)
    assert f"[model] base = {base}: found no weights in the files" in line


def without_a_weight(base: Path, scratch: Path) -> Path:
    folder = Path(shutil.copytree(base, scratch / "base"))
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("encoder.layer.1.attention.self.query.bias")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_node_declines_such_a_base_without_a_private_fact(
    tiny_bert: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither where a base lies at a node nor what is wrong with it: its own log says where."""
    base = without_a_weight(tiny_bert, tmp_path)
    north = Institution(tmp_path / "north")
    north.set_policy(POLICY.format(base=base_digest(base), folder=base))
    rows = [json.dumps({"text": f"w{k} good", "label": "ab"[k % 2]}) for k in range(8)]
    (north.root / "notes.jsonl").write_text("\n".join(rows))
    north.ledger.close()
    north.restart()
    north.restart(LoadedRun(north.folder, north.folder.load_policy(), north.ledger))
    run = manifest_of(base_digest=base_digest(base))
    before = [entry.hash for entry in north.ledger.entries()]
    reply = north.ask(offer_of(run))
    assert isinstance(reply, Decline) and reply.reason == PRIVATE_REASON and not reply.refused
    assert [entry.hash for entry in north.ledger.entries()] == before
    assert not north.ledger.spent("people").epsilon
    assert not north.folder.run(run.digest).exists()
    assert "BadInput at weights.py" in caplog.text  # places alone: `check-data` says what is wrong


@pytest.mark.parametrize("case", ["05-pad-id-differs"], indirect=True)
def test_a_label_does_not_depend_on_the_company_of_a_text(case: Path, tmp_path: Path) -> None:
    summary = whole(load_config(case / "run.toml"), tmp_path / "run")
    assert summary["adapter_digest"]
    loaded = load_adapter(tmp_path / "run" / "adapter")
    texts = ["free offer", "you meeting call home ok ok", "ok", "urgent claim " * 20]
    alone = torch.cat([loaded.logits([text]) for text in texts])
    assert torch.allclose(loaded.logits(texts), alone, atol=1e-5)
    assert not torch.allclose(alone[0], alone[1], atol=1e-3)  # texts do matter


@pytest.mark.parametrize("case", ["07-functional-dropout"], indirect=True)
def test_two_runs_without_privacy_are_equal(case: Path, tmp_path: Path) -> None:
    config = load_config(case / "run.toml", ["training.precision=fp32", "training.attention=eager"])
    first, second = (whole(config, tmp_path / name)["adapter_digest"] for name in "ab")
    assert first == second


@pytest.mark.parametrize("case", ["13-no-sdpa"], indirect=True)
def test_a_base_without_fused_attention_has_the_other(case: Path, tmp_path: Path) -> None:
    whole(load_config(case / "run.toml"), tmp_path / "run")
    kept = json.loads((tmp_path / "run" / compute.COMPUTE).read_text())
    assert kept["cpu"]["attention"] == "eager"
    logits = load_adapter(tmp_path / "run" / "adapter").logits(["free offer", "ok"])
    assert logits.shape == (2, 2) and bool(torch.isfinite(logits).all())


@pytest.mark.parametrize("case", ["14-finetuned-base"], indirect=True)
def test_a_base_for_other_labels_has_a_new_head(case: Path, tmp_path: Path) -> None:
    whole(load_config(case / "run.toml"), tmp_path / "run")
    assert load_adapter(tmp_path / "run" / "adapter").logits(["ok"]).shape == (1, 2)


@pytest.mark.parametrize("case", ["25-cut-splices-last-token"], indirect=True)
def test_a_text_is_cut_at_its_end(case: Path, tmp_path: Path) -> None:
    whole(load_config(case / "run.toml"), tmp_path / "run")
    model = load_adapter(tmp_path / "run" / "adapter").model
    text = "you meeting call home ok ok claim urgent free free offer win"
    records = Records([text], None, np.zeros(1, dtype=np.int64), None, {}, "test")
    data = model.task.encode(records, model.tokenizer, 8)
    assert isinstance(data, Tokenised)
    found = data.tokens.tolist()
    assert found == model.tokenizer(text)["input_ids"][:8]


class Stopwatch:
    """The first of four alternatives wins; from then on it is the last."""

    def __init__(self) -> None:
        self.turned = False
        self.calls = 0

    def __call__(self, work: Callable[[], object]) -> float:
        self.calls += 1
        return float(-self.calls if self.turned else self.calls)


def resumed(config: Config, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A run that was interrupted after its first round, and whose machine then had other work."""
    watch = Stopwatch()
    monkeypatch.setattr(compute, "_fastest", watch)
    monkeypatch.setattr(compute, "matmul_seconds", lambda dtype, device: 1.0)

    def stop(number: int, figures: object) -> None:
        raise KeyboardInterrupt

    run = begin(config, folder)
    with pytest.raises(KeyboardInterrupt):
        conduct(run, sequential(run), stop)
    assert watch.calls >= 2
    watch.turned = True
    run.ledger.close()
    run = begin(config, folder, Options(resume=True))
    done: Progress = conduct(run, sequential(run))
    return finish(run, done)


def uninterrupted(config: Config, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(compute, "_fastest", Stopwatch())
    monkeypatch.setattr(compute, "matmul_seconds", lambda dtype, device: 1.0)
    return whole(config, folder)


def test_what_a_stopwatch_chose_holds_to_the_end_of_a_run(
    tiny_bert: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Case 27: in one process it was bfloat16, in the next one float32."""
    config = parse_config(CONFIG.format(base=tiny_bert, data=data, mode="none"), "test")
    first = uninterrupted(config, tmp_path / "a", monkeypatch)
    second = resumed(config, tmp_path / "b", monkeypatch)
    assert first["adapter_digest"] == second["adapter_digest"]


@pytest.mark.parametrize("case", ["27-timing-decides-bits"], indirect=True)
def test_a_case_resumes_as_it_began(
    case: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(case / "run.toml")
    config = replace(config, federation=replace(config.federation, rounds=3))
    first = uninterrupted(config, tmp_path / "a", monkeypatch)
    second = resumed(config, tmp_path / "b", monkeypatch)
    assert first["adapter_digest"] == second["adapter_digest"]


def test_a_new_run_measures_anew(
    tiny_bert: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a beginning left that was killed is another run's."""
    config = parse_config(CONFIG.format(base=tiny_bert, data=data, mode="none"), "test")
    (tmp_path / "run").mkdir()
    kept = {"cpu": {"attention": "eager", "precision": "bf16"}}
    (tmp_path / "run" / compute.COMPUTE).write_text(json.dumps(kept))
    monkeypatch.setattr(compute, "_fastest", Stopwatch())
    run = begin(config, tmp_path / "run")
    assert run.federation.public.compute.attention == "sdpa"


def in_plain_ascii(folder: Path, config: Path) -> str:
    """What fedlora-sim says that resumes under a locale without any other letter."""
    environment = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    code = (
        "import sys; sys.argv[0] = 'fedlora-sim'; from fedlora.simulations.cli import main; main()"
    )
    command = [sys.executable, "-c", code, "run", str(config), "--out", str(folder), "--resume"]
    ended = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, check=False
    )
    assert ended.returncode == 0, ended.stderr.decode()
    return ended.stderr.decode()


@pytest.mark.parametrize("case", ["26-locale-resume"], indirect=True)
def test_a_case_resumes_under_any_locale(case: Path, tmp_path: Path) -> None:
    whole(load_config(case / "run.toml"), tmp_path / "run")
    assert "Traceback" not in in_plain_ascii(tmp_path / "run", case / "run.toml")


def test_a_run_resumes_under_any_locale(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    """Case 26: files were read in the locale's encoding, and a label is not plain ASCII."""
    path = tmp_path / "run.toml"
    path.write_text(CONFIG.format(base=tiny_bert, data=data, mode="none"), encoding="utf-8")
    whole(load_config(path), tmp_path / "run")
    assert "Traceback" not in in_plain_ascii(tmp_path / "run", path)
