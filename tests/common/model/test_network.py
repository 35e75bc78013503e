"""The network around an adapter state: in, out, exported, loaded; unsafe folders never opened."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import cdist

from fedlora.common.adapter.peft import export_adapter, load_adapter
from fedlora.common.config.schema import LoraConfig, ModelConfig
from fedlora.common.data.records import Records
from fedlora.common.errors import BadInput
from fedlora.common.model.base import base_digest, check_base, resolve_base
from fedlora.common.model.network import AdapterModel, build_model
from fedlora.common.model.pooling import PooledClassifier
from fedlora.common.model.projection import Affine, Projection
from fedlora.common.model.state import AdapterState
from fedlora.common.model.tokenizer import load_tokenizer
from fedlora.common.tasks.causal_lm import LEARNT, CausalLanguageModel
from fedlora.common.tasks.classification import SequenceClassification
from fedlora.common.tasks.task import Task

LORA = LoraConfig(rank=2, targets=("query", "value"))

LABELS = ("a", "b", "c")
TEXTS = ["w1 good w3", "w2", "bad w5 w6 w7 w8 loan", "poor the w9"]
HEADS = [("mean", 0), ("layers", 0), ("layers", 6), ("default", 0)]


def classifier(
    folder: Path, pooling: str, hidden: int = 0, lora: LoraConfig | None = None
) -> AdapterModel:
    settings = ModelConfig(base=str(folder), pooling=pooling, head_hidden=hidden)
    return build_model(settings, lora or LORA, SequenceClassification(LABELS), seed=3)


def scrambled(model: AdapterModel) -> AdapterState:
    values = np.random.default_rng(1).normal(0, 0.3, model.spec.size).astype(np.float32)
    return AdapterState(model.spec, values)


def records(texts: list[str], responses: list[str] | None = None) -> Records:
    labels = None if responses else np.zeros(len(texts), dtype=np.int64)
    return Records(texts, responses, labels, None, {}, "test")


@pytest.mark.parametrize(("pooling", "hidden"), HEADS)
def test_a_state_goes_in_and_comes_out_unchanged(
    tiny_bert: Path, pooling: str, hidden: int
) -> None:
    model = classifier(tiny_bert, pooling, hidden)
    state = scrambled(model)
    model.load(state)
    assert model.state() == state
    assert state.spec.head_mask().sum() == sum(p.numel() for p in model.head.parameters())


@pytest.mark.parametrize(("pooling", "hidden"), HEADS)
def test_an_exported_adapter_gives_the_same_logits(
    tiny_bert: Path, tmp_path: Path, pooling: str, hidden: int
) -> None:
    model = classifier(tiny_bert, pooling, hidden)
    state = scrambled(model)
    settings = ModelConfig(base=str(tiny_bert), pooling=pooling, head_hidden=hidden)
    export_adapter(model, state, settings, LORA, 3, tmp_path)
    data = model.task.encode(records(TEXTS), model.tokenizer, 64)
    batch = data.batch(np.arange(4), model.pad, model.device)
    expected = model.logits(batch).detach()
    loaded = load_adapter(tmp_path)
    assert torch.allclose(loaded.logits(TEXTS), expected, atol=1e-5)
    assert set(loaded.predict(TEXTS)) <= set(LABELS)
    if pooling == "default":  # PEFT alone loads all of it
        base = transformers.AutoModelForSequenceClassification.from_pretrained(
            tiny_bert, num_labels=3
        )
        alone = peft.PeftModel.from_pretrained(base, tmp_path).eval()
        with torch.no_grad():
            found = alone(input_ids=batch.ids, attention_mask=batch.mask).logits
        assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "layers"])
def test_peft_alone_loads_the_adapted_backbone(
    tiny_bert: Path, tmp_path: Path, pooling: str
) -> None:
    model = classifier(tiny_bert, pooling)
    state = scrambled(model)
    export_adapter(
        model, state, ModelConfig(base=str(tiny_bert), pooling=pooling), LORA, 3, tmp_path
    )
    alone = peft.PeftModel.from_pretrained(
        transformers.AutoModel.from_pretrained(tiny_bert), tmp_path
    ).eval()
    batch = model.task.encode(records(TEXTS), model.tokenizer, 64).batch(
        np.arange(4), model.pad, model.device
    )
    with torch.no_grad():
        hidden = alone(
            input_ids=batch.ids, attention_mask=batch.mask, output_hidden_states=True
        ).hidden_states
        assert isinstance(model.network, PooledClassifier)
        means = model.network.pooling.means(hidden, batch.mask)
        assert torch.allclose(means, model.pooled(batch), atol=1e-5)


def test_a_causal_model_exports_and_completes(tiny_llama: Path, tmp_path: Path) -> None:
    settings = ModelConfig(base=str(tiny_llama), pooling="default", task="causal-lm")
    lora = LoraConfig(rank=2, targets=("q_proj", "v_proj"))
    model = build_model(settings, lora, CausalLanguageModel(), seed=3)
    state = scrambled(model)
    export_adapter(model, state, settings, lora, 3, tmp_path)
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama)
    alone = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    batch = model.task.encode(records(TEXTS, TEXTS), model.tokenizer, 64).batch(
        np.arange(4), 0, model.device
    )
    with torch.no_grad():
        found = alone(input_ids=batch.ids, attention_mask=batch.mask).logits
        assert torch.allclose(found, model.logits(batch), atol=1e-5)
    assert isinstance(load_adapter(tmp_path).complete("w1 w2", tokens=4), str)


@pytest.mark.parametrize("kernel", [0, 7])
def test_a_projection_goes_with_its_adapter(tiny_bert: Path, tmp_path: Path, kernel: int) -> None:
    settings = ModelConfig(
        base=str(tiny_bert), pooling="layers", projection=5, kernel_directions=kernel, head_hidden=4
    )
    model = build_model(settings, LORA, SequenceClassification(LABELS), seed=3)
    public = np.random.default_rng(0).uniform(size=(40, 96)).astype(np.float32)
    model.projection = Projection.fit(public, 5, 0.1, kernel, 2.0)
    state = scrambled(model)
    export_adapter(model, state, settings, LORA, 3, tmp_path)
    batch = model.task.encode(records(TEXTS), model.tokenizer, 64).batch(
        np.arange(4), 0, model.device
    )
    assert torch.allclose(load_adapter(tmp_path).logits(TEXTS), model.logits(batch), atol=1e-5)
    path = tmp_path / "projection.safetensors"
    Projection.fit(public + 1, 5, 0.1, kernel, 2.0).write(path)
    with pytest.raises(BadInput, match="expected sha256"):
        load_adapter(tmp_path)


def test_whitened_features_have_one_variance_where_there_is_no_ridge() -> None:
    rng = np.random.default_rng(0)
    public = (rng.normal(size=(500, 6)) @ rng.normal(size=(6, 6)) + 3).astype(np.float32)
    fitted = Projection.fit(public, 4, 0.0)
    mapped = public @ fitted.whiten.matrix - fitted.whiten.shift
    assert np.allclose(mapped.T @ mapped / 500, np.eye(4), atol=1e-3)
    assert Projection.fit(public, 4, 0.5).digest != fitted.digest
    with pytest.raises(BadInput, match="found 7 directions"):
        Projection.fit(public, 7, 0.0)
    public[3, 1] = np.inf
    with pytest.raises(BadInput, match="not finite"):
        Projection.fit(public, 4, 0.0)


def test_a_linear_head_on_kernel_features_is_a_kernel_machine() -> None:
    """Without ridge and with all directions, centred inner products are the centred kernel's."""
    rng = np.random.default_rng(0)
    public = rng.normal(size=(30, 8)).astype(np.float32)
    fitted = Projection.fit(public, 6, 0.0, 20, 0.7)
    assert fitted.kernel is not None
    z = public @ fitted.whiten.matrix - fitted.whiten.shift
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    assert np.allclose(z, fitted.kernel.landmarks, atol=1e-5)
    kernel = np.exp(0.7 * (z @ z.T - 1))
    mapped = kernel @ fitted.kernel.affine.matrix - fitted.kernel.affine.shift
    assert np.allclose(mapped.mean(axis=0), 0, atol=1e-3)
    assert np.allclose(mapped.T @ mapped / 30, np.eye(20), atol=1e-2)


@pytest.mark.parametrize(("directions", "ridge"), [(20, 0.0), (40, 1.0)])
def test_a_kernel_whitened_at_once_is_that_of_its_feature_map(
    directions: int, ridge: float
) -> None:
    """The long way: K to the power of a half as features, whitened, and put behind its root."""
    rng = np.random.default_rng(0)
    known, new = (rng.normal(size=(rows, 5)) for rows in (60, 9))
    similar, asked = np.exp(-cdist(known, known)), np.exp(-cdist(new, known))
    values, vectors = np.linalg.eigh(similar)
    root = vectors / np.sqrt(values)
    long = Affine.whitening(similar @ root, directions, ridge)
    at_once = Affine.whitening_kernel(similar, directions, ridge)
    expected = asked @ root @ long.matrix - long.shift
    found = asked @ at_once.matrix - at_once.shift
    assert np.allclose(found @ found.T, expected @ expected.T, atol=1e-5)
    with pytest.raises(BadInput, match="found 61 directions"):
        Affine.whitening_kernel(similar, 61, ridge)


@pytest.mark.parametrize("twice", [0, 20], ids=["all", "duplicates"])
def test_a_kernel_of_as_many_directions_as_landmarks_keeps_rows_apart(twice: int) -> None:
    rng = np.random.default_rng(0)
    known = rng.normal(size=(60, 5))
    known[:twice] = known[twice : 2 * twice]
    similar = np.exp(-cdist(known, known))
    whole = Affine.whitening_kernel(similar, 60 - twice, 1.0)
    found = similar @ whole.matrix - whole.shift
    assert np.abs(found).max() < 10
    rows = found / np.linalg.norm(found, axis=1, keepdims=True)
    apart = ~np.eye(60, dtype=np.bool_)
    assert np.abs((rows @ rows.T)[apart]).mean() < 0.5


def test_frozen_a_is_the_same_on_every_machine_and_survives_export(
    tiny_bert: Path, tmp_path: Path
) -> None:
    lora = replace(LORA, variant="ffa")
    model = classifier(tiny_bert, "mean", lora=lora)
    torch.manual_seed(99)
    other = classifier(tiny_bert, "mean", lora=lora)
    frozen = {n: p for n, p in model.network.named_parameters() if ".lora_A." in n}
    assert frozen and not any(p.requires_grad for p in frozen.values())
    assert all(torch.equal(p, dict(other.network.named_parameters())[n]) for n, p in frozen.items())
    assert not any("lora_A" in tensor.name for tensor in model.spec.tensors)
    export_adapter(
        model, scrambled(model), ModelConfig(base=str(tiny_bert), pooling="mean"), lora, 3, tmp_path
    )
    batch = model.task.encode(records(TEXTS), model.tokenizer, 64).batch(
        np.arange(4), 0, model.device
    )
    assert torch.allclose(load_adapter(tmp_path).logits(TEXTS), model.logits(batch), atol=1e-5)


def test_padding_and_neighbours_do_not_change_an_example(tiny_bert: Path) -> None:
    model = classifier(tiny_bert, "layers", 6)
    model.load(scrambled(model))
    data = model.task.encode(records(TEXTS), model.tokenizer, 64)
    together = model.logits(data.batch(np.arange(4), 0, model.device))
    alone = torch.cat(
        [model.logits(data.batch(np.array([row]), 0, model.device)) for row in range(4)]
    )
    assert torch.allclose(together, alone, atol=1e-5)


@given(st.integers(0, 30), st.integers(1, 30), st.integers(6, 24))
def test_prompts_lose_their_left_and_responses_their_right(
    prompt: int, response: int, length: int
) -> None:
    class Words:  # a tokenizer whose tokens are the numbers in the text
        bos_token_id, eos_token_id = 1, 2

        def __call__(self, texts: list[str], **_: object) -> dict[str, list[list[int]]]:
            return {"input_ids": [[int(word) for word in text.split()] for text in texts]}

    question = list(range(100, 100 + prompt))
    answer = list(range(200, 200 + response))
    data = CausalLanguageModel().encode(
        records([" ".join(map(str, question))], [" ".join(map(str, answer))]), Words(), length
    )
    tokens, start = data.tokens.tolist(), data.targets.tolist().index(LEARNT)
    kept_question, kept_answer = tokens[1:start], tokens[start:]
    assert len(tokens) <= length and tokens[0] == 1
    assert kept_question == question[len(question) - len(kept_question) :]
    assert kept_answer == ([*answer, 2])[: len(kept_answer)] and kept_answer
    assert data.truncated == {
        "prompt": int(len(kept_question) < prompt),
        "response": int(len(kept_answer) < response + 1),
    }
    if prompt + response + 2 <= length:
        assert data.truncated == {"prompt": 0, "response": 0}


def test_a_language_model_is_scored_on_its_response_alone(tiny_llama: Path) -> None:
    settings = ModelConfig(base=str(tiny_llama), pooling="default", task="causal-lm")
    task: Task = CausalLanguageModel()
    model = build_model(settings, LoraConfig(rank=2, targets=("q_proj",)), task, seed=3)
    data = task.encode(records(["w1 w2 w3"], ["w4 w5"]), model.tokenizer, 64)
    batch = data.batch(np.array([0]), 0, model.device)
    logits = model.logits(batch)
    logp = torch.log_softmax(logits[0].detach().float(), dim=1)
    # two words and the end
    scored = [float(logp[place - 1, batch.ids[0, place]]) for place in range(4, 7)]
    assert task.losses(logits, batch).item() == pytest.approx(-sum(scored) / 3, abs=1e-5)


def test_data_nothing_after_tokenisation(tiny_bert: Path) -> None:
    tokenizer = load_tokenizer(tiny_bert)
    with pytest.raises(BadInput, match="row 2: found nothing after tokenisation"):
        SequenceClassification(LABELS).encode(records(["w1", " "]), tokenizer, 64)


def test_the_packaged_model_resolves_without_an_import() -> None:
    folder = resolve_base("minilm")
    check_base(folder)
    assert base_digest(folder).startswith("sha256:")


def broken(folder: Path, target: Path, name: str) -> None:
    """A copy of a model or adapter folder with one fault."""
    shutil.copytree(folder, target)
    weights = next(target.glob("*model.safetensors"))
    config = next(
        path for path in (target / "config.json", target / "adapter_config.json") if path.exists()
    )
    if name == "adapter-config-code":
        table = json.loads(config.read_text())
        config.write_text(json.dumps({**table, "auto_map": {"AutoModel": "evil.Model"}}))
    elif name == "adapter-bin-pickle":
        weights.rename(weights.with_suffix(".bin"))
    elif name == "st-truncated":
        weights.write_bytes(weights.read_bytes()[:5])
    elif name == "st-header-2^62":
        weights.write_bytes((1 << 62).to_bytes(8, "little") + weights.read_bytes()[8:])
    else:
        raise ValueError(name)


@pytest.mark.parametrize(
    "name", ["adapter-config-code", "adapter-bin-pickle", "st-truncated", "st-header-2^62"]
)
def test_unsafe_folders_are_refused(tiny_bert: Path, tmp_path: Path, name: str) -> None:
    broken(tiny_bert, tmp_path / "base", name)
    with pytest.raises(BadInput):
        classifier(tmp_path / "base", "mean")
    model = classifier(tiny_bert, "mean")
    export_adapter(
        model,
        scrambled(model),
        ModelConfig(base=str(tiny_bert), pooling="mean"),
        LORA,
        3,
        tmp_path / "good",
    )
    broken(tmp_path / "good", tmp_path / "adapter", name)
    with pytest.raises(BadInput):
        load_adapter(tmp_path / "adapter")


def test_base_digest_mismatch(tiny_bert: Path, tmp_path: Path) -> None:
    settings = ModelConfig(base=str(tiny_bert), digest="sha256:" + "0" * 64, pooling="mean")
    with pytest.raises(BadInput, match=r"\[model\] digest"):
        build_model(
            settings, LoraConfig(targets=("query", "value")), SequenceClassification(LABELS), seed=3
        )
    before = base_digest(tiny_bert)
    shutil.copytree(tiny_bert, tmp_path / "copy")
    assert base_digest(tmp_path / "copy") == before
    tokenizer = tmp_path / "copy" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + " ")
    assert base_digest(tmp_path / "copy") != before


def test_lora_targets_that_do_not_exist_are_named(tiny_bert: Path) -> None:
    with pytest.raises(BadInput, match=r"\[lora\] targets"):
        classifier(tiny_bert, "mean", lora=LoraConfig(targets=("q_proj",)))


def test_more_tokens_than_the_base_has_positions_are_refused(tiny_bert: Path) -> None:
    with pytest.raises(BadInput, match="max_length = 513: expected at most the base model's"):
        build_model(
            ModelConfig(base=str(tiny_bert), pooling="mean", max_length=513),
            LoraConfig(rank=1),
            SequenceClassification(("a", "b")),
            5,
        )
