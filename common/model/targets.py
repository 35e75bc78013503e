"""Which layers LoRA adapts: from what a configuration asks for to names that PEFT finds by itself.

A configuration may ask for "auto", for "all-linear", for a regular expression or for names. A
manifest and an exported adapter hold names only, so that a node builds what it reads, and PEFT
alone finds the same layers. A name is a layer's own, or the end of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import peft
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedlora.common.config.schema import ALL_LINEAR, LoraConfig, is_expression
from fedlora.common.config.toml import AUTO
from fedlora.common.errors import BadInput

# What "auto" adapts: the first row of which a base has every name. Queries and values, or what
# holds them: Hu et al. 2021 (section 7.1) found the two together to serve best for their size.
_AUTO = (
    ("query", "value"),  # BERT and its kin; Longformer
    ("q_proj", "v_proj"),  # Llama and its kin; OPT, GPT-J, GPT-Neo, Phi-2
    ("query_proj", "value_proj"),  # DeBERTa-v2 and v3
    ("q_lin", "v_lin"),  # DistilBERT, XLM
    ("attn.q", "attn.v"),  # MPNet
    ("SelfAttention.q", "SelfAttention.v"),  # T5's encoder
    # all three in one product: queries and values can't be had without keys
    ("query_key_value",),  # GPT-NeoX, BLOOM, Falcon
    ("c_attn",),  # GPT-2
    ("qkv_proj",),  # Phi-3
    ("Wqkv",),  # ModernBERT
    # no attention that a linear layer computes
    ("mixer.in_proj",),  # Mamba: all that enters its state goes through here
    ("ff.layer_1", "ff.layer_2"),  # XLNet, whose attention is bare parameters
)
# A choice between experts is a step: its gradient says nothing of the choices not taken.
_ROUTERS = ("router", "gate", "shared_expert_gate")
_LINEAR = (nn.Linear, Conv1D)


def explicit(
    base: PreTrainedModel,
    lora: LoraConfig,
    used: Callable[[], Collection[str]],
    heads: tuple[str, ...] = (),
) -> LoraConfig:
    """`lora` with names for targets that PEFT finds on `base`, and nothing but linear layers.

    `used` tells the modules that a forward pass goes through; what ends in one of `heads` is not
    adapted, but trained. BadInput names what matches nothing, and what can't be adapted.
    """
    every = {
        name: module
        for name, module in base.named_modules()
        if name and not any(part.endswith(heads) for part in name.split("."))
    }
    reasons = _refusals(base, every)
    able = [name for name in every if not reasons[name]]
    if lora.targets == (ALL_LINEAR,):
        called = used()
        output = base.get_output_embeddings()  # type: ignore[no-untyped-call]
        chosen = {
            name
            for name in able
            if name in called and every[name] is not output and not _reads_weight(base, name)
        }
    elif lora.targets == (AUTO,):
        chosen = _automatic(able)
    else:
        chosen = _named(lora.targets, every, reasons)
    chosen = _in_layers(chosen, lora.layers)
    asked = lora.targets != (AUTO,) and not any(map(_is_rule, lora.targets))
    if asked and _found_by_peft(lora, every) == chosen:
        return lora
    return replace(lora, targets=_shortest(chosen, every), layers=())


def _is_rule(target: str) -> bool:
    return target in (AUTO, ALL_LINEAR) or is_expression(target)


def _automatic(able: Sequence[str]) -> set[str]:
    for ends in _AUTO:
        found = [{name for name in able if _ends(name, end)} for end in ends]
        if all(found):
            return set().union(*found)
    raise BadInput(
        f'[lora] targets = "{AUTO}": found no attention whose projections it knows, expected names'
        f' or "{ALL_LINEAR}"'
    )


def _named(
    targets: Sequence[str], every: Mapping[str, nn.Module], reasons: Mapping[str, str]
) -> set[str]:
    chosen: set[str] = set()
    for target in targets:
        where = f'[lora] targets = "{target}"'
        found = [name for name in every if _matches(target, name, where)]
        if not found:
            raise BadInput(f"{where}: found no such layer in the base{_meant(target, every)}")
        for name in found:
            if reasons[name]:
                raise BadInput(f"{where}: found {reasons[name]} ({name}), expected linear layers")
        chosen.update(found)
    return chosen


def _matches(target: str, name: str, where: str) -> bool:
    if not is_expression(target):
        return _ends(name, target)
    try:
        return re.fullmatch(target.removeprefix("re:"), name) is not None
    except re.error as error:
        raise BadInput(f"{where}: found no regular expression ({error})") from error


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _refusals(base: nn.Module, every: Mapping[str, nn.Module]) -> dict[str, str]:
    """Why each module can't be adapted, or ""."""
    embedded = {id(each.weight) for each in base.modules() if isinstance(each, nn.Embedding)}
    routing: tuple[str, ...] = tuple(
        name for name, module in every.items() if "Router" in type(module).__name__
    )

    def refusal(name: str, module: nn.Module) -> str:
        if isinstance(module, nn.Embedding):
            return "an embedding"
        routes = name.rpartition(".")[2] in _ROUTERS or any(
            name == each or name.startswith(f"{each}.") for each in routing
        )
        if routes:
            return "a router between experts"
        if not isinstance(module, _LINEAR):
            kind = type(module).__name__
            return f"a {kind}, which has no rule for a single record's gradient"
        return "an output layer that is the embedding" if id(module.weight) in embedded else ""

    return {name: refusal(name, module) for name, module in every.items()}


def _reads_weight(base: nn.Module, name: str) -> bool:
    """Mamba's fused kernel takes its output layer's weight without calling the layer: PEFT refuses
    it.
    """
    parent = base.get_submodule(name.rpartition(".")[0])
    return name.endswith(".out_proj") and "Mamba" in type(parent).__name__


def _in_layers(chosen: set[str], layers: Sequence[int]) -> set[str]:
    """Those of `chosen` in the layers asked for; BadInput where there is no such layer."""
    if not layers:
        return chosen
    by_layer = {name: _layer(name) for name in chosen}
    known = sorted({layer for layer in by_layer.values() if layer is not None})
    for layer in layers:
        if layer not in known:
            raise BadInput(
                f"[lora] layers = {list(layers)}: found no layer {layer} with such targets,"
                f" expected some of {known}"
            )
    return {name for name, layer in by_layer.items() if layer in layers}


def _layer(name: str) -> int | None:
    """The first number in a name: further ones count experts."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def _found_by_peft(lora: LoraConfig, every: Mapping[str, nn.Module]) -> set[str]:
    settings: Any = peft.LoraConfig(
        target_modules=list(lora.targets), layers_to_transform=list(lora.layers) or None
    )
    return {name for name in every if check_target_module_exists(settings, name)}


def _shortest(chosen: set[str], every: Mapping[str, nn.Module]) -> tuple[str, ...]:
    """The fewest and shortest ends that all of `chosen` have and no other module."""
    others, ends = [name for name in every if name not in chosen], set()
    for name in chosen:
        parts = name.split(".")
        tails = (".".join(parts[-size:]) for size in range(1, len(parts) + 1))
        ends.add(next(tail for tail in tails if not any(_ends(other, tail) for other in others)))
    covered = {end for end in ends for other in ends if other != end and _ends(end, other)}
    return tuple(sorted(ends - covered))


def _meant(target: str, every: Mapping[str, nn.Module]) -> str:
    last = {
        name.rpartition(".")[2] for name, module in every.items() if isinstance(module, _LINEAR)
    }
    return f", expected some of {', '.join(sorted(last))}"[:200]
