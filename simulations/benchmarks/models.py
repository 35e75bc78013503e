"""The matrix of bases: which families of transformers train here, and that it is right.

Each family is a small random base on disk (`families`), examined as a run would use it:

    sum       the private clipped sum is that of a batch-of-one loop
    one unit  what one unit more or less moves it by, in clips
    twice     two evaluations of one adapter are equal to the bit
    export    PEFT alone gives the exported adapter's logits

    python simulations/benchmarks/models.py [--markdown] [FAMILY ...]
"""

from __future__ import annotations

import argparse
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import peft
import torch

from fedlora.client.training.step import ClipGroups, PerSampleGradients
from fedlora.common.adapter.peft import export_adapter
from fedlora.common.config.schema import LoraConfig, ModelConfig
from fedlora.common.data.records import Records, UnitIndex, unit_groups
from fedlora.common.errors import BadInput
from fedlora.common.model import loading
from fedlora.common.model.network import AdapterModel, build_model
from fedlora.common.model.pooling import PooledClassifier
from fedlora.common.model.state import AdapterState
from fedlora.common.tasks.batch import Encoded
from fedlora.common.tasks.causal_lm import CausalLanguageModel
from fedlora.common.tasks.classification import SequenceClassification
from fedlora.common.tasks.task import Task
from fedlora.simulations.benchmarks.families import FAMILIES
from fedlora.simulations.benchmarks.random_base import WORDS, Family

Vector = npt.NDArray[np.float64]
Drawn = npt.NDArray[np.int64]
Oracle = Callable[[AdapterModel, Encoded, UnitIndex, Drawn, ClipGroups], Vector]
LABELS = ("a", "b", "c")
LENGTH = 24
CLIP = 0.05
UNITS = (1, 1, 3, 1, 2, 1)  # records of each unit


@dataclass(frozen=True)
class Use:
    """What a base is used for."""

    task: str
    pooling: str
    targets: tuple[str, ...] = ("auto",)

    @property
    def name(self) -> str:
        """As the table shows it."""
        return "causal-lm" if self.task == "causal-lm" else f"classifier, {self.pooling}"


CLASSIFIER, OWN = Use("sequence-classification", "mean"), Use("sequence-classification", "default")
LANGUAGE = Use("causal-lm", "default")


@dataclass(frozen=True)
class Findings:
    """What an examination saw."""

    attention: str
    one_by_one: bool
    targets: tuple[str, ...]
    error: float  # of the clipped sum, relative to the units' clips
    moved: float  # by one unit, in clips: the most of all units
    same_bits: bool
    export_error: float  # of the exported adapter's logits in PEFT alone, relative

    @property
    def faults(self) -> list[str]:
        """What is not as it should be."""
        checks = {
            f"sum off by {self.error:.1g}": self.error < 1e-5,
            f"one unit moves {self.moved:.4f} clips": self.moved <= 1 + 1e-6,
            "two evaluations differ": self.same_bits,
            f"PEFT's logits off by {self.export_error:.1g}": self.export_error < 1e-4,
        }
        return [fault for fault, right in checks.items() if not right]


def uses(family: Family) -> tuple[Use, ...]:
    """What a family can be used for."""
    return (CLASSIFIER, OWN, LANGUAGE) if family.kind == "decoder" else (CLASSIFIER, OWN)


def examine(base: Path, use: Use, scratch: Path, oracle: Oracle) -> Findings:
    """Train and export on `base`; BadInput where it is refused."""
    settings = ModelConfig(base=str(base), task=use.task, pooling=use.pooling, max_length=LENGTH)
    lora = LoraConfig(rank=2, targets=use.targets)
    task: Task = (
        CausalLanguageModel() if use.task == "causal-lm" else SequenceClassification(LABELS)
    )
    model, reference = (build_model(settings, lora, task, 5) for _ in range(2))
    for each in (model, reference):
        each.load(awake(each))
    gradients = PerSampleGradients(model)
    names = [str(unit) for unit, size in enumerate(UNITS) for _ in range(size)]
    units, data = unit_groups(names), task.encode(records(len(names)), model.tokenizer, LENGTH)
    groups, drawn = ClipGroups.flat(model.spec, CLIP), np.arange(len(UNITS), dtype=np.int64)

    def summed(chosen: Drawn) -> Vector:
        return gradients.clipped_sum(data, units, chosen, groups, 4096).vector

    total, without = summed(drawn), [summed(np.delete(drawn, unit)) for unit in drawn]
    expected = oracle(reference, data, units, drawn, groups)
    return Findings(
        attention=str(_config(model)._attn_implementation),
        one_by_one=gradients.one_by_one,
        targets=model.lora.targets,
        error=float(np.linalg.norm(total - expected)) / (CLIP * len(UNITS)),
        moved=max(float(np.linalg.norm(total - each)) for each in without) / CLIP,
        same_bits=torch.equal(logits(model, data), logits(model, data)),
        export_error=_export_error(model, data, settings, scratch),
    )


def awake(model: AdapterModel) -> AdapterState:
    """Random values, so that no gradient is zero only because B is."""
    rng = np.random.default_rng(3)
    return AdapterState(model.spec, rng.normal(0, 0.05, model.spec.size).astype(np.float32))


def records(count: int) -> Records:
    """Texts of words, some as long as the model reads; a class and a response to each."""
    rng = np.random.default_rng(1)

    def text(longest: int) -> str:
        return " ".join(rng.choice(WORDS, rng.integers(2, longest)))

    texts, responses = ([text(longest) for _ in range(count)] for longest in (18, 6))
    labels = np.arange(count, dtype=np.int64) % len(LABELS)
    return Records(texts, responses, labels, None, {}, "benchmark")


def logits(model: AdapterModel, data: Encoded) -> torch.Tensor:
    """Of all records in one batch, without gradients."""
    with torch.no_grad():
        return model.logits(_batch(model, data))


def by_ones(
    model: AdapterModel, data: Encoded, units: UnitIndex, drawn: Drawn, groups: ClipGroups
) -> Vector:
    """A batch-of-one loop with plain autograd."""
    total = np.zeros(model.spec.size)
    for unit in drawn:
        whole = np.zeros(model.spec.size)
        for row in units.records[units.offsets[unit] : units.offsets[unit + 1]]:
            batch = data.batch(np.array([row]), model.pad, model.device)
            loss = model.task.losses(model.logits(batch), batch).sum()
            parts = torch.autograd.grad(loss, list(model.parameters.values()))
            whole += np.concatenate([part.double().numpy().ravel() for part in parts])
        total += whole * min(1.0, groups.bounds[0] / max(float(np.linalg.norm(whole)), 1e-30))
    return total


def _batch(model: AdapterModel, data: Encoded) -> Any:
    return data.batch(np.arange(len(data), dtype=np.int64), model.pad, model.device)


def _config(model: AdapterModel) -> Any:
    backbone: Any = model.network.backbone
    return backbone.get_base_model().config


def _export_error(
    model: AdapterModel, data: Encoded, settings: ModelConfig, scratch: Path
) -> float:
    """Largest difference between our hidden states or logits and those of PEFT alone, relative."""
    export_adapter(model, awake(model), settings, model.lora, 5, scratch)
    base, batch = Path(settings.base), _batch(model, data)
    if isinstance(model.network, PooledClassifier):
        plain = loading.load_backbone(base)
    elif settings.task == "causal-lm":
        plain = loading.load_language_model(base)
    else:
        plain, _ = loading.load_classifier(base, len(LABELS))
        text = plain.config.get_text_config()
        text.pad_token_id = text.pad_token_id if text.pad_token_id is not None else model.pad
    plain.set_attn_implementation(_config(model)._attn_implementation)
    with warnings.catch_warnings():  # it sets by each layer's kind what it warns of
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        alone = peft.PeftModel.from_pretrained(plain, str(scratch)).eval()
    inputs = {"input_ids": batch.ids, "attention_mask": batch.mask}
    with torch.no_grad():
        if isinstance(model.network, PooledClassifier):
            ours = model.pooled(batch)
            hidden = alone(**inputs, output_hidden_states=True).hidden_states
            theirs = model.network.pooling.means(hidden, batch.mask)
        else:
            ours, theirs = model.logits(batch), alone(**inputs).logits
    return float((ours - theirs).abs().max() / ours.abs().max())


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    family: str
    use: str
    attention: str
    result: str
    seconds: float


def rows(families: tuple[Family, ...], folder: Path) -> Iterator[Row]:
    """One for each family and use, tried when it is asked for."""
    for family in families:
        base = family.save(folder / family.name.replace(" ", "-"))
        for use in uses(family):
            started = time.perf_counter()
            attention, result = _result(base, use, folder / "adapter")
            yield Row(family.name, use.name, attention, result, time.perf_counter() - started)


def _result(base: Path, use: Use, scratch: Path) -> tuple[str, str]:
    try:
        found = examine(base, use, scratch, by_ones)
        linear = examine(base, replace(use, targets=("all-linear",)), scratch, by_ones)
    except BadInput as error:
        return "", f"refused: {str(error).replace(str(base), base.name)}"
    except Exception:
        traceback.print_exc()
        return "", "TRACEBACK"
    faults = [*found.faults, *(f"all-linear: {fault}" for fault in linear.faults)]
    if faults:
        return found.attention, f"WRONG: {'; '.join(faults)}"
    way = ", one record at a time" if found.one_by_one else ""
    return found.attention, f"right{way} ({', '.join(found.targets)})"


def main() -> None:
    """Try families on random weights, and print what each did."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("families", nargs="*")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    chosen = tuple(f for f in FAMILIES if not asked.families or f.name in asked.families)
    line = "| {0.family} | {0.use} | {0.attention} | {0.result} | {0.seconds:.1f} |"
    if not asked.markdown:
        line = "{0.family:12} {0.use:20} {0.attention:6} {0.seconds:5.1f}  {0.result}"
    with tempfile.TemporaryDirectory() as folder:
        for row in rows(chosen, Path(folder)):
            print(line.format(row), flush=True)


if __name__ == "__main__":
    main()
