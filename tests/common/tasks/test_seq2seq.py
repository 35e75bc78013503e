"""A base that reads and then writes: its loss is transformers' own, with both texts in one row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from fedlora.common.config.schema import LoraConfig, ModelConfig
from fedlora.common.data.records import Records
from fedlora.common.errors import BadInput
from fedlora.common.model.network import AdapterModel, build_model
from fedlora.common.model.state import AdapterState
from fedlora.common.model.tokenizer import load_tokenizer
from fedlora.common.tasks.batch import Tokenised
from fedlora.common.tasks.causal_lm import LEARNT
from fedlora.common.tasks.seq2seq import SequenceToSequence
from tests.tasks import text

TASK, LENGTH = SequenceToSequence(), 24


@pytest.fixture(scope="module")
def tiny_bart(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BART, whose tokenizer has fewer words than most."""
    folder = tmp_path_factory.mktemp("tiny-bart")
    tokenizer = load_tokenizer(tiny_llama)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    more: dict[str, Any] = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}
    for part in ("encoder", "decoder"):
        more |= {f"{part}_{name}": size for name, size in SIZES}
    config = transformers.BartConfig(
        vocab_size=len(tokenizer), d_model=32, max_position_embeddings=32, **more
    )
    transformers.BartForConditionalGeneration(config).save_pretrained(folder)
    return folder


SIZES = (("layers", 2), ("attention_heads", 4), ("ffn_dim", 64))


@pytest.fixture(params=["tiny_t5", "tiny_bart"])
def model(request: pytest.FixtureRequest) -> AdapterModel:
    base = str(request.getfixturevalue(request.param))
    settings = ModelConfig(base, task="seq2seq", pooling="default", max_length=LENGTH)
    built = build_model(settings, LoraConfig(rank=2), TASK, 5)
    values = np.random.default_rng(3).normal(0, 0.05, built.spec.size).astype(np.float32)
    built.load(AdapterState(built.spec, values))
    return built


def encoded(model: AdapterModel, count: int = 6) -> Tokenised:
    rng = np.random.default_rng(1)
    prompts, responses = ([text(rng) for _ in range(count)] for _ in range(2))
    records = Records(prompts, responses, None, None, {}, "test")
    return TASK.encode(records, model.tokenizer, LENGTH)


def test_a_loss_is_transformers_own(model: AdapterModel) -> None:
    data = encoded(model)
    assert data.second is not None
    backbone: Any = model.network.backbone
    with torch.no_grad():
        losses = model.losses(data.batch(np.arange(len(data)), model.pad, model.device, (8, 32)))
        for row, begin in enumerate(data.second):
            ids = torch.from_numpy(data.tokens_of(row).astype(np.int64))[None]
            expected = backbone(input_ids=ids[:, :begin], labels=ids[:, begin:]).loss
            assert float(losses[row]) == pytest.approx(float(expected), rel=1e-5)


def test_an_answer_is_what_the_base_writes(model: AdapterModel) -> None:
    data = encoded(model)
    assert data.second is not None
    source = data.tokens_of(0)[: data.second[0]].tolist()
    backbone: Any = model.network.backbone
    given = torch.tensor([source])
    words = backbone.generate(input_ids=given, max_new_tokens=5, do_sample=False)
    assert model.continued(source, 5) == words[0, 1:].tolist()


def test_both_texts_fit(tiny_t5: Path) -> None:
    tokenizer = load_tokenizer(tiny_t5)
    records = Records(["it was good " * 5], ["fine the bank was"], None, None, {}, "test")
    data = TASK.encode(records, tokenizer, 8)
    words = tokenizer.convert_ids_to_tokens(data.tokens.tolist())
    assert words == ["it", "was", "good", "it", "fine", "the", "bank", "was"]
    assert data.second is not None and data.second.tolist() == [4]
    assert (data.targets == LEARNT).tolist() == [False] * 4 + [True] * 4
    assert dict(data.truncated) == {"prompt": 1, "response": 1}


def test_a_base_without_both_halves_is_refused(tiny_bert: Path, tiny_llama: Path) -> None:
    for base in (tiny_bert, tiny_llama):
        settings = ModelConfig(str(base), task="seq2seq", pooling="default", max_length=LENGTH)
        with pytest.raises(BadInput, match="expected an encoder with a decoder, as T5 or BART"):
            build_model(settings, LoraConfig(rank=2), TASK, 5)


def test_what_is_asked_is_a_text() -> None:
    assert TASK.asked(["a"]).texts == ["a"]
    with pytest.raises(BadInput, match="input 2: found list, expected text"):
        TASK.asked(["a", ["b", "c"]])
