"""The released adapter as files, and the way to load it again.

`adapter/` is a PEFT folder: `PeftModel.from_pretrained(base, "adapter")` gives the adapted backbone. Where
the head is ours, `head.safetensors` and `head.json` lie beside it, and three lines load both:

    from fedlora.common.export import load_adapter
    classifier = load_adapter("runs/ag_news/adapter")
    print(classifier.predict(["Oil prices rose on Monday."]))

Only safetensors and JSON are read; a folder that asks for code or pickled weights is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from safetensors.numpy import load, save_file

from fedlora.common.base import refuse_code
from fedlora.common.config import LoraConfig, ModelConfig, check_rules
from fedlora.common.data import Records
from fedlora.common.errors import BadInput
from fedlora.common.features import length_batches
from fedlora.common.messages import build_strictly
from fedlora.common.model import PEFT_ADAPTER, AdapterModel, PooledClassifier, build_model
from fedlora.common.projection import PROJECTION, Projection
from fedlora.common.state import HEAD_PREFIX, AdapterState, check_safetensors_header
from fedlora.common.tasks import TASKS, CausalLanguageModel, SequenceClassification, Task

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
DESCRIPTION = "fedlora.json"  # what PEFT's own configuration has no place for


@dataclass(frozen=True)
class Description:
    """How to build the network that an exported adapter belongs to."""

    task: str
    labels: tuple[str, ...]
    base: str
    base_digest: str
    max_length: int
    pooling: str
    pooled_layers: tuple[int, ...]
    head_hidden: int
    head_scale: float
    projection_digest: str
    variant: str
    rank: int
    alpha: float
    targets: tuple[str, ...]
    layers: tuple[int, ...]
    seed: int
    adapter_digest: str

    @property
    def digest(self) -> str:
        """Of all that decides what the exported files compute; it lies beside them, and is checked on load."""
        return "sha256:" + hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def export_adapter(
    model: AdapterModel, state: AdapterState, settings: ModelConfig, lora: LoraConfig, seed: int, folder: Path
) -> None:
    """Write `state` as a PEFT folder, our head beside it, and the description of both."""
    model.load(state)
    folder.mkdir(parents=True, exist_ok=True)
    backbone: Any = model.network.backbone
    backbone.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)
    if isinstance(model.network, PooledClassifier):
        head = {n: np.ascontiguousarray(v) for n, v in state.named().items() if n.startswith(HEAD_PREFIX)}
        save_file(head, folder / "head.safetensors")
    if model.projection is not None:
        model.projection.write(folder / PROJECTION)
    description = Description(
        task=model.task.name,
        labels=model.task.labels,
        base=settings.base,
        base_digest=model.base_digest,
        max_length=settings.max_length,
        pooling=settings.pooling,
        pooled_layers=tuple(settings.pooled_layers),
        head_hidden=settings.head_hidden,
        head_scale=settings.head_scale,
        projection_digest="" if model.projection is None else model.projection.digest,
        variant=lora.variant,
        rank=lora.rank,
        alpha=float(lora.alpha),
        targets=tuple(sorted(lora.targets)),
        layers=tuple(lora.layers),
        seed=seed,
        adapter_digest=state.digest,
    )
    table = asdict(description) | {"digest": description.digest}
    (folder / DESCRIPTION).write_text(json.dumps(table, indent=2) + "\n")


@dataclass(frozen=True, eq=False)
class LoadedAdapter:
    """An exported adapter on its base, ready to use."""

    model: AdapterModel
    description: Description

    def logits(self, texts: Sequence[str]) -> torch.Tensor:
        """(n, classes) float32, in the order of `texts`."""
        labels = np.zeros(len(texts), dtype=np.int64)
        records = Records(
            texts=list(texts), labels=labels, responses=None, units=None, columns={}, where="texts"
        )
        data = self.model.task.encode(records, self.model.tokenizer, self.description.max_length)
        result = torch.empty(len(texts), len(self.description.labels))
        with torch.no_grad():
            for rows in length_batches(data.lengths, 8192):
                logits = self.model.logits(data.batch(rows, self.model.pad, self.model.device))
                result[torch.from_numpy(rows)] = logits.float().cpu()
        return result

    def predict(self, texts: Sequence[str]) -> list[str]:
        """The label of each text."""
        if not self.description.labels:
            raise BadInput(f"adapter task: found {self.description.task}, expected one with labels")
        return [self.description.labels[int(best)] for best in self.logits(texts).argmax(dim=1)]

    def complete(self, prompt: str, tokens: int = 64) -> str:
        """A causal language model's greedy answer to `prompt`."""
        tokenizer = self.model.tokenizer
        network: Any = self.model.network.backbone
        begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        ids = begin + tokenizer(prompt, add_special_tokens=False)["input_ids"]
        room = self.description.max_length
        given = torch.tensor([ids[-room:]])
        with torch.no_grad():
            answer = network.generate(
                input_ids=given,
                attention_mask=torch.ones_like(given),
                max_new_tokens=tokens,
                do_sample=False,
                pad_token_id=self.model.pad,
            )
        return str(tokenizer.decode(answer[0, given.shape[1] :], skip_special_tokens=True))


def load_adapter(folder: str | Path, base: str = "") -> LoadedAdapter:
    """Load what `export_adapter` wrote. `base` overrides where the base model lies; its digest must agree."""
    folder = Path(folder)
    description = _description(folder)
    _check_peft_config(folder, description)
    projection = _projection(folder, description)
    settings = ModelConfig(
        projection=0 if projection is None else projection.width,
        base=base or description.base,
        digest=description.base_digest,
        task=description.task,
        max_length=description.max_length,
        pooling=description.pooling,
        pooled_layers=description.pooled_layers,
        head_hidden=description.head_hidden,
        head_scale=description.head_scale,
    )
    lora = LoraConfig(
        description.rank, description.alpha, description.targets, description.layers, description.variant
    )
    faults = [fault for each in (settings, lora) for fault in check_rules(each, str(folder / DESCRIPTION))]
    if faults:
        raise BadInput(faults)
    task = _task(description)
    model = build_model(settings, lora, task, description.seed)
    if projection is not None:
        model.projection = projection
    state = _read_state(folder, model)
    if state.digest != description.adapter_digest:
        raise BadInput(f"{folder}: found adapter {state.digest}, expected {description.adapter_digest}")
    model.load(state)
    model.network.eval()
    return LoadedAdapter(model, description)


def _task(description: Description) -> Task:
    if description.task == "sequence-classification":
        return SequenceClassification(description.labels)
    if description.task == "causal-lm":
        return CausalLanguageModel()
    raise BadInput(f"{DESCRIPTION} task: found {description.task!r}, expected {' or '.join(TASKS)}")


def _read_state(folder: Path, model: AdapterModel) -> AdapterState:
    named: dict[str, Any] = {}
    for name in ("adapter_model.safetensors", "head.safetensors"):
        path = folder / name
        if path.is_file():
            data = path.read_bytes()
            check_safetensors_header(data, str(path))
            try:
                named.update({_spec_name(key): value for key, value in load(data).items()})
            except Exception as error:  # the library raises several unrelated types
                raise BadInput(f"{path}: found an unreadable safetensors file ({error})") from error
    expected = {tensor.name for tensor in model.spec.tensors}
    frozen_a = {
        name for name in named if ".lora_A." in name and name not in expected
    }  # FFA: part of the base
    _check_frozen(folder, model, {name: named[name] for name in frozen_a})
    return AdapterState.from_named(
        model.spec, {name: value for name, value in named.items() if name not in frozen_a}, str(folder)
    )


def _projection(folder: Path, description: Description) -> Projection | None:
    if not description.projection_digest:
        return None
    if not (folder / PROJECTION).is_file():
        raise BadInput(f"{folder / PROJECTION}: missing, expected the map below the head")
    projection = Projection.read(folder / PROJECTION)
    if projection.digest != description.projection_digest:
        raise BadInput(
            f"{folder / PROJECTION}: found {projection.digest}, expected {description.projection_digest}"
        )
    return projection


def _spec_name(saved: str) -> str:
    """PEFT stores a model's own head under the module's name; a spec calls it `head.`."""
    if saved.startswith(HEAD_PREFIX) or ".lora_" in saved:
        return saved
    return HEAD_PREFIX + ".".join(saved.split(".")[-2:])


def _check_frozen(folder: Path, model: AdapterModel, found: Mapping[str, Any]) -> None:
    """A frozen A in the file is the one that its seed gives: PEFT reads the file, and we draw it anew."""
    built = {
        name.removeprefix("backbone.").replace(f".{PEFT_ADAPTER}.", "."): value
        for name, value in model.network.named_parameters()
        if ".lora_A." in name
    }
    for name, value in found.items():
        if name not in built or not np.array_equal(value, built[name].detach().cpu().numpy()):
            raise BadInput(f"{folder / ADAPTER_FILES[1]} {name}: found another frozen A than the seed gives")


def _description(folder: Path) -> Description:
    path = folder / DESCRIPTION
    if not path.is_file():
        raise BadInput(f"{path}: missing, expected the description of an exported adapter")
    try:
        table = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: found a description that can't be read ({error})") from error
    if not isinstance(table, dict):
        raise BadInput(f"{path}: found {type(table).__name__}, expected a table")
    digest = table.pop("digest", None)
    for name, kind in (("labels", str), ("targets", str), ("pooled_layers", int), ("layers", int)):
        items = table.get(name)
        if not isinstance(items, list) or any(type(item) is not kind for item in items):
            raise BadInput(f"{path} {name}: expected a list, each {kind.__name__}")
        table[name] = tuple(items)
    description = build_strictly(Description, table, str(path))
    if description.seed < 0:
        raise BadInput(f"{path} seed: found {description.seed}, expected 0 or more")
    if digest != description.digest:
        raise BadInput(f"{path} digest: found {digest}, expected {description.digest}")
    return description


def _check_peft_config(folder: Path, description: Description) -> None:
    """BadInput unless PEFT would build the network that is described here."""
    path = folder / ADAPTER_FILES[0]
    if not path.is_file() or not (folder / ADAPTER_FILES[1]).is_file():
        raise BadInput(f"{folder}: expected {' and '.join(ADAPTER_FILES)}; pickled weights are never opened")
    refuse_code(path)
    table: dict[str, Any] = json.loads(path.read_bytes())
    targets = table.get("target_modules")
    for name, found, expected in (
        ("peft_type", table.get("peft_type"), peft.PeftType.LORA.value),
        ("r", table.get("r"), description.rank),
        ("lora_alpha", table.get("lora_alpha"), description.alpha),
        (
            "target_modules",
            sorted(map(str, targets)) if isinstance(targets, list) else targets,
            [*description.targets],
        ),
        ("layers_to_transform", table.get("layers_to_transform") or [], [*description.layers]),
    ):
        if found != expected:
            raise BadInput(f"{path} {name}: found {found!r}, expected {expected!r}")
