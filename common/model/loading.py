"""The base's network from its files, as it is frozen: without dropout, without code.

What an architecture offers is asked of its class. What can't serve is refused in one line, whatever
transformers raises.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from fedlora.common.data.medium import Medium
from fedlora.common.errors import BadInput
from fedlora.common.model.dropout import without_dropout
from fedlora.common.model.stored import ON_CPU, Place, keep_stored, planned
from fedlora.common.model.weights import PEFT_HEADS, check_loaded, new_heads

# The fused kernel first: what a class offers of these, in this order.
ATTENTIONS = ("sdpa", "eager")

transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
# missing heads are expected: they are ours to train
transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]


def load_backbone(folder: Path, place: Place = ON_CPU) -> PreTrainedModel:
    """The transformer without a head: an encoder, or a decoder's hidden states."""
    config = _config(folder)
    half = _is_half(config)
    kind: Any = transformers.AutoModelForTextEncoding if half else transformers.AutoModel
    base, report = _load(folder, config, kind, place)
    if getattr(base, "pooler", None) is not None:
        base.pooler = None  # ours replaces it; adapting what nothing reads would only add noise
    check_loaded(base, report, _where(folder))
    return cast(PreTrainedModel, base)


def load_classifier(
    folder: Path, labels: int, place: Place = ON_CPU, medium: Medium | None = None
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """The transformer with its own head for `labels` classes, of texts or of a medium.

    And which modules of it are new, beside those that PEFT trains in any case: of texts alone.
    """
    config = _config(folder)
    kind: Any = {
        "": transformers.AutoModelForSequenceClassification,
        "image": transformers.AutoModelForImageClassification,
        "audio": transformers.AutoModelForAudioClassification,
    }[medium.name if medium else ""]
    if _is_half(config) or type(config) not in kind._model_mapping:
        raise BadInput(
            f'[model] pooling = "default": found {config.model_type}, which has no classifier of'
            " its own here, expected pooling = mean or layers"
        )
    config.num_labels = labels
    base, report = _load(folder, config, kind, place)
    heads = new_heads(base, report)
    if medium is not None:
        heads = (*heads, *(name for name, _ in base.named_children() if name.endswith(PEFT_HEADS)))
    check_loaded(base, report, _where(folder), heads)
    return base, heads


def load_language_model(folder: Path, place: Place = ON_CPU) -> PreTrainedModel:
    """The transformer with its own next-token head."""
    config = _config(folder)
    kind = transformers.AutoModelForCausalLM
    if _is_half(config) or type(config) not in kind._model_mapping:
        raise BadInput(
            f'[model] task = "causal-lm": found {config.model_type}, which has no causal language'
            " model, expected a decoder"
        )
    base, report = _load(folder, config, kind, place)
    check_loaded(base, report, _where(folder))
    return cast(PreTrainedModel, base)


def load_translator(folder: Path, place: Place = ON_CPU) -> PreTrainedModel:
    """An encoder and a decoder, with their own scores of words."""
    config = _read_config(folder)
    kind = transformers.AutoModelForSeq2SeqLM
    if not config.is_encoder_decoder or _is_half(config) or type(config) not in kind._model_mapping:
        raise BadInput(
            f'[model] task = "seq2seq": found {config.model_type}, expected an encoder with a'
            " decoder, as T5 or BART"
        )
    config.use_cache = False  # no step generates
    base, report = _load(folder, without_dropout(config), kind, place)
    check_loaded(base, report, _where(folder))
    return cast(PreTrainedModel, base)


def offered_attentions(base: PreTrainedModel) -> tuple[str, ...]:
    """Which of `ATTENTIONS` the base can be switched to; the one it was loaded with, where it can't
    be.
    """
    if not base._can_set_attn_implementation():
        return (str(base.config._attn_implementation),)
    loaded, offered = str(base.config._attn_implementation), []
    for name in ATTENTIONS:
        try:
            base.set_attn_implementation(name)
        except (ValueError, ImportError):  # a class, or a part of it, without this one
            continue
        offered.append(name)
    base.set_attn_implementation(loaded)
    return tuple(offered)


def _read_config(folder: Path) -> PreTrainedConfig:
    try:
        config: PreTrainedConfig = transformers.AutoConfig.from_pretrained(
            folder, trust_remote_code=False
        )
    except Exception as error:  # the library raises a dozen unrelated types
        raise BadInput(f"{folder / 'config.json'}: {_first_line(error)}") from error
    return config


def _config(folder: Path) -> PreTrainedConfig:
    config = _read_config(folder)
    if config.is_encoder_decoder and not _is_half(config):
        raise BadInput(
            f"{_where(folder)}: found an encoder-decoder ({config.model_type}), expected an"
            ' encoder or a decoder, or task = "seq2seq"'
        )
    config.use_cache = False  # no step generates
    return without_dropout(config)


def _is_half(config: PreTrainedConfig) -> bool:
    """Whether an encoder-decoder was published as its encoder alone: T5EncoderModel and its kin."""
    return any(str(each).endswith("EncoderModel") for each in config.architectures or ())


def _load(
    folder: Path, config: PreTrainedConfig, kind: Any, place: Place
) -> tuple[Any, dict[str, Any]]:
    """The network, and transformers' report of what the files had no weights for."""
    try:
        with planned(kind, config, place):
            base, report = kind.from_pretrained(
                folder,
                config=config,
                dtype=torch.float32,
                device_map={"": place.device},
                trust_remote_code=False,
                use_safetensors=True,
                attn_implementation="eager",  # every class has it; the others are asked for below
                ignore_mismatched_sizes=True,  # of a head for other labels; reported
                output_loading_info=True,
            )
    except Exception as error:  # the library raises a dozen unrelated types
        raise BadInput(f"{_where(folder)}: {_first_line(error)}") from error
    held_in_memory(base)
    keep_stored(base)
    offered = offered_attentions(base)
    if offered[0] != base.config._attn_implementation:
        base.set_attn_implementation(offered[0])
    return base, report


def held_in_memory(network: nn.Module) -> None:
    """Make all weights copies, one after the other: transformers hands out a mapping of the files.

    What somebody writes into a mapped file later would be computed with, under the old digest.
    """
    for each in (*network.parameters(), *network.buffers()):
        if each.device.type == "cpu":  # on another device they are copies
            each.data = each.data.clone()


def _where(folder: Path) -> str:
    return f"[model] base = {folder}"


def _first_line(error: Exception) -> str:
    line = next((each.strip() for each in str(error).splitlines() if each.strip()), "")
    return f"transformers can't read it ({type(error).__name__}: {line[:200]})"
