"""What a configuration asks LoRA to adapt, and what PEFT then finds by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN
from transformers import PreTrainedModel

from fedlora.common.config.load import parse_config
from fedlora.common.config.schema import LoraConfig, ModelConfig, is_expression
from fedlora.common.errors import BadInput
from fedlora.common.manifest.manifest import Network
from fedlora.common.model.network import build_model
from fedlora.common.model.targets import explicit
from fedlora.common.tasks.causal_lm import CausalLanguageModel
from fedlora.common.tasks.classification import SequenceClassification

LLAMA = {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}


def network(kind: str, config: str, **sizes: Any) -> PreTrainedModel:
    """A network without weights: names are all that counts."""
    with torch.device("meta"):
        built: PreTrainedModel = getattr(transformers, kind).from_config(
            getattr(transformers, config)(**sizes)
        )
    return built


def llama(layers: int = 3) -> PreTrainedModel:
    return network("AutoModelForCausalLM", "LlamaConfig", num_hidden_layers=layers, **SMALL)


def bare_llama(layers: int = 3) -> PreTrainedModel:
    return network("AutoModel", "LlamaConfig", num_hidden_layers=layers, **SMALL)


def mixtral() -> PreTrainedModel:
    return network("AutoModelForCausalLM", "MixtralConfig", num_hidden_layers=2, **SMALL)


SMALL = {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 8,
    "vocab_size": 20,
}


def resolved(base: PreTrainedModel, *targets: str, layers: tuple[int, ...] = ()) -> LoraConfig:
    every = frozenset(name for name, _ in base.named_modules())
    return explicit(base, LoraConfig(targets=targets, layers=layers), lambda: every)


def adapted(base: PreTrainedModel, lora: LoraConfig) -> set[str]:
    """What PEFT alone adapts."""
    settings = peft.LoraConfig(
        r=2, target_modules=list(lora.targets), layers_to_transform=list(lora.layers) or None
    )
    model = peft.inject_adapter_in_model(settings, base)
    return {n for n, m in model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}


@pytest.mark.parametrize(
    ("kind", "config", "sizes"),
    [
        ("bert", "BertConfig", {"num_hidden_layers": 1}),
        ("roberta", "RobertaConfig", {"num_hidden_layers": 1}),
        ("electra", "ElectraConfig", {"num_hidden_layers": 1}),
        ("deberta-v2", "DebertaV2Config", {"num_hidden_layers": 1}),
        ("gpt2", "GPT2Config", {"n_layer": 1}),
        ("gpt_neo", "GPTNeoConfig", {"num_layers": 2, "attention_types": [[["global"], 2]]}),
        ("gptj", "GPTJConfig", {"n_layer": 1}),
        ("gpt_neox", "GPTNeoXConfig", {"num_hidden_layers": 1}),
        ("bloom", "BloomConfig", {"n_layer": 1}),
        ("opt", "OPTConfig", {"num_hidden_layers": 1}),
        ("llama", "LlamaConfig", {"num_hidden_layers": 1}),
        ("mistral", "MistralConfig", {"num_hidden_layers": 1}),
        ("qwen2", "Qwen2Config", {"num_hidden_layers": 1}),
        ("gemma2", "Gemma2Config", {"num_hidden_layers": 1}),
    ],
)
def test_auto_is_what_peft_knows_of_a_family(kind: str, config: str, sizes: Any) -> None:
    assert set(resolved(network("AutoModel", config, **sizes), "auto").targets) == set(KNOWN[kind])


def test_auto_says_so_where_it_knows_no_attention() -> None:
    with pytest.raises(BadInput, match='targets = "auto": found no attention whose projections'):
        resolved(network("AutoModel", "FNetConfig", num_hidden_layers=1), "auto")


def test_all_linear_is_every_layer_but_the_output() -> None:
    assert set(resolved(llama(), "all-linear").targets) == LLAMA


def test_all_linear_leaves_out_what_no_text_goes_through() -> None:
    base = llama(1)
    lora = explicit(
        base, LoraConfig(targets=("all-linear",)), lambda: {"model.layers.0.mlp.up_proj"}
    )
    assert lora.targets == ("up_proj",)


@pytest.mark.parametrize("expression", [r"re:.*\.q_proj", r".*\.(q_proj)", r"re:.*q_proj"])
def test_an_expression_becomes_names(expression: str) -> None:
    lora = resolved(llama(), expression)
    assert lora.targets == ("q_proj",) and lora.layers == ()
    assert adapted(llama(), lora) == {f"model.layers.{n}.self_attn.q_proj" for n in range(3)}


def test_names_are_as_long_as_they_have_to_be() -> None:
    lora = resolved(llama(), r"re:.*\.[02]\..*\.(q|v)_proj")
    found = {f"model.layers.{n}.self_attn.{p}_proj" for n in (0, 2) for p in "qv"}
    assert {target.count(".") for target in lora.targets} == {2}
    assert adapted(llama(), lora) == found


@pytest.mark.parametrize("build", [llama, bare_llama])
@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("auto",)])
def test_layers_are_those_that_were_asked_for(build: Any, targets: tuple[str, ...]) -> None:
    """PEFT by itself finds no layer of a network whose layers are not inside another module."""
    found = adapted(build(), resolved(build(), *targets, layers=(0, 2)))
    assert sorted(name.split("layers.")[1][0] for name in found) == ["0", "0", "2", "2"]


def test_names_that_peft_finds_stay_as_they_are_written() -> None:
    asked = LoraConfig(targets=("v_proj", "q_proj"), layers=(1,))
    assert explicit(llama(), asked, frozenset) is asked


@pytest.mark.parametrize(
    ("targets", "layers", "said"),
    [
        (("q_proj", "v_prjo"), (), 'targets = "v_prjo": found no such layer in the base, expected'),
        (("re:.*nothing",), (), 'targets = "re:.*nothing": found no such layer'),
        (("re:(",), (), r'targets = "re:\(": found no regular expression'),
        (("embed_tokens",), (), 'targets = "embed_tokens": found an embedding'),
        (("q_proj",), (1, 99), r"layers = \[1, 99\]: found no layer 99"),
        (("self_attn",), (), "found a LlamaAttention, which has no rule"),
        ((r"re:.*(q_proj|norm)",), (), "found a LlamaRMSNorm, which has no rule"),
    ],
)
def test_what_can_not_be_adapted_is_named(
    targets: tuple[str, ...], layers: tuple[int, ...], said: str
) -> None:
    with pytest.raises(BadInput, match=said) as caught:
        resolved(llama(), *targets, layers=layers)
    assert len(str(caught.value).splitlines()) == 1


def test_a_router_is_not_adapted() -> None:
    with pytest.raises(BadInput, match='targets = "gate": found a router between experts'):
        resolved(mixtral(), "gate")
    assert set(resolved(mixtral(), "all-linear").targets) == {f"{p}_proj" for p in "qkvo"}


def test_an_output_that_is_the_embedding_is_not_adapted() -> None:
    tied = network("AutoModelForCausalLM", "GPT2Config", n_layer=1)
    with pytest.raises(BadInput, match="found an output layer that is the embedding"):
        resolved(tied, "lm_head")
    assert resolved(llama(), "lm_head").targets == ("lm_head",)


def test_a_configuration_says_it_with_one_word_or_a_list() -> None:
    one, several = (
        parse_config(f"[lora]\ntargets = {text}").lora for text in ('"auto"', '["auto"]')
    )
    assert one == several == LoraConfig(targets=("auto",))
    assert parse_config("", "x", ["lora.targets=all-linear"]).lora.targets == ("all-linear",)
    assert [is_expression(each) for each in ("q_proj", "attn.q-proj", ".*q", "re:q", "a|b")] == [
        False, False, True, True, True,
    ]  # fmt: skip


@pytest.mark.parametrize("target", ["auto", "all-linear", "re:.*", ".*q_proj"])
def test_a_manifest_names_what_it_adapts(target: str) -> None:
    network = Network.of(ModelConfig(pooling="default"), LoraConfig(targets=(target,)))
    with pytest.raises(BadInput, match=r"manifest network targets: found .*, expected names"):
        network.configs("base")


def test_the_model_knows_the_names_of_what_it_adapts(tiny_bert: Path, tiny_llama: Path) -> None:
    settings = ModelConfig(base=str(tiny_bert), pooling="default")
    task = SequenceClassification(("a", "b"))
    model = build_model(settings, LoraConfig(rank=1, targets=("all-linear",)), task, 1)
    assert model.lora.targets == ("dense", "key", "query", "value")
    again = build_model(*Network.of(settings, model.lora).configs(str(tiny_bert)), task, 1)
    assert again.spec == model.spec
    causal = ModelConfig(base=str(tiny_llama), pooling="default", task="causal-lm")
    language = build_model(causal, LoraConfig(targets=("auto",)), CausalLanguageModel(), 1)
    assert language.lora.targets == ("q_proj", "v_proj")
