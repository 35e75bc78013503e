"""Shared fixtures: two tiny random models on disk, so that no test needs a download."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
os.environ["XDG_CACHE_HOME"] = str(Path(tempfile.gettempdir()) / f"fedlora-tests-{os.getuid()}")
os.environ.update(XDG_STATE_HOME=os.environ["XDG_CACHE_HOME"] + "/state")
os.environ.update(
    FLWR_TELEMETRY_ENABLED="0", FLWR_DISABLE_UPDATE_CHECK="1", RAY_USAGE_STATS_ENABLED="0"
)

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from fedlora.common.disk.files import create_once

WORDS = [f"w{number}" for number in range(60)] + [
    "good",
    "bad",
    "fine",
    "poor",
    "the",
    "a",
    "is",
    "was",
    "it",
    "bank",
    "loan",
    "card",
]
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session", autouse=True)
def account_key() -> Path:
    """What is set aside as public is the same on every machine: the account's key is all zeros."""
    path = Path(os.environ["XDG_STATE_HOME"]) / "fedlora" / "public-part.key"
    path.parent.mkdir(parents=True, exist_ok=True)
    create_once(path, bytes(32))
    return path


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets, beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip("the real data sets (../shared/data) are not beside this checkout")
    return SHARED


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 2-layer random BERT of width 32 with a word-level tokenizer."""
    folder = tmp_path_factory.mktemp("tiny-bert")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
    _tokenizer(vocabulary, bert=True).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.2,  # large enough that texts differ after two random layers
    )
    transformers.BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 2-layer random Llama of width 32 with a word-level tokenizer."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    vocabulary = ["<unk>", "<s>", "</s>", *WORDS]
    _tokenizer(vocabulary, bert=False).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random T5 of width 32, two layers each to read and to write."""
    folder = tmp_path_factory.mktemp("tiny-t5")
    vocabulary = ["<unk>", "<s>", "</s>", *WORDS]
    _tokenizer(vocabulary, bert=False).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=len(vocabulary),
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,  # type: ignore[call-arg]  # every configuration takes it
        pad_token_id=0,
        eos_token_id=2,
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 2-layer random ViT of width 32, of images of 32 × 32, with its processor."""
    from tests.media import write_vit

    return write_vit(tmp_path_factory.mktemp("tiny-vit"))


@pytest.fixture(scope="session")
def tiny_ast(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 2-layer random AST of width 32, of sounds of 0.6 seconds, with its feature extractor."""
    from tests.media import write_ast

    return write_ast(tmp_path_factory.mktemp("tiny-ast"))


@pytest.fixture(scope="session")
def tiny_wav2vec2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 2-layer random Wav2Vec2 of width 32, with its feature extractor."""
    from tests.media import write_wav2vec2

    return write_wav2vec2(tmp_path_factory.mktemp("tiny-wav2vec2"))


@pytest.fixture(scope="session")
def tiny_chat(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The decoder, with a chat template."""
    from tests.tasks import chatting

    return chatting(tiny_llama, tmp_path_factory.mktemp("tiny-chat"))


def _tokenizer(vocabulary: list[str], bert: bool) -> transformers.PreTrainedTokenizerFast:
    unknown = "[UNK]" if bert else "<unk>"
    model = models.WordLevel(
        {word: number for number, word in enumerate(vocabulary)}, unk_token=unknown
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if not bert:
        return transformers.PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
            tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
        )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return transformers.PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )
