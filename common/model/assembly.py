"""A base, its LoRA layers and its head made one network, which starts from a seed.

PEFT places the adapter; a classifier over pooled hidden states is ours where the configuration asks
for it, else the base's own head is trained beside the adapter.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from fedlora.common.config.schema import LoraConfig, ModelConfig
from fedlora.common.config.toml import AUTO
from fedlora.common.errors import BadInput
from fedlora.common.model.behaviour import called
from fedlora.common.model.inputs import Inputs, inputs_of
from fedlora.common.model.loading import (
    load_backbone,
    load_classifier,
    load_language_model,
    load_translator,
)
from fedlora.common.model.pooling import OwnHead, PooledClassifier, Pooling, Translator, build_head
from fedlora.common.model.state import HEAD_PREFIX
from fedlora.common.model.stored import Place, widen_trained
from fedlora.common.model.targets import explicit
from fedlora.common.model.weights import PEFT_HEADS
from fedlora.common.tasks.task import LANGUAGE, TRANSLATION, WORD, Task

# PEFT 0.21 asks transformers 5 for a property under its old name.
warnings.filterwarnings(
    "ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning
)

PEFT_ADAPTER = "default"  # PEFT's own name for the first adapter of a model


def assembled(
    model: ModelConfig, folder: Path, task: Task, reader: Any, lora: LoraConfig, place: Place
) -> tuple[PooledClassifier | OwnHead, LoraConfig]:
    """The network, and `lora` with the names of what is adapted.

    BadInput where the base can't serve the task.
    """
    where = f"[model] base = {folder}"
    if task.reads == LANGUAGE:
        base = load_language_model(folder, place)
        inputs = inputs_of(base, reader, task, where, headed=False)
        adapted, lora = _with_lora(base, model, lora, inputs, peft.TaskType.CAUSAL_LM)
        return OwnHead(adapted, inputs), lora
    if task.reads == TRANSLATION:
        base = load_translator(folder, place)
        inputs = inputs_of(base, reader, task, where, headed=False)
        adapted, lora = _with_lora(base, model, lora, inputs, peft.TaskType.SEQ_2_SEQ_LM)
        return Translator(adapted, inputs, int(adapted.config.decoder_start_token_id or 0)), lora
    return _classifier(model, folder, task, reader, lora, place)


def _classifier(
    model: ModelConfig, folder: Path, task: Task, reader: Any, lora: LoraConfig, place: Place
) -> tuple[PooledClassifier | OwnHead, LoraConfig]:
    """With the base's own head, or one above its pooled hidden states."""
    where = f"[model] base = {folder}"
    by_word, pairs = model.pooling == "words", model.pooling == "pairs"
    if by_word != (task.reads == WORD) and model.pooling != AUTO:
        expected = '"words"' if task.reads == WORD else "default, mean or layers"
        raise BadInput(
            f'[model] pooling = "{model.pooling}": expected {expected}, since task = "{task.name}"'
        )
    if model.pooling == AUTO:
        raise BadInput('[model] pooling = "auto": expected one that is chosen by now')
    if model.pooling == "default":
        base, new = load_classifier(folder, task.outputs, place, task.medium)
        inputs = inputs_of(base, reader, task, where)
        config = base.config.get_text_config()
        if task.medium is None and config.pad_token_id is None:
            config.pad_token_id = inputs.pad  # without one, transformers refuses a batch
        # PEFT's own kinds are of texts: of another medium it is told which heads are trained
        kind = peft.TaskType.SEQ_CLS if task.medium is None else None
        adapted, lora = _with_lora(base, model, lora, inputs, kind, new)
        return OwnHead(adapted, inputs, _own_classifier(adapted)), lora
    base = load_backbone(folder, place)
    inputs = inputs_of(base, reader, task, where)
    config = base.config.get_text_config()
    pooling = Pooling(_pooled_layers(model, config.num_hidden_layers), model.head_scale)
    backbone, lora = _with_lora(base, model, lora, inputs, peft.TaskType.FEATURE_EXTRACTION)
    pooled = config.hidden_size * len(pooling.layers) * (1 + pairs)  # `Pooling.compared`
    width = model.kernel_directions or model.projection or pooled
    head = build_head(width, model.head_hidden, task.outputs)
    return PooledClassifier(backbone, pooling, head, inputs, by_word, pairs), lora


def _own_classifier(adapted: peft.PeftModel) -> nn.Module:
    """The head that PEFT trains beside the adapter."""
    heads = [m for m in adapted.modules() if isinstance(m, ModulesToSaveWrapper)]
    if not heads:
        found = type(adapted.get_base_model()).__name__
        raise BadInput(
            f'[model] pooling = "default": found no head in {found} that PEFT trains, expected'
            " pooling = mean or layers"
        )
    return heads[-1]


def _pooled_layers(model: ModelConfig, depth: int) -> tuple[int, ...]:
    if model.pooling != "layers" and not model.pooled_layers:
        return (depth,)
    layers = tuple(model.pooled_layers) or tuple(range(depth + 1))
    if not all(0 <= layer <= depth for layer in layers):
        raise BadInput(
            f"[model] pooled_layers = {list(layers)}: expected indices from 0 to {depth}"
        )
    return layers


def _with_lora(
    base: PreTrainedModel,
    model: ModelConfig,
    lora: LoraConfig,
    inputs: Inputs,
    kind: peft.TaskType | None,
    new: tuple[str, ...] = (),
) -> tuple[peft.PeftModel, LoraConfig]:
    """The adapted base, and the configuration with the names of what is adapted.

    `new` are modules that are trained whole, as PEFT's own heads are.
    """

    def used() -> frozenset[str]:
        return called(base, inputs.read(*inputs.tried(base.device, model.max_length)))

    heads = (*PEFT_HEADS, *new) if kind in (peft.TaskType.SEQ_CLS, None) else ()
    lora = explicit(base, lora, used, heads)
    settings = peft.LoraConfig(
        task_type=kind,
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # any number scales
        target_modules=list(lora.targets),
        layers_to_transform=list(lora.layers) or None,
        lora_dropout=0.0,
        modules_to_save=list(new) or None,
    )
    try:
        with warnings.catch_warnings():  # it sets by each layer's kind what it warns of
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
            adapted = peft.get_peft_model(base, settings)
    except (ValueError, KeyError) as error:
        raise BadInput(
            f"[lora] targets = {list(lora.targets)}: {str(error).splitlines()[0]}"
        ) from error
    widen_trained(adapted)
    settled: Any = adapted.peft_config[PEFT_ADAPTER]
    settled.base_model_name_or_path = model.base
    settled.target_modules = set(lora.targets)  # PEFT shortens long lists in its own way
    if lora.variant == "ffa":
        for name, parameter in adapted.named_parameters():
            if ".lora_A." in name:
                parameter.requires_grad_(False)
    return adapted, lora


def trainable(network: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Trainable parameters by their names in an `AdapterSpec`; heads begin with `HEAD_PREFIX`."""
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        short = name.removeprefix("backbone.")
        saved = f".modules_to_save.{PEFT_ADAPTER}."
        if saved in short:
            before, after = short.split(saved)
            short = f"{HEAD_PREFIX}{before.rsplit('.', 1)[-1]}.{after}"
        yield short.replace(f".{PEFT_ADAPTER}.", "."), parameter


def initialise(network: nn.Module, seed: int) -> None:
    """LoRA A and hidden layers uniform in ±1/sqrt(fan-in), by NumPy's Philox; a norm of a head's
    own is one that changes nothing; all else zero.

    Not torch's generator: every institution must reach the same frozen A, on any machine. The last
    layer of a head starts at zero, so that the first answer is uniform over the labels.
    """
    generator = np.random.Generator(np.random.Philox(seed))
    last_head = [
        name for name, p in trainable(network) if name.startswith(HEAD_PREFIX) and p.ndim == 2
    ][-1:]
    tensors = dict(trainable(network))
    norms = {id(each.weight) for each in network.modules() if isinstance(each, nn.LayerNorm)}
    frozen_a = {
        n: p for n, p in network.named_parameters() if ".lora_A." in n and not p.requires_grad
    }
    with torch.no_grad():
        for name, parameter in sorted({**tensors, **frozen_a}.items()):
            if parameter.ndim == 2 and ".lora_B." not in name and name not in last_head:
                bound = parameter.shape[1] ** -0.5
                values = generator.uniform(-bound, bound, tuple(parameter.shape)).astype(np.float32)
                parameter.copy_(torch.from_numpy(values))
            elif id(parameter) in norms:  # a factor of zero would pass no gradient on
                parameter.fill_(1.0)
            else:
                parameter.zero_()
