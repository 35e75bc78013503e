"""Ten changed lines: Hugging Face's script, and the private federation that it becomes."""

from __future__ import annotations

import csv
import difflib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from transformers import AutoModelForSequenceClassification, TrainingArguments

from fedlora.common.errors import BadInput
from fedlora.simulations import FederatedTrainer, load_config
from fedlora.simulations.examples import fine_tuning, private_fine_tuning
from tests.simulations.test_cli import call

FEW = load_config(
    federation={"rounds": 2, "clients": 2, "spare_rounds": 0},
    training={"sampling_rate": 0.1, "steps": 1},
    privacy={"epsilon": 8.0, "delta": 1e-4},
)


def test_ten_lines_make_a_script_a_private_federation() -> None:
    """Each line that was added, removed or put in another's place counts once."""
    before, after = (
        Path(str(module.__file__)).read_text().splitlines()
        for module in (fine_tuning, private_fine_tuning)
    )
    changes = difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes()
    counted = [max(b - a, d - c) for kind, a, b, c, d in changes if kind != "equal"]
    assert 0 < sum(counted) <= 10


def rows(count: int) -> list[dict[str, str]]:
    return [
        {"text": f"w{k % 50} w{k % 7} {('good', 'bad')[k % 2]}", "label": "ab"[k % 2]}
        for k in range(count)
    ]


@pytest.mark.filterwarnings("ignore:'pin_memory'")  # what Trainer asks of a machine without a GPU
def test_the_script_states_what_the_command_line_states(
    tiny_bert: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The same ε to the digit, of the configuration that the script's run leaves."""
    file, out = tmp_path / "my.csv", tmp_path / "out"
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["text", "label"])
        writer.writeheader()
        writer.writerows(rows(120))
    monkeypatch.setattr(private_fine_tuning, "load_config", lambda **_: FEW)
    scores = private_fine_tuning.main(str(file), str(tiny_bert), str(out))
    summary = json.loads((out / "summary.json").read_text())
    assert 0 < summary["epsilon"] <= 8.0 and summary["own"] == {}
    # Trainer's own loop scores the adapter that was released
    assert abs(scores["eval_loss"] - summary["loss"]) < 1e-3
    words = ("run", str(out / "config.toml"), "--out", str(tmp_path / "cli"))
    assert call(monkeypatch, capsys, *words)[0] == 0
    assert (
        json.loads((tmp_path / "cli" / "summary.json").read_text())["epsilon"]
        == (summary["epsilon"])
    )


class Smoothed(FederatedTrainer):
    """A loss of each record."""

    def compute_loss(  # type: ignore[override]
        self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any
    ) -> Any:
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = functional.cross_entropy(
            outputs.logits, labels, reduction="none", label_smoothing=0.1
        )
        return (loss, outputs) if return_outputs else loss


class Averaged(Smoothed):
    """As most scripts have it."""

    def compute_loss(self, *arguments: Any, **named: Any) -> Any:
        return super().compute_loss(*arguments, **named).mean()


class Elsewhere(Smoothed):
    """It changes what the model reads."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], **named: Any) -> Any:  # type: ignore[override]
        return super().compute_loss(
            model, {**inputs, "input_ids": inputs["input_ids"].flip(0)}, **named
        )


def trainer(kind: type[FederatedTrainer], base: Path, out: Path, **more: Any) -> FederatedTrainer:
    records = [{"text": row["text"], "label": "ab".index(row["label"])} for row in rows(80)]
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    if more.pop("adapted", True):
        lora = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"])
        model = get_peft_model(model, lora)
    arguments = TrainingArguments(str(out), report_to="none", use_cpu=True)
    sets: dict[str, Any] = {"train_dataset": records[10:], "eval_dataset": records[:10]}
    return kind(model, arguments, config=FEW, **{**sets, **more})


def test_a_subclass_with_a_loss_of_each_record_trains(tiny_bert: Path, tmp_path: Path) -> None:
    mine = trainer(Smoothed, tiny_bert, tmp_path / "out")
    before = {name: each.clone() for name, each in mine.model.named_parameters()}  # type: ignore[union-attr]
    output = mine.train()
    assert mine.result is not None and output.metrics["epsilon"] == mine.result.epsilon
    assert mine.result.summary["own"] == {"loss": "Smoothed.compute_loss"}
    moved = [
        name
        for name, each in mine.model.named_parameters()  # type: ignore[union-attr]
        if not torch.equal(each, before[name])
    ]
    assert moved and all("lora_" in name or "modules_to_save" in name for name in moved)


@pytest.mark.parametrize(
    ("kind", "more", "said"),
    [
        (Averaged, {}, r"loss: found \(\), expected \(8,\)"),
        (Elsewhere, {}, "called on other inputs than given"),
        (FederatedTrainer, {"compute_loss_func": lambda o, y, **_: o["logits"].sum()}, "expected"),
        (FederatedTrainer, {"eval_dataset": None}, "eval_dataset: found NoneType"),
        (FederatedTrainer, {"adapted": False}, "expected one of PEFT with LoRA"),
    ],
    ids=["a-mean", "other-inputs", "a-function", "no-test", "no-adapter"],
)
def test_what_can_not_be_trained_is_said_first(
    kind: type[FederatedTrainer], more: dict[str, Any], said: str, tiny_bert: Path, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match=said):
        trainer(kind, tiny_bert, tmp_path / "out", **more).train()
    assert not (tmp_path / "out" / "ledger.sqlite").exists()
