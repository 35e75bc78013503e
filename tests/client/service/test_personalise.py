"""`fedlora-node personalise`: a head, or LoRA's B too, that stays at the node and costs nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from fedlora.client.service import personalise as module
from fedlora.client.service.personalise import NOTE, personalise
from fedlora.common.adapter.peft import export_adapter, load_adapter
from fedlora.common.config.schema import LoraConfig, ModelConfig
from fedlora.common.errors import BadInput
from fedlora.common.model.network import build_model
from fedlora.common.model.state import AdapterState
from fedlora.common.tasks.classification import SequenceClassification
from fedlora.simulations import cli
from tests.client.institution import Institution
from tests.client.service.test_loaded_run import node_with_data
from tests.client.test_cli import run


def institution(root: Path, base: Path) -> Institution:
    """Texts with "good" are of a, others of b."""
    north = node_with_data(root, base)
    rows = [
        {"text": f"w{k} {('good good', 'bad bad')[k % 2]}", "label": "ab"[k % 2]} for k in range(40)
    ]
    (root / "notes.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return north


def adapter_of(folder: Path, base: Path, labels: tuple[str, ...] = ("a", "b")) -> Path:
    settings = ModelConfig(base=str(base), pooling="mean", max_length=16)
    lora = LoraConfig(rank=2)
    model = build_model(settings, lora, SequenceClassification(labels), seed=5)
    values = np.random.default_rng(0).normal(0, 0.2, model.spec.size).astype(np.float32)
    export_adapter(model, AdapterState(model.spec, values), settings, model.lora, 5, folder)
    return folder


@pytest.mark.parametrize("lora", [False, True], ids=["head", "lora"])
def test_it_stays_here_and_costs_nothing(
    lora: bool,
    tmp_path: Path,
    tiny_bert: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    north = institution(tmp_path / "n", tiny_bert)
    adapter, out = adapter_of(tmp_path / "adapter", tiny_bert), tmp_path / "own"
    before = north.ledger.entries()
    files = {path: path.stat().st_mtime_ns for path in north.root.rglob("*") if path.is_file()}
    words = ("personalise", str(adapter), "--out", str(out), "--node", str(north.root))
    code, said, _ = run(capsys, monkeypatch, *words, *(("--lora",) if lora else ()))
    title = "own head and adapter" if lora else "own head"
    assert code == 0 and f"{title} on records that it was not fitted to: loss" in said
    assert north.ledger.entries() == before
    assert files == {p: p.stat().st_mtime_ns for p in north.root.rglob("*") if p.is_file()}
    note = json.loads((out / NOTE).read_text())
    assert note["adapter" if lora else "own"]["loss"] < note["released"]["loss"]
    assert "without noise" in note["warning"]
    assert out.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o077 for path in out.rglob("*")} == {0}
    texts = ["w1 good good", "w2 bad bad"]
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    monkeypatch.setattr(sys, "argv", ["fedlora-sim", "predict", str(out), f"{tmp_path}/texts.txt"])
    with pytest.raises(SystemExit):
        cli.main()
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["answer"] for line in lines] == ["a", "b"]
    released, own = (load_adapter(each, str(tiny_bert)).model.state() for each in (adapter, out))
    moves = own.spec.moved_by("adapter.B" if lora else "head")
    assert np.array_equal(own.vector[~moves], released.vector[~moves])
    for mask in (own.spec.head_mask(), moves):
        assert (own.vector[mask] != released.vector[mask]).mean() > 0.9
    with pytest.raises(BadInput, match="expected a new folder"):
        personalise(north.folder, north.folder.load_policy(), adapter, out)


def test_what_does_not_fit_is_refused_before_data_are_read(
    tmp_path: Path, tiny_bert: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    north, out = institution(tmp_path / "n", tiny_bert), tmp_path / "own"
    policy = north.folder.load_policy()

    def read(*_: object) -> None:
        raise AssertionError("data were read")

    monkeypatch.setattr(module, "read_data", read)
    adapter = adapter_of(tmp_path / "adapter", tiny_bert)
    with pytest.raises(BadInput, match="--data letters: found no such data set, expected one of n"):
        personalise(north.folder, policy, adapter, out, "letters")
    others = adapter_of(tmp_path / "others", tiny_bert, ("a", "c"))
    with pytest.raises(BadInput, match="found 0 data sets"):
        personalise(north.folder, policy, others, out)
    elsewhere = adapter_of(tmp_path / "elsewhere", tiny_llama)
    with pytest.raises(BadInput, match=r"found base sha256:.*expected one of \[bases\]"):
        personalise(north.folder, policy, elsewhere, out)
    changed = json.loads((adapter / "fedlora.json").read_text())
    (adapter / "fedlora.json").write_text(json.dumps(changed | {"seed": 6}))
    with pytest.raises(BadInput, match="digest"):
        personalise(north.folder, policy, adapter, out)
    assert not out.exists()
