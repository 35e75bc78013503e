"""The frozen base with a LoRA adapter, and the one way in and out of it: an `AdapterState`.

Dropout is off: a private step is already noisy, and each example's loss must depend on that example
alone. The trainable parameters, the noised vector and the exported tensors are the same set, by
construction: all three come from `AdapterModel.parameters`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from fedlora.common.config.schema import LoraConfig, ModelConfig
from fedlora.common.data.records import Records
from fedlora.common.disk.mapped import let_go
from fedlora.common.errors import BadInput
from fedlora.common.model.architectures import register_architecture
from fedlora.common.model.assembly import PEFT_ADAPTER, assembled, initialise, trainable
from fedlora.common.model.base import base_stamp, check_base, check_digest, resolve_base
from fedlora.common.model.behaviour import check_causal, check_still, is_routed, mixes_records
from fedlora.common.model.dropout import switch_dropout_off
from fedlora.common.model.elementwise import Watch
from fedlora.common.model.inputs import load_reader
from fedlora.common.model.loading import offered_attentions
from fedlora.common.model.machine import check_room
from fedlora.common.model.next_words import NextWords
from fedlora.common.model.pooling import OwnHead, PooledClassifier
from fedlora.common.model.probe import probe
from fedlora.common.model.projection import Projection
from fedlora.common.model.quantised import quantise, quantised_as
from fedlora.common.model.recompute import recompute
from fedlora.common.model.shapes import Shape, Shapes, alike, probes, tries
from fedlora.common.model.state import AdapterSpec, AdapterState, TensorSpec
from fedlora.common.model.stored import Place, stored_as
from fedlora.common.tasks.batch import Batch, Encoded, Totals
from fedlora.common.tasks.causal_lm import CausalLanguageModel
from fedlora.common.tasks.task import LANGUAGE, TRANSLATION, Task
from fedlora.common.tasks.texts import as_pooled


class AdapterModel:
    """A network whose trainable part is an `AdapterState`; one resident object for all clients."""

    def __init__(
        self,
        network: PooledClassifier | OwnHead,
        task: Task,
        digest: str,
        place: Place,
        longest: int,
        lora: LoraConfig,
    ) -> None:
        # Without dropout, skipped layers or noisy routers by construction: eval mode, always.
        self.network = network.to(place.device).eval()
        self.task = task
        self.inputs = network.inputs
        self.tokenizer = network.inputs.reader  # or the processor of another medium
        self.base_digest = digest
        self.device = place.device
        # what the frozen matrices are stored as
        self.stored = quantised_as(network) or stored_as(network)
        self.longest = longest  # tokens that a record is cut to, or that all records count as
        self.lora = lora  # with names for targets
        self.precision = torch.float32
        self.attentions = offered_attentions(_base_of(network))
        self.attention = ""  # as set; "": as loaded
        self.probe_seconds = 0.0
        self.shapes = Shapes()
        self.next_words: NextWords | None = None  # of a language model in two parts
        self.parameters: dict[str, nn.Parameter] = dict(trainable(network))
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
                let_go(value)

    def state(self) -> AdapterState:
        """The network's trainable values."""
        named = {name: p.detach().cpu().float().numpy() for name, p in self.parameters.items()}
        return AdapterState.from_named(self.spec, named)

    @contextmanager
    def probed(self, seed: int = 0) -> Iterator[None]:
        """Values of our own for as long as this lasts.

        A coordinator's could hide how the network rounds. Every other seed's are large.
        """
        before, scale = self.state(), 0.5 if seed % 2 else 0.05
        values = np.random.default_rng(seed).normal(0, scale, self.spec.size)
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

    def tried(
        self, shape: Shape, give: Callable[[Encoded], Sequence[torch.Tensor]], drawn: int = 0
    ) -> list[torch.Tensor] | None:
        """What a record of nobody's gives in every place of `shape`, and beside others.

        None where it is not one thing, or might not be for other values. The first record of a try
        is the same for shapes of which as many are `drawn`.
        """
        nobodys = replace(shape, records=drawn or shape.records)
        for seed in range(tries(shape, self.precision, self.spec.size)):
            with self.probed(seed), Watch(shape.records) as watch:
                same, beside = map(give, probes(nobodys, self.inputs, self.task, seed))
            if watch.beside or not alike(same, beside):
                return None
        return [each[0] for each in same]

    def logits(self, batch: Batch) -> torch.Tensor:
        """(n, classes) or (n, length, vocabulary), under this model's precision."""
        with self.autocast():
            result: torch.Tensor = self.network(batch.ids, batch.mask)
        return result

    def losses(self, batch: Batch) -> torch.Tensor:
        """(n,) float32 of each example by itself, as the task's of `logits`; in less memory."""
        task, words = self.task, self.next_words
        if words is None or not isinstance(task, CausalLanguageModel):
            return task.losses(self.logits(batch), batch)
        with self.autocast():
            return task.losses_of(words.losses(batch, task.counted(batch)), batch)

    def measure(self, batch: Batch) -> Totals:
        """The task's sums over a batch."""
        task, words = self.task, self.next_words
        if words is None or not isinstance(task, CausalLanguageModel):
            return task.measure(self.logits(batch), batch)
        with self.autocast():
            return task.measure_of(words.losses(batch, task.counted(batch)), batch)

    @torch.no_grad()
    def continued(self, ids: Sequence[int], tokens: int, temperature: float = 0.0) -> list[int]:
        """Words of a language model after `ids`: the likeliest, or drawn at a temperature."""
        backbone: Any = self.network.backbone
        given = torch.tensor([list(ids)], device=self.device)
        with self.autocast():
            found = backbone.generate(
                input_ids=given,
                attention_mask=torch.ones_like(given),
                max_new_tokens=tokens,
                do_sample=temperature > 0,
                temperature=temperature or None,
                pad_token_id=self.pad,
            )
        # a translator writes its own text, from the word that each begins with
        begin = 1 if self.task.reads == TRANSLATION else given.shape[1]
        return [int(each) for each in found[0, begin:]]

    def autocast(self) -> AbstractContextManager[Any]:
        """bf16 matrix products where chosen; whatever leaves a loss is float32."""
        if self.precision == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.precision)

    def encoded(self, records: Records) -> Encoded:
        """As the base reads them, all in memory; BadInput names a row, or what is not free."""
        return self.task.encode(records, self.tokenizer, self.longest)

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
        """What fills a batch up, behind the mask."""
        return self.inputs.pad

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
        size, saved = int(self.spec.head_mask().sum()), f".modules_to_save.{PEFT_ADAPTER}"
        for name, module in self.network.named_modules():
            whole = sum(each.numel() for each in module.parameters()) == size
            if isinstance(module, nn.Linear) and name.endswith(saved) and whole:
                return module
        raise BadInput(
            "[training] head_rounds: found a model without a linear head, expected pooling = mean"
            " or layers"
        )

    @torch.no_grad()
    def pooled(self, batch: Batch) -> torch.Tensor:
        """(n, width) float32: what the transformer makes of each example, below any projection.

        (n, length, width) where each token is read by itself.
        """
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
        """(n, width) float32: what the head receives for `pooled` examples or words."""
        if isinstance(self.network, PooledClassifier):
            return self.network.pooling.features(pooled)
        return pooled

    def recompute(self) -> None:
        """Compute layers again on the way back instead of keeping what is in them."""
        recompute(self.network)

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
    before = base_stamp(folder)
    check_base(folder)
    digest = check_digest(folder, model.digest)
    register_architecture(folder)
    reader = load_reader(folder, task.medium, model.max_length)
    place = Place.of(model.dtype, device)
    task = as_pooled(task, model.pooling)
    check_room(folder, place)
    network, lora = assembled(model, folder, task, reader, lora, place)
    if place.quantised:
        quantise(network.backbone, place.quantised)
    if base_stamp(folder) != before:  # what was copied may not be what the digest is of
        raise BadInput(f"[model] base = {folder}: found files that changed while they were read")
    longest = network.inputs.longest(network, model.max_length, f"[model] base = {folder}")
    switch_dropout_off(network)
    initialise(network, seed)
    built = AdapterModel(network, task, digest, place, longest, lora)
    _try(built)
    return built


def _try(model: AdapterModel) -> None:
    """BadInput where the network does not behave; what its batches may hold follows from how it
    does.
    """
    network = model.network  # a projection below the head may come later
    forward = network.pooled if isinstance(network, PooledClassifier) else network
    one, other = (model.inputs.tried(model.device, model.longest, seed) for seed in (0, 1))
    with model.probed():
        check_still(forward, *one)
        if model.task.reads == LANGUAGE:
            check_causal(forward, *one)
            model.next_words = _next_words(model, *one)
        if model.task.reads == TRANSLATION:
            ids, mask = one
            second = torch.arange(ids.shape[1], device=ids.device) > ids.shape[1] // 3
            check_causal(forward, ids, mask + (mask * second))
        model.shapes.routed = is_routed(forward, one, other)
        model.shapes.mixed = mixes_records(forward, *one)
        model.probe_seconds = probe(model, forward)


def _next_words(model: AdapterModel, ids: torch.Tensor, mask: torch.Tensor) -> NextWords | None:
    """The language model in two parts, where they were seen to give what the whole gives."""
    found = NextWords.of(_base_of(model.network))
    with torch.no_grad():
        scores = model.network(ids, mask)
    return found if found is not None and found.gives(ids, mask, scores) else None


def _base_of(network: PooledClassifier | OwnHead) -> Any:
    backbone: Any = network.backbone
    return backbone.get_base_model()
