"""Small random bases, one for each family of transformers, written to disk as people publish them.

Every kind of dropout is on in their configurations, at 0.1 and more: what trains on them has to
turn it off. Two layers, 32 wide; a vocabulary of words with a word-level tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

WORDS = [f"w{number}" for number in range(60)] + ["good", "bad", "fine", "poor", "the", "a", "is"]
ENCODER = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
ROBERTA = ("<s>", "<pad>", "</s>", "<unk>")
DECODER = ("<unk>", "<s>", "</s>")  # as many are: without a word for padding
DROPOUTS = 0.1


@dataclass(frozen=True)
class Family:
    """One kind of base: `sizes` are its configuration's own, beside the vocabulary."""

    name: str
    config: str  # a class of transformers
    kind: str  # "encoder", "decoder", "encoder-decoder", or "half": its encoder alone
    sizes: Mapping[str, Any] = field(default_factory=dict)
    special: tuple[str, ...] = ()
    # of a family whose tokenizer transformers makes by itself, whatever lies in the folder
    by_bytes: bool = False

    def save(self, folder: Path) -> Path:
        """Write a base of this family: weights from a fixed seed, configuration, tokenizer."""
        special = self.special or (DECODER if self.kind == "decoder" else ENCODER)
        vocabulary = [*special, *WORDS]
        words = _bytes() if self.by_bytes else tokenizer(vocabulary, special)
        torch.manual_seed(0)
        config = getattr(transformers, self.config)(
            vocab_size=len(words), **_ids(special), **self.sizes
        )
        build = {
            "decoder": transformers.AutoModelForCausalLM,
            "encoder": transformers.AutoModel,
            "encoder-decoder": transformers.AutoModel,
            "half": transformers.AutoModelForTextEncoding,
        }[self.kind]
        model = build.from_config(config)  # type: ignore[no-untyped-call]
        model.save_pretrained(folder)
        words.save_pretrained(folder)
        return folder


def tokenizer(
    vocabulary: list[str], special: tuple[str, ...]
) -> transformers.PreTrainedTokenizerFast:
    """Words by white space; what `special` says of padding, beginning and end."""
    unknown = next(word for word in special if "unk" in word.lower())
    words = Tokenizer(models.WordLevel({w: n for n, w in enumerate(vocabulary)}, unk_token=unknown))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    if special == DECODER:
        return transformers.PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
            tokenizer_object=words, unk_token=unknown, bos_token=special[1], eos_token=special[2]
        )
    pad, first, last = (
        ("<pad>", "<s>", "</s>") if special == ROBERTA else ("[PAD]", "[CLS]", "[SEP]")
    )
    words.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}",
        special_tokens=[(each, vocabulary.index(each)) for each in (first, last)],
    )
    return transformers.PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=words, unk_token=unknown, pad_token=pad, cls_token=first, sep_token=last
    )


def _bytes() -> Any:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    return transformers.Qwen2Tokenizer(vocab={each: n for n, each in enumerate(letters)}, merges=[])


def _ids(special: tuple[str, ...]) -> dict[str, int | None]:
    if special == DECODER:
        return {"pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}
    if special == ROBERTA:
        return {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    return {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}


_WIDE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_BERT = {**_WIDE, "intermediate_size": 64, "max_position_embeddings": 64, "initializer_range": 0.2}
_LLAMA = {**_BERT, "num_key_value_heads": 2, "attention_dropout": 0.1}
_HEADS = {"head_dim": 8}
_EXPERTS = {"num_experts_per_tok": 2, "router_jitter_noise": 0.1}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}

FAMILIES = (
    Family("BERT", "BertConfig", "encoder", _BERT),
    Family("RoBERTa", "RobertaConfig", "encoder", _BERT, ROBERTA),
    Family("XLM-R", "XLMRobertaConfig", "encoder", _BERT, ROBERTA),
    Family(
        "DistilBERT",
        "DistilBertConfig",
        "encoder",
        {
            "dim": 32,
            "n_layers": 2,
            "n_heads": 4,
            "hidden_dim": 64,
            "max_position_embeddings": 64,
            "initializer_range": 0.2,
        },
    ),
    Family("ELECTRA", "ElectraConfig", "encoder", {**_BERT, "embedding_size": 16}),
    Family(
        "ALBERT",
        "AlbertConfig",
        "encoder",
        {
            **_BERT,
            "embedding_size": 16,
            "hidden_dropout_prob": 0.1,
            "attention_probs_dropout_prob": 0.1,
        },
    ),
    Family(
        "DeBERTa-v2",
        "DebertaV2Config",
        "encoder",
        {
            **_BERT,
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "conv_kernel_size": 3,
            "position_buckets": 16,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": False,
        },
    ),
    Family(
        "DeBERTa-v3",
        "DebertaV2Config",
        "encoder",
        {
            **_BERT,
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_buckets": 16,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "position_biased_input": False,
            "type_vocab_size": 0,
        },
    ),
    Family("MPNet", "MPNetConfig", "encoder", _BERT, ROBERTA),
    Family("Longformer", "LongformerConfig", "encoder", {**_BERT, "attention_window": 4}, ROBERTA),
    Family(
        "ModernBERT",
        "ModernBertConfig",
        "encoder",
        {
            **_BERT,
            "global_attn_every_n_layers": 2,
            "local_attention": 8,
            "attention_dropout": 0.1,
            "embedding_dropout": 0.1,
            "mlp_dropout": 0.1,
        },
    ),
    Family(
        "XLNet",
        "XLNetConfig",
        "encoder",
        {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64, "initializer_range": 0.2},
    ),
    Family(
        "GPT-2",
        "GPT2Config",
        "decoder",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.2},
    ),
    Family(
        "GPT-Neo",
        "GPTNeoConfig",
        "decoder",
        {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "intermediate_size": 64,
            "max_position_embeddings": 64,
            "window_size": 8,
            "initializer_range": 0.2,
            "attention_dropout": 0.1,
            "embed_dropout": 0.1,
            "resid_dropout": 0.1,
        },
    ),
    Family(
        "GPT-J",
        "GPTJConfig",
        "decoder",
        {
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            "rotary_dim": 4,
            "initializer_range": 0.2,
            "attn_pdrop": 0.1,
            "resid_pdrop": 0.1,
            "embd_pdrop": 0.1,
        },
    ),
    Family(
        "GPT-NeoX",
        "GPTNeoXConfig",
        "decoder",
        {**_BERT, "attention_dropout": 0.1, "hidden_dropout": 0.1},
    ),
    Family(
        "OPT",
        "OPTConfig",
        "decoder",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 64,
            "word_embed_proj_dim": 32,
            "max_position_embeddings": 64,
            "init_std": 0.2,
            "dropout": 0.1,
            "attention_dropout": 0.1,
            "layerdrop": 0.1,
        },
    ),
    Family(
        "BLOOM",
        "BloomConfig",
        "decoder",
        {
            "hidden_size": 32,
            "n_layer": 2,
            "n_head": 4,
            "initializer_range": 0.2,
            "hidden_dropout": 0.1,
            "attention_dropout": 0.1,
        },
    ),
    Family(
        "Falcon",
        "FalconConfig",
        "decoder",
        {
            **_WIDE,
            "multi_query": True,
            "parallel_attn": True,
            "initializer_range": 0.2,
            "hidden_dropout": 0.1,
            "attention_dropout": 0.1,
            "max_position_embeddings": 64,
        },
    ),
    Family("Llama", "LlamaConfig", "decoder", _LLAMA),
    Family("Mistral", "MistralConfig", "decoder", {**_LLAMA, "sliding_window": 8}),
    Family("Mixtral", "MixtralConfig", "decoder", {**_LLAMA, **_EXPERTS, "num_local_experts": 4}),
    Family("Qwen2", "Qwen2Config", "decoder", _LLAMA, by_bytes=True),
    Family(
        "Qwen2-MoE",
        "Qwen2MoeConfig",
        "decoder",
        {
            **_LLAMA,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 24,
            "decoder_sparse_step": 1,
        },
    ),
    Family("Qwen3", "Qwen3Config", "decoder", {**_LLAMA, **_HEADS}),
    Family("Gemma", "GemmaConfig", "decoder", {**_LLAMA, **_HEADS}),
    Family(
        "Gemma 2",
        "Gemma2Config",
        "decoder",
        {**_LLAMA, **_HEADS, "sliding_window": 8, "query_pre_attn_scalar": 8},
    ),
    Family(
        "Gemma 3",
        "Gemma3TextConfig",
        "decoder",
        {
            **_LLAMA,
            **_HEADS,
            "sliding_window": 8,
            "query_pre_attn_scalar": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    Family(
        "VaultGemma",
        "VaultGemmaConfig",
        "decoder",
        {**_LLAMA, **_HEADS, "sliding_window": 8, "query_pre_attn_scalar": 8},
    ),
    Family(
        "Phi-2",
        "PhiConfig",
        "decoder",
        {**_LLAMA, "num_key_value_heads": 4, "resid_pdrop": 0.1, "embd_pdrop": 0.1},
    ),
    Family("Phi-3", "Phi3Config", "decoder", {**_LLAMA, "resid_pdrop": 0.1, "embd_pdrop": 0.1}),
    Family("OLMo2", "Olmo2Config", "decoder", _LLAMA),
    Family("Granite", "GraniteConfig", "decoder", _LLAMA),
    Family("StableLM", "StableLmConfig", "decoder", {**_LLAMA, "hidden_dropout": 0.1}),
    Family("SmolLM3", "SmolLM3Config", "decoder", _LLAMA),
    Family(
        "StarCoder2",
        "Starcoder2Config",
        "decoder",
        {**_LLAMA, "residual_dropout": 0.1, "embedding_dropout": 0.1},
    ),
    Family(
        "gpt-oss",
        "GptOssConfig",
        "decoder",
        {**_LLAMA, **_HEADS, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    ),
    Family(
        "XGLM",
        "XGLMConfig",
        "decoder",
        {
            "d_model": 32,
            "ffn_dim": 64,
            "num_layers": 2,
            "attention_heads": 4,
            "max_position_embeddings": 64,
            "init_std": 0.2,
            "layerdrop": 0.1,
        },
    ),
    Family(
        "BioGPT", "BioGptConfig", "decoder", {**_BERT, "layerdrop": 0.1, "activation_dropout": 0.1}
    ),
    Family(
        "Mamba",
        "MambaConfig",
        "decoder",
        {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "initializer_range": 0.2},
    ),
    Family("T5", "T5Config", "encoder-decoder", _T5),
    Family("T5's encoder", "T5Config", "half", _T5),
    Family(
        "BART",
        "BartConfig",
        "encoder-decoder",
        {
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "max_position_embeddings": 64,
        },
    ),
)
