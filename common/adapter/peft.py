"""The released adapter as files, and the way to load it again.

`adapter/` is a PEFT folder: `PeftModel.from_pretrained(base, "adapter")` gives the adapted
backbone. Where the head is ours, `head.safetensors` lies beside it (`common.adapter.released` lists
the files), and three lines load both:

    from fedlora.common.adapter import load_adapter
    classifier = load_adapter("runs/ag_news/adapter")
    print(classifier.predict(["Oil prices rose on Monday."]))

Only safetensors and JSON are read; a folder that asks for code or pickled weights is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

from fedlora.common.adapter.released import (
    CONFIG,
    DESCRIPTION,
    HEAD,
    Description,
    base_was_a_folder,
    check_peft_config,
    read_description,
    read_projection,
    read_state,
    write_description,
)
from fedlora.common.config.schema import LoraConfig, ModelConfig
from fedlora.common.config.toml import check_rules
from fedlora.common.disk.files import write_text
from fedlora.common.errors import BadInput
from fedlora.common.manifest.manifest import AdapterLayout, taken_from
from fedlora.common.model.assembly import PEFT_ADAPTER
from fedlora.common.model.features import Rows, length_batches
from fedlora.common.model.network import AdapterModel, build_model
from fedlora.common.model.pooling import PooledClassifier
from fedlora.common.model.projection import PROJECTION
from fedlora.common.model.state import HEAD_PREFIX, AdapterState
from fedlora.common.tasks.batch import Batch
from fedlora.common.tasks.causal_lm import prompt_tokens
from fedlora.common.tasks.known import task_named
from fedlora.common.tasks.seq2seq import source_tokens
from fedlora.common.tasks.task import LANGUAGE, TRANSLATION, Answer

BATCH_TOKENS = 8192  # of a pass that answers


def export_adapter(
    model: AdapterModel,
    state: AdapterState,
    settings: ModelConfig,
    lora: LoraConfig,
    seed: int,
    folder: Path,
) -> None:
    """Write `state` as a PEFT folder, our head beside it, and the description of both."""
    model.load(state)
    folder.mkdir(parents=True, exist_ok=True)
    backbone: Any = model.network.backbone
    config = backbone.peft_config[PEFT_ADAPTER]
    if Path(settings.base).is_dir():  # where it lies on this machine is nobody's business
        config.base_model_name_or_path = model.base_digest
    # PEFT sets it by each layer's kind, whatever a file says; so all files say the same
    config.fan_in_fan_out = False
    backbone.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)
    config.base_model_name_or_path = settings.base
    _forget_class(folder / CONFIG)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's form of a card, with nothing filled in
    if isinstance(model.network, PooledClassifier):
        head = {
            n: np.ascontiguousarray(v)
            for n, v in state.named().items()
            if n.startswith(HEAD_PREFIX)
        }
        save_file(head, folder / HEAD)
    if model.projection is not None:
        model.projection.write(folder / PROJECTION)
    layout = taken_from(AdapterLayout, settings, lora) | {"alpha": float(lora.alpha)}
    description = Description(
        **layout | {"targets": tuple(sorted(lora.targets))},
        task=model.task.name,
        labels=model.task.labels,
        base=settings.base,
        base_digest=model.base_digest,
        max_length=settings.max_length,
        projection_digest="" if model.projection is None else model.projection.digest,
        seed=seed,
        adapter_digest=state.digest,
    )
    write_description(folder, description, state.spec)


def _forget_class(config: Path) -> None:
    """Where PEFT has no kind of its own it names a class to import: who loads has the base."""
    table = json.loads(config.read_bytes())
    if table.get("auto_mapping") is not None:
        table["auto_mapping"] = None
        write_text(config, json.dumps(table, indent=2, sort_keys=True))


@dataclass(frozen=True, eq=False)
class LoadedAdapter:
    """An exported adapter on its base, ready to use."""

    model: AdapterModel
    description: Description

    def logits(self, inputs: Sequence[Any]) -> torch.Tensor:
        """(n, outputs) float32 of a head that answers records, in the order of `inputs`."""
        result = torch.empty(len(inputs), self.model.task.outputs)
        for rows, _, outputs in self._passed(inputs):
            result[torch.from_numpy(rows)] = outputs.float().cpu()
        return result

    def predict(self, inputs: Sequence[Any]) -> list[Answer]:
        """The answer to each input: a text, or what else the task reads; see its `asked`."""
        if isinstance(inputs, str | bytes) or not isinstance(inputs, Sequence):
            raise BadInput(f"inputs: found {inputs!r:.60}, expected a list of what the task reads")
        if self.model.task.reads in (LANGUAGE, TRANSLATION):
            self.model.task.asked(inputs)  # before the first of many is answered
            return [self.complete(each) for each in inputs]
        found: dict[int, Answer] = {}
        for rows, batch, outputs in self._passed(inputs):
            answers = self.model.task.answers(outputs, batch)
            found.update(zip(rows.tolist(), answers, strict=True))
        return [found[row] for row in range(len(inputs))]

    def _passed(self, inputs: Sequence[Any]) -> Iterator[tuple[Rows, Batch, torch.Tensor]]:
        """Places of `inputs`, each once, and what the network gives for their batch."""
        task = self.model.task
        data = task.encode(task.asked(inputs), self.model.tokenizer, self.model.longest)
        for rows in length_batches(data.lengths, BATCH_TOKENS):
            batch = data.batch(rows, self.model.pad, self.model.device)
            with torch.no_grad():
                yield rows, batch, self.model.logits(batch)

    def complete(self, prompt: Any, tokens: int = 64, temperature: float = 0.0) -> str:
        """A language model's answer to a text, or to a conversation's messages; else BadInput.

        `temperature` 0: the likeliest words, else drawn ones.
        """
        self.model.task.asked([prompt])
        tokenizer, room = self.model.tokenizer, self.description.max_length
        reads = source_tokens if self.model.task.reads == TRANSLATION else prompt_tokens
        given = reads(tokenizer, prompt, room)
        answer = self.model.continued(given or [self.model.pad], tokens, temperature)
        return str(tokenizer.decode(answer, skip_special_tokens=True))


def load_adapter(folder: str | Path, base: str = "") -> LoadedAdapter:
    """Load what `export_adapter` wrote; `base` overrides where the base lies, by equal digest.

    BadInput where it lay in a folder of whoever exported it, which isn't here, and `base` doesn't
    say where it is.
    """
    folder = Path(folder)
    description, where = read_description(folder), str(folder / DESCRIPTION)
    check_peft_config(folder, description)
    if not base and base_was_a_folder(folder, description) and not Path(description.base).is_dir():
        raise BadInput(
            f"{where} base: found {description.base!r}, no folder here, expected base= with one"
        )
    projection = read_projection(folder, description)
    settings, lora = description.configs(base or description.base, where)
    width = 0 if projection is None else projection.width
    settings = replace(settings, projection=width, digest=description.base_digest)
    if faults := check_rules(settings, where):
        raise BadInput(faults)
    try:
        task = task_named(description.task, description.labels)
    except BadInput as error:
        raise BadInput([f"{where} {fault}" for fault in error.faults]) from error
    model = build_model(settings, lora, task, description.seed)
    if projection is not None:
        model.projection = projection
    model.load(read_state(folder, model.spec, description))
    return LoadedAdapter(model, description)
