"""The frozen base with a LoRA adapter, and the one way in and out of it: an `AdapterState`.

PEFT places the adapter; a classifier over pooled hidden states is ours where the configuration asks
for it. Dropout is off: a private step is already noisy, and each example's loss must depend on that
example alone. The trainable parameters, the noised vector and the exported tensors are the same
set, by construction: all three come from `AdapterModel.parameters`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from fedlora.common.config.schema import LoraConfig, ModelConfig
from fedlora.common.data.tasks import Batch, Task
from fedlora.common.errors import BadInput
from fedlora.common.model.base import base_stamp, check_base, check_digest, resolve_base
from fedlora.common.model.behaviour import called, check_causal, check_still, is_routed, texts
from fedlora.common.model.dropout import switch_dropout_off
from fedlora.common.model.loading import (
    load_backbone,
    load_classifier,
    load_language_model,
    offered_attentions,
)
from fedlora.common.model.pooling import PooledClassifier, Pooling
from fedlora.common.model.probe import probe
from fedlora.common.model.projection import Projection
from fedlora.common.model.shapes import Shapes
from fedlora.common.model.state import HEAD_PREFIX, AdapterSpec, AdapterState, TensorSpec
from fedlora.common.model.targets import explicit
from fedlora.common.model.tokenizer import check_fit, load_tokenizer
from fedlora.common.model.weights import PEFT_HEADS

# PEFT 0.21 asks transformers 5 for a property under its old name.
warnings.filterwarnings(
    "ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning
)

PEFT_ADAPTER = "default"  # PEFT's own name for the first adapter of a model


class OwnHead(nn.Module):
    """A transformers model with its own head: sequence classification or language modelling.

    A decoder's classifier scores every word of a text. The last one counts, by the mask:
    transformers goes by the padding's id, which may be a word's.
    """

    def __init__(self, model: nn.Module, classifier: nn.Module | None = None) -> None:
        super().__init__()
        self.backbone = model
        self.by_word = False  # as the last pass was
        self._scores: list[torch.Tensor] = []
        if classifier is not None:
            classifier.register_forward_hook(lambda _, inputs, output: self._scores.append(output))

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        self._scores.clear()
        logits: torch.Tensor = self.backbone(input_ids=ids, attention_mask=mask).logits
        scores = self._scores.pop() if self._scores else logits
        self.by_word = scores is not logits and scores.ndim == 3
        if not self.by_word:
            return logits
        return scores[torch.arange(len(ids), device=ids.device), mask.sum(dim=1) - 1]


class AdapterModel:
    """A network whose trainable part is an `AdapterState`; one resident object for all clients."""

    def __init__(
        self,
        network: PooledClassifier | OwnHead,
        task: Task,
        tokenizer: Any,
        digest: str,
        device: torch.device,
        longest: int,
        lora: LoraConfig,
    ) -> None:
        # Without dropout, skipped layers or noisy routers by construction: eval mode, always.
        self.network = network.to(device).eval()
        self.task = task
        self.tokenizer = tokenizer
        self.base_digest = digest
        self.device = device
        self.longest = longest  # tokens that a record is cut to
        self.lora = lora  # with names for targets
        self.precision = torch.float32
        self.attentions = offered_attentions(_base_of(network))
        self.attention = ""  # as set; "": as loaded
        self.probe_seconds = 0.0
        self.shapes = Shapes()
        self.parameters: dict[str, nn.Parameter] = dict(_trainable(network))
        self.spec = AdapterSpec(
            tuple(TensorSpec(n, tuple(p.shape)) for n, p in self.parameters.items())
        )

    def load(self, state: AdapterState) -> None:
        """Put a state's values into the network; BadInput where it belongs to another model."""
        if state.spec != self.spec:
            raise BadInput(
                f"adapter: found tensors of {state.spec.digest}, expected {self.spec.digest}"
            )
        with torch.no_grad():
            for name, value in state.named().items():
                self.parameters[name].copy_(torch.from_numpy(value.copy()))

    def state(self) -> AdapterState:
        """The network's trainable values."""
        named = {name: p.detach().cpu().float().numpy() for name, p in self.parameters.items()}
        return AdapterState.from_named(self.spec, named)

    @property
    def rows(self) -> int:
        """Tokens that the network has embeddings for."""
        backbone: Any = self.network.backbone
        return int(backbone.get_input_embeddings().num_embeddings)

    @property
    def vocabulary(self) -> int:
        """Tokens that the tokenizer may give and the network can read."""
        return min(len(self.tokenizer), self.rows)

    @contextmanager
    def probed(self) -> Iterator[None]:
        """Values of our own for as long as this lasts.

        A coordinator's could hide how the network rounds.
        """
        before, values = self.state(), np.random.default_rng(0).normal(0, 0.05, self.spec.size)
        projection = self.projection
        self.load(AdapterState(self.spec, values.astype(np.float32)))
        if projection is not None:
            self.projection = projection.stand_in()
        try:
            yield
        finally:
            self.load(before)
            if projection is not None:
                self.projection = projection

    def logits(self, batch: Batch) -> torch.Tensor:
        """(n, classes) or (n, length, vocabulary), under this model's precision."""
        with self.autocast():
            result: torch.Tensor = self.network(batch.ids, batch.mask)
        return result

    def autocast(self) -> AbstractContextManager[Any]:
        """bf16 matrix products where chosen; whatever leaves a loss is float32."""
        if self.precision == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.precision)

    @property
    def projection(self) -> Projection | None:
        """The frozen map below the head; set before anything is trained."""
        return (
            self.network.pooling.projection if isinstance(self.network, PooledClassifier) else None
        )

    @projection.setter
    def projection(self, projection: Projection | None) -> None:
        if not isinstance(self.network, PooledClassifier):
            raise BadInput(
                "[model] projection: found a model's own head, expected pooling = mean or layers"
            )
        self.network.pooling.projection = projection

    @property
    def pooled_layers(self) -> tuple[int, ...]:
        """Hidden states that our pooling reads; empty where the model's own head does."""
        return self.network.pooling.layers if isinstance(self.network, PooledClassifier) else ()

    @property
    def pad(self) -> int:
        """What fills a batch up, behind the mask: the tokenizer's own, where it is embedded."""
        token = self.tokenizer.pad_token_id
        return int(token) if token is not None and 0 <= token < self.rows else 0

    @property
    def head(self) -> nn.Module:
        """The head that a head phase trains; BadInput where cached features can't train it."""
        if isinstance(self.network, PooledClassifier):
            return self.network.head
        if self.network.by_word:
            raise BadInput(
                "[training] head_rounds: found a head that scores every word, expected pooling ="
                " mean or layers"
            )
        size = int(self.spec.head_mask().sum())
        for name, module in self.network.named_modules():
            linear = isinstance(module, nn.Linear) and name.endswith(
                f".modules_to_save.{PEFT_ADAPTER}"
            )
            if linear and sum(each.numel() for each in module.parameters()) == size:
                return module
        raise BadInput(
            "[training] head_rounds: found a model without a linear head, expected pooling = mean"
            " or layers"
        )

    @torch.no_grad()
    def pooled(self, batch: Batch) -> torch.Tensor:
        """(n, width) float32: what the transformer makes of each example, below any projection."""
        if isinstance(self.network, PooledClassifier):
            with self.autocast():
                return self.network.pooled(batch.ids, batch.mask).float()
        caught: list[torch.Tensor] = []
        hook = self.head.register_forward_pre_hook(
            lambda _, inputs: caught.append(inputs[0].float())
        )
        try:
            self.logits(batch)
        finally:
            hook.remove()
        return caught[0]

    @torch.no_grad()
    def features(self, pooled: torch.Tensor) -> torch.Tensor:
        """(n, width) float32: what the head receives for `pooled` examples."""
        if isinstance(self.network, PooledClassifier):
            return self.network.pooling.features(pooled)
        return pooled

    def set_attention(self, name: str) -> None:
        """Switch to another of `attentions` in place."""
        if name not in self.attentions:
            raise BadInput(
                f"[training] attention = {name!r}: expected auto or one of"
                f" {', '.join(self.attentions)}, which the base offers"
            )
        if len(self.attentions) > 1:
            _base_of(self.network).set_attn_implementation(name)
        self.attention = name


def build_model(
    model: ModelConfig, lora: LoraConfig, task: Task, seed: int, device: torch.device | None = None
) -> AdapterModel:
    """Load the base from safetensors, freeze it, add LoRA and a head; both start from `seed`."""
    folder = resolve_base(model.base)
    check_base(folder)
    before = base_stamp(folder)
    digest = check_digest(folder, model.digest)
    tokenizer = load_tokenizer(folder)
    network, lora = _network(model, folder, task, tokenizer, lora)
    if base_stamp(folder) != before:  # what was loaded may not be what the digest is of
        raise BadInput(f"[model] base = {folder}: found files that changed while they were read")
    _check_positions(network, model.max_length)
    switch_dropout_off(network)
    _initialise(network, seed)
    where = device or torch.device("cpu")
    built = AdapterModel(network, task, tokenizer, digest, where, model.max_length, lora)
    check_fit(tokenizer, built.rows, f"[model] base = {folder}")
    _try(built)
    return built


def _try(model: AdapterModel) -> None:
    """BadInput where the network does not behave; what its batches may hold follows from how it
    does.
    """
    network = model.network  # a projection below the head may come later
    forward = network.pooled if isinstance(network, PooledClassifier) else network
    with model.probed():
        ids, mask = texts(model.vocabulary, model.device)
        check_still(forward, ids, mask)
        if model.task.name == "causal-lm":
            check_causal(forward, ids, mask)
        model.shapes.routed = is_routed(forward, model.vocabulary, model.device)
        model.probe_seconds = probe(model, forward)


def _check_positions(network: PooledClassifier | OwnHead, max_length: int) -> None:
    """BadInput, at once, where a record of `max_length` tokens could not be embedded."""
    config: Any = network.backbone.config
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(most, int) and 0 < most < max_length:
        raise BadInput(
            f"[model] max_length = {max_length}: expected at most the base model's {most} positions"
        )


def build_head(width: int, hidden: int, classes: int) -> nn.Sequential:
    """Linear, or linear - GELU - linear."""
    if not hidden:
        return nn.Sequential(nn.Linear(width, classes))
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, classes))


def _network(
    model: ModelConfig, folder: Path, task: Task, tokenizer: Any, lora: LoraConfig
) -> tuple[PooledClassifier | OwnHead, LoraConfig]:
    if task.name == "causal-lm":
        adapted, lora = _with_lora(
            load_language_model(folder), model, lora, peft.TaskType.CAUSAL_LM
        )
        return OwnHead(adapted), lora
    if task.name != "sequence-classification":
        raise BadInput(f"[model] task = {task.name!r}: found no network for it")
    if model.pooling == "default":
        base, heads = load_classifier(folder, len(task.labels))
        config = base.config.get_text_config()
        if config.pad_token_id is None:  # without one, transformers refuses a batch
            config.pad_token_id = tokenizer.pad_token_id or 0
        adapted, lora = _with_lora(base, model, lora, peft.TaskType.SEQ_CLS, heads)
        return OwnHead(adapted, _own_classifier(adapted)), lora
    base = load_backbone(folder)
    config = base.config.get_text_config()
    pooling = Pooling(_pooled_layers(model, config.num_hidden_layers), model.head_scale)
    backbone, lora = _with_lora(base, model, lora, peft.TaskType.FEATURE_EXTRACTION)
    width = model.kernel_directions or model.projection or config.hidden_size * len(pooling.layers)
    head = build_head(width, model.head_hidden, len(task.labels))
    return PooledClassifier(backbone, pooling, head), lora


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
    if model.pooling == "mean":
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
    kind: peft.TaskType,
    new: tuple[str, ...] = (),
) -> tuple[peft.PeftModel, LoraConfig]:
    """The adapted base, and the configuration with the names of what is adapted.

    `new` are modules that are trained whole, as PEFT's own heads are.
    """

    def used() -> frozenset[str]:
        embeddings: Any = base.get_input_embeddings()
        return called(base, *texts(embeddings.num_embeddings, base.device))

    heads = (*PEFT_HEADS, *new) if kind == peft.TaskType.SEQ_CLS else ()
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
    settled: Any = adapted.peft_config[PEFT_ADAPTER]
    settled.base_model_name_or_path = model.base
    settled.target_modules = set(lora.targets)  # PEFT shortens long lists in its own way
    if lora.variant == "ffa":
        for name, parameter in adapted.named_parameters():
            if ".lora_A." in name:
                parameter.requires_grad_(False)
    return adapted, lora


def _base_of(network: PooledClassifier | OwnHead) -> Any:
    backbone: Any = network.backbone
    return backbone.get_base_model()


def _trainable(network: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
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


def _initialise(network: nn.Module, seed: int) -> None:
    """LoRA A and hidden layers uniform in ±1/sqrt(fan-in), by NumPy's Philox; all else zero.

    Not torch's generator: every institution must reach the same frozen A, on any machine. The last
    layer of a head starts at zero, so that the first answer is uniform over the labels.
    """
    generator = np.random.Generator(np.random.Philox(seed))
    last_head = [
        name for name, p in _trainable(network) if name.startswith(HEAD_PREFIX) and p.ndim == 2
    ][-1:]
    tensors = dict(_trainable(network))
    frozen_a = {
        n: p for n, p in network.named_parameters() if ".lora_A." in n and not p.requires_grad
    }
    with torch.no_grad():
        for name, parameter in sorted({**tensors, **frozen_a}.items()):
            if parameter.ndim == 2 and ".lora_B." not in name and name not in last_head:
                bound = parameter.shape[1] ** -0.5
                values = generator.uniform(-bound, bound, tuple(parameter.shape)).astype(np.float32)
                parameter.copy_(torch.from_numpy(values))
            else:
                parameter.zero_()
