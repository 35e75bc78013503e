"""Frozen matrices in half the bytes: the same arithmetic on them, and nothing else is narrow."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fedlora.client.training.step import ClipGroups, PerSampleGradients
from fedlora.common.config.schema import LoraConfig, ModelConfig
from fedlora.common.data.records import unit_groups
from fedlora.common.errors import BadInput
from fedlora.common.model.compute import COMPUTE, compute_of_run, stored_for_run
from fedlora.common.model.loading import load_language_model
from fedlora.common.model.network import AdapterModel, build_model
from fedlora.common.model.stored import Place
from fedlora.common.tasks.batch import Encoded
from fedlora.common.tasks.causal_lm import CausalLanguageModel
from fedlora.common.tasks.classification import SequenceClassification
from fedlora.simulations.benchmarks.families import FAMILIES
from fedlora.simulations.benchmarks.models import LANGUAGE, OWN, Use, awake, examine, records
from tests.oracles import clipped_sum_by_ones

CPU = torch.device("cpu")
LENGTH = 24
USES = {
    "BERT": Use("sequence-classification", "mean", ("query", "value")),
    "Llama": replace(LANGUAGE, targets=("all-linear",)),
    "GPT-2": replace(LANGUAGE, targets=("c_attn",)),
}


def published(name: str, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A base of that family whose files have weights of `dtype`."""
    base = next(each for each in FAMILIES if each.name == name).save(folder / name)
    weights = load_file(base / "model.safetensors")
    narrow = {key: value.to(dtype) for key, value in weights.items()}
    save_file(narrow, base / "model.safetensors", {"format": "pt"})
    return base


def built(base: Path, use: Use, dtype: str) -> AdapterModel:
    settings = ModelConfig(
        base=str(base), task=use.task, pooling=use.pooling, max_length=LENGTH, dtype=dtype
    )
    labels = SequenceClassification(("a", "b", "c"))
    task = CausalLanguageModel() if use.task == "causal-lm" else labels
    model = build_model(settings, LoraConfig(rank=2, targets=use.targets), task, 5)
    model.load(awake(model))
    return model


def encoded(model: AdapterModel) -> Encoded:
    return model.task.encode(records(8), model.tokenizer, LENGTH)


def clipped(model: AdapterModel, data: Encoded) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    groups, units = ClipGroups.flat(model.spec, 0.05), unit_groups(None, len(data))
    drawn = np.arange(len(data), dtype=np.int64)
    return PerSampleGradients(model).clipped_sum(data, units, drawn, groups, 4096).vector


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", USES)
def test_a_base_published_in_bfloat16_gives_the_same_bits_stored_in_either(
    tmp_path: Path, name: str, precision: torch.dtype
) -> None:
    base = published(name, tmp_path)
    wide, narrow = (built(base, USES[name], dtype) for dtype in ("float32", "bfloat16"))
    data = encoded(wide)
    batch = data.batch(np.arange(len(data)), wide.pad, CPU)
    for each in (wide, narrow):
        each.precision = precision
    with torch.no_grad():
        assert torch.equal(wide.logits(batch), narrow.logits(batch))
        assert torch.equal(narrow.logits(batch), narrow.logits(batch))
    assert np.array_equal(clipped(wide, data), clipped(narrow, data))


@pytest.mark.parametrize("name", USES)
def test_matrices_are_narrow_and_all_else_is_not(tmp_path: Path, name: str) -> None:
    """Of a base that was published in float32 too."""
    model = built(published(name, tmp_path, torch.float32), USES[name], "bfloat16")
    for parameter_name, parameter in model.network.named_parameters():
        ours = "lora_" in parameter_name or parameter_name.startswith("head.")
        matrix = parameter.ndim == 2 and not ours
        expected = torch.bfloat16 if matrix else torch.float32
        assert parameter.dtype == expected, parameter_name


def test_matrices_are_never_float32_while_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As transformers hands the base over, before any of this project's own code sees it."""
    from fedlora.common.model import loading

    seen: list[torch.dtype] = []
    monkeypatch.setattr(
        loading,
        "keep_stored",
        lambda base: seen.append(base.model.layers[0].mlp.up_proj.weight.dtype),
    )
    load_language_model(published("Llama", tmp_path), Place(CPU, torch.bfloat16))
    assert seen == [torch.bfloat16]


def test_a_head_of_the_base_itself_is_trained_in_float32(tmp_path: Path) -> None:
    base = published("Llama", tmp_path)
    weights = load_file(base / "model.safetensors")
    weights["score.weight"] = torch.zeros(3, 32, dtype=torch.bfloat16)  # read from the files too
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    model = built(base, replace(OWN, targets=("q_proj",)), "bfloat16")
    assert {parameter.dtype for parameter in model.parameters.values()} == {torch.float32}
    assert not PerSampleGradients(model).one_by_one


@pytest.mark.parametrize("name", USES)
def test_the_sum_is_a_batch_of_one_loops_and_the_export_loads_in_peft(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedlora.simulations.benchmarks import models

    monkeypatch.setattr(
        models, "ModelConfig", lambda **given: ModelConfig(**given, dtype="bfloat16")
    )
    found = examine(published(name, tmp_path), USES[name], tmp_path / "out", clipped_sum_by_ones)
    assert found.faults == []
    assert not found.one_by_one


def test_what_a_run_began_with_it_keeps(tiny_bert: Path, tmp_path: Path) -> None:
    """Another machine, or a later default, is another type: a resumed run has the first."""
    settings = ModelConfig(base=str(tiny_bert), pooling="mean", max_length=LENGTH)
    use = Use("sequence-classification", "mean", ("query",))
    model = built(tiny_bert, use, "bfloat16")
    compute_of_run(model, encoded(model), "eager", "fp32", tmp_path)
    assert json.loads((tmp_path / COMPUTE).read_bytes())["cpu"]["dtype"] == "bfloat16"
    assert stored_for_run(settings, None, tmp_path).dtype == "bfloat16"
    assert stored_for_run(replace(settings, dtype="float32"), None, tmp_path).dtype == "float32"


def test_a_run_that_began_before_there_was_a_choice_stays_float32(tmp_path: Path) -> None:
    (tmp_path / COMPUTE).write_text(json.dumps({"cuda": {"attention": "eager"}}))
    assert stored_for_run(ModelConfig(), torch.device("cuda"), tmp_path).dtype == "float32"


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((7, 5), "float32"), ((8, 0), "bfloat16"), ((9, 0), "bfloat16"), (None, "float32")],
)
def test_auto_is_bfloat16_where_a_gpu_multiplies_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int] | None,
    expected: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    device = torch.device("cpu" if capability is None else "cuda")
    assert stored_for_run(ModelConfig(), device, tmp_path).dtype == expected


def test_what_was_kept_and_is_no_type_is_refused(tmp_path: Path) -> None:
    (tmp_path / COMPUTE).write_text(json.dumps({"cpu": {"dtype": "int4"}}))
    with pytest.raises(BadInput, match="dtype = 'int4': expected auto or one of float32, bfloat16"):
        stored_for_run(ModelConfig(), None, tmp_path)


def test_where_code_reads_a_matrix_past_its_module_all_are_float32(tmp_path: Path) -> None:
    """Mamba's: the run says so, and goes on."""
    model = built(published("Mamba", tmp_path), replace(LANGUAGE, targets=("in_proj",)), "bfloat16")
    assert model.stored == "float32"
    assert {each.dtype for each in model.network.parameters()} == {torch.float32}


def test_a_tied_embedding_is_narrow_once(tmp_path: Path) -> None:
    base = published("Llama", tmp_path)
    config = json.loads((base / "config.json").read_bytes())
    shutil.copytree(base, tied := tmp_path / "tied")
    (tied / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    weights = load_file(tied / "model.safetensors")
    weights.pop("lm_head.weight", None)
    save_file(weights, tied / "model.safetensors", {"format": "pt"})
    wide, narrow = (built(tied, USES["Llama"], dtype) for dtype in ("float32", "bfloat16"))
    batch = encoded(wide).batch(np.arange(8), wide.pad, CPU)
    with torch.no_grad():
        assert torch.equal(wide.logits(batch), narrow.logits(batch))
    causal = narrow.network.backbone.get_base_model()  # type: ignore[operator]
    assert causal.lm_head.weight is causal.model.embed_tokens.weight
    assert causal.lm_head.weight.dtype == torch.bfloat16
