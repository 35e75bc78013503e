"""A base of one's own: an architecture that transformers does not have.

It shows what a base is to a federation: a class of transformers', whose hidden states a head reads
and whose linear layers LoRA adapts, in a folder with weights and a tokenizer. All else is as for
any base: its digest is in the manifest, and it is tried before anything is charged. A package
offers `register` to institutions under its `model_type`; nothing in the folder itself is run:

    [project.entry-points."fedlora.bases"]
    word-mixer = "my_package:register"

    python -m fedlora.simulations.examples.own_base
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from fedlora.common.model.base import resolve_base
from fedlora.simulations import Options, Result, simulate
from fedlora.simulations.examples.private_federation import federation


class MixerConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """Its numbers, under the names that transformers has for them."""

    model_type = "word-mixer"

    def __init__(self, words: int = 1000, width: int = 64, layers: int = 2, **given: Any) -> None:
        self.vocab_size, self.hidden_size, self.num_hidden_layers = words, width, layers
        super().__init__(**given)


class Mixer(PreTrainedModel):  # type: ignore[no-untyped-call]
    """Each word with the mean of its text, in layers that add to what came before."""

    config_class = MixerConfig

    def __init__(self, config: MixerConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.words = nn.Embedding(config.vocab_size, width)
        self.mixed = nn.ModuleList(
            nn.Linear(2 * width, width) for _ in range(config.num_hidden_layers)
        )
        self.post_init()  # type: ignore[no-untyped-call]

    def get_input_embeddings(self) -> nn.Module:
        """What the tokenizer's words are looked up in."""
        return self.words

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any
    ) -> BaseModelOutput:
        """Hidden states (n, length, width) before and after each layer; no row sees another."""
        hidden, real = [self.words(input_ids)], attention_mask[:, :, None].to(self.dtype)
        for layer in self.mixed:
            mean = (hidden[-1] * real).sum(dim=1, keepdim=True) / real.sum(dim=1, keepdim=True)
            beside = torch.cat([hidden[-1], mean.expand_as(hidden[-1])], dim=2)
            hidden.append(hidden[-1] + torch.tanh(layer(beside)))
        return BaseModelOutput(last_hidden_state=hidden[-1], hidden_states=tuple(hidden))


def register() -> None:
    """Let transformers know both classes."""
    AutoConfig.register("word-mixer", MixerConfig, exist_ok=True)
    AutoModel.register(MixerConfig, Mixer, exist_ok=True)


def main(folder: Path, base: str = "minilm", rounds: int = 20) -> Result:
    """Save a mixer, here of random weights, with the words of `base`; then train above it."""
    register()
    torch.manual_seed(7)
    tokenizer = AutoTokenizer.from_pretrained(resolve_base(base))
    Mixer(MixerConfig(words=len(tokenizer))).save_pretrained(folder / "mixer")
    tokenizer.save_pretrained(folder / "mixer")
    config = federation(folder, str(folder / "mixer"), rounds)
    config = replace(config, lora=replace(config.lora, targets=("mixed.0", "mixed.1")))
    result = simulate(config, folder / "run", Options(threads=2))
    print(f"{config.model.base}: accuracy {result.summary['accuracy']:.3f}")
    return result


if __name__ == "__main__":
    main(Path(sys.argv[1] if sys.argv[1:] else "runs/own_base"))
