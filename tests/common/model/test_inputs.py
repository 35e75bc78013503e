"""Images and sounds from a file to an exported adapter; what can't serve, in one line."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers

from fedlora.client.training.memory import Activations
from fedlora.client.training.step import ClipGroups, PerSampleGradients
from fedlora.client.training.timing import nobodys_texts
from fedlora.common.adapter.onnx_graph import write_onnx
from fedlora.common.adapter.peft import export_adapter, load_adapter
from fedlora.common.config.schema import LoraConfig, ModelConfig
from fedlora.common.data.images import Images
from fedlora.common.data.records import MEDIA, Records, unit_groups
from fedlora.common.errors import BadInput
from fedlora.common.model.base import check_base
from fedlora.common.model.features import pooled_features
from fedlora.common.model.network import AdapterModel, build_model
from fedlora.common.model.state import AdapterState
from fedlora.common.tasks import media_classification
from fedlora.common.tasks.classification import SequenceClassification
from fedlora.common.tasks.media_classification import AudioClassification, ImageClassification
from fedlora.common.tasks.task import Task
from fedlora.simulations.serving.questions import predictions
from tests.media import png, wav
from tests.oracles import clipped_sum_by_ones

IMAGES, SOUNDS = ImageClassification(("blue", "red")), AudioClassification(("low", "high"))
RNG = np.random.default_rng(2)
PNGS = [png(RNG, n % 2) for n in range(9)]
WAVS = [wav(RNG, 300 + 1500 * (n % 2)) for n in range(9)]
LORA = LoraConfig(rank=2)


def built(base: Path, task: Task, pooling: str = "mean", seed: int = 3) -> AdapterModel:
    model = build_model(ModelConfig(str(base), task=task.name, pooling=pooling), LORA, task, 5)
    values = np.random.default_rng(seed).normal(0, 0.2, model.spec.size).astype(np.float32)
    model.load(AdapterState(model.spec, values))
    return model


def records(task: Task, inputs: list[bytes]) -> Records:
    labels = np.arange(len(inputs)) % 2
    return replace(task.asked(inputs), labels=labels, unanswered=False)


def test_attention_is_adapted_and_a_record_costs_its_places(tiny_vit: Path, tiny_ast: Path) -> None:
    for base, task, places in ((tiny_vit, IMAGES, 17), (tiny_ast, SOUNDS, 12)):
        model = built(base, task)
        assert all(any(end in t for end in ("q_proj", "v_proj")) for t in model.lora.targets)
        assert model.longest == places  # patches, and tokens of the base's own
        data = model.task.encode(
            records(task, PNGS if task is IMAGES else WAVS), model.tokenizer, 17
        )
        assert data.lengths.tolist() == [17] * 9
        assert nobodys_texts(model).lengths.max() == places
        kept = Activations.of(model)
        assert kept.bytes(2, places) == pytest.approx(2 * kept.bytes(1, places), abs=2)


def test_a_clipped_sum_is_that_of_batches_of_one(tiny_vit: Path) -> None:
    """And a unit of several images moves it by one clip at most, whoever else is there."""
    model, reference = built(tiny_vit, IMAGES), built(tiny_vit, IMAGES)
    data = model.task.encode(records(IMAGES, PNGS), model.tokenizer, model.longest)
    gradients, clip = PerSampleGradients(model), 0.05
    groups, units = ClipGroups.flat(model.spec, clip), unit_groups(list("aabbcdefg"))
    assert not gradients.one_by_one

    def summed(*drawn: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        return gradients.clipped_sum(data, units, np.array(drawn), groups, 64).vector

    whole = summed(*range(7))
    expected = clipped_sum_by_ones(reference, data, units, np.arange(7), groups)
    assert np.linalg.norm(whole - expected) <= 1e-4 * np.linalg.norm(expected)
    for unit in (0, 4):
        moved = whole - summed(*(each for each in range(7) if each != unit))
        assert 0 < np.linalg.norm(moved) <= clip * (1 + 1e-6)
        assert np.linalg.norm(moved - summed(unit)) <= 1e-12 * np.linalg.norm(whole)


def test_sounds_of_any_length_are_cut_or_filled_up(tiny_wav2vec2: Path) -> None:
    model, reference = built(tiny_wav2vec2, SOUNDS), built(tiny_wav2vec2, SOUNDS)
    data = model.task.encode(records(SOUNDS, WAVS), model.tokenizer, model.longest)
    assert model.longest == 63 and data.batch(np.arange(2), 0, model.device).ids.shape == (2, 1280)
    gradients, units = PerSampleGradients(model), unit_groups(None, 9)
    groups, every = ClipGroups.flat(model.spec, 0.05), np.arange(9)
    whole = gradients.clipped_sum(data, units, every, groups, 256).vector
    expected = clipped_sum_by_ones(reference, data, units, every, groups)
    assert np.linalg.norm(whole - expected) <= 1e-4 * np.linalg.norm(expected)


def test_cached_features_are_what_the_head_sees(tiny_vit: Path) -> None:
    for pooling in ("mean", "default"):
        model = built(tiny_vit, IMAGES, pooling)
        data = model.task.encode(records(IMAGES, PNGS), model.tokenizer, model.longest)
        rows = np.arange(9)
        with torch.no_grad():
            expected = model.logits(data.batch(rows, model.pad, model.device))
            found = model.head(pooled_features(model, data, rows))
        assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("named", ["tiny_vit", "tiny_ast", "tiny_wav2vec2"])
def test_an_export_is_read_by_peft_and_transformers_alone(
    named: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    base: Path = request.getfixturevalue(named)
    task, inputs = (IMAGES, PNGS) if named == "tiny_vit" else (SOUNDS, WAVS)
    model, settings = built(base, task, "default"), ModelConfig(str(base), pooling="default")
    state = model.state()
    export_adapter(model, state, replace(settings, task=task.name), model.lora, 5, tmp_path / "a")
    loaded = load_adapter(tmp_path / "a")
    found = loaded.logits(inputs)
    auto: Any = (
        transformers.AutoModelForImageClassification
        if task is IMAGES
        else transformers.AutoModelForAudioClassification
    )
    theirs = peft.PeftModel.from_pretrained(
        auto.from_pretrained(base, num_labels=2), tmp_path / "a"
    ).eval()
    values = task.encode(task.asked(inputs), loaded.model.tokenizer, 1)
    batch = values.batch(np.arange(9), 0, torch.device("cpu"))
    with torch.no_grad():
        expected = theirs(**{loaded.model.inputs.name: batch.ids}).logits  # type: ignore[attr-defined]
    assert torch.allclose(found, expected, atol=1e-4) and found.std() > 1e-3
    assert set(loaded.predict(inputs)) <= set(task.labels)
    with pytest.raises(BadInput, match="expected one of texts"):
        write_onnx(loaded, tmp_path / "a", tmp_path / "onnx")
    with pytest.raises(BadInput, match="expected one whose inputs are text"):
        predictions(loaded, "m", json.dumps({"inputs": ["/etc/passwd"]}).encode())


def test_a_head_with_a_norm_learns_from_its_first_step(tiny_ast: Path) -> None:
    """A factor of zero there would pass nothing on, in either direction."""
    settings = ModelConfig(str(tiny_ast), task=SOUNDS.name, pooling="default")
    model = build_model(settings, LORA, SOUNDS, 5)
    data = model.task.encode(records(SOUNDS, WAVS), model.tokenizer, model.longest)
    loss = model.losses(data.batch(np.arange(9), 0, model.device)).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = {n: p.grad for n, p in model.parameters.items() if "dense.weight" in n}
    assert all(each is not None and bool(each.any()) for each in gradients.values())
    assert len(gradients) == 1


def test_what_no_base_can_serve_is_one_line(
    tiny_vit: Path, tiny_ast: Path, tiny_bert: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "vit"
    shutil.copytree(tiny_vit, folder)
    processor = json.loads((folder / "preprocessor_config.json").read_text())

    def changed(**values: Any) -> Path:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor | values))
        return folder

    several = {"size": {"shortest_edge": 32}, "do_center_crop": False}
    for base, task, said in (
        (tiny_bert, IMAGES, "found no processor of images that transformers reads"),
        (tiny_bert, SOUNDS, "found no processor of sounds that transformers reads"),
        (tiny_vit, SequenceClassification(("a", "b")), "found no tokenizer"),
        (tiny_ast, IMAGES, "found a processor that reads no image|found no processor of images"),
        (tiny_vit, SOUNDS, "found a processor that reads no audio|found no processor of sounds"),
        ({"size": {"height": 16, "width": 16}}, IMAGES, "found a vit that can't read"),
        ({**several, "image_processor_type": "CLIPImageProcessor"}, IMAGES, "expected one shape"),
        ({"auto_map": {"AutoImageProcessor": "x.Y"}}, IMAGES, "it is never run"),
    ):
        where = changed(**base) if isinstance(base, dict) else base
        settings = ModelConfig(str(where), task=task.name, pooling="mean")
        with pytest.raises(BadInput, match=said) as caught:
            build_model(settings, LORA, task, 5)
        assert len(caught.value.faults) == 1 and "\n" not in caught.value.faults[0]


def test_no_part_of_a_processors_files_may_name_code(tiny_vit: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_vit, tmp_path / "vit")
    named = {"auto_map": {"AutoImageProcessor": "x.Y"}}
    for name in ("preprocessor_config.json", "processor_config.json"):
        before = (folder / name).read_text() if (folder / name).is_file() else ""
        for table, where in ((named, ""), ({"image_processor": named}, " image_processor")):
            (folder / name).write_text(json.dumps(table))
            with pytest.raises(
                BadInput, match=f"{name}{where} auto_map: found a reference to code"
            ):
                check_base(folder)
        (folder / name).write_text(before or "{}")
        check_base(folder)


def test_values_beyond_a_machines_memory_are_refused_before_they_are_made(
    tiny_vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a run, and by whoever loads what came of it."""
    model, good = built(tiny_vit, IMAGES), records(IMAGES, PNGS)
    needed = 4 * len(model.encoded(good)) * 3 * 32 * 32
    settings = ModelConfig(str(tiny_vit), task=IMAGES.name, pooling="mean")
    export_adapter(model, model.state(), settings, model.lora, 5, tmp_path / "a")
    loaded = load_adapter(tmp_path / "a")
    monkeypatch.setattr(media_classification, "free_memory", lambda: needed - 1)
    monkeypatch.setattr(Images, "measure", None)  # of records that were kept
    for read in (lambda: model.encoded(good), lambda: loaded.predict(PNGS)):
        with pytest.raises(BadInput, match=r"found 9 records that take .* once read, expected"):
            read()


def test_a_record_that_is_none_is_named(tiny_vit: Path) -> None:
    model = built(tiny_vit, IMAGES)
    good = records(IMAGES, PNGS)
    files = [*good.parts[MEDIA][:3], replace(good.parts[MEDIA][3], name="x.png", data=b"?")]
    bad = replace(good.take(np.arange(4), "t.csv"), parts={MEDIA: files})
    with pytest.raises(BadInput, match=r"^t.csv row 4 image x.png: found no image"):
        model.task.encode(bad, model.tokenizer, model.longest)
    with pytest.raises(BadInput, match="image 1: found int, expected bytes or the path"):
        model.task.asked([7])
