"""The ONNX graph answers as the adapter does, for other shapes than it was made with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import transformers

from fedlora.common.adapter.onnx_graph import write_onnx
from fedlora.common.errors import BadInput
from fedlora.common.model.inputs import TextInputs
from fedlora.common.tasks.causal_lm import CausalLanguageModel
from fedlora.common.tasks.classification import SequenceClassification
from fedlora.common.tasks.task import Task
from fedlora.common.tasks.token_classification import TokenClassification
from tests.common.adapter.test_merged import exported

CASES: dict[str, tuple[str, Task]] = {
    "a classifier of the base's own": ("default", SequenceClassification(("a", "b"))),
    "a head of ours": ("mean", SequenceClassification(("a", "b", "c"))),
    "texts of a pair": ("mean", SequenceClassification(("a", "b"))),
    "tags of words": ("words", TokenClassification(("O", "B-x", "I-x"))),
}


@pytest.mark.parametrize("case", CASES)
def test_the_graph_answers_as_the_adapter_does(case: str, tiny_bert: Path, tmp_path: Path) -> None:
    pooling, task = CASES[case]
    adapter = exported(tiny_bert, pooling, task, tmp_path / "adapter")
    typed = case == "texts of a pair"
    adapter.model.network.inputs = TextInputs(adapter.model.tokenizer, 30, typed)
    write_onnx(adapter, tmp_path / "adapter", tmp_path / "onnx")
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx")
    for rows, length in ((1, 1), (3, 11)):
        ids = torch.randint(5, 30, (rows, length), generator=torch.Generator().manual_seed(length))
        mask = torch.ones_like(ids)
        mask[-1, length - length // 2 :] = 0
        types = torch.zeros_like(ids)
        types[:, length // 2 :] = 1
        given: dict[str, Any] = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
        assert [each.name for each in session.get_inputs()][2:] == ["token_type_ids"] * typed
        if typed:
            given["token_type_ids"] = types.numpy()
        (found,) = session.run(None, given)
        with torch.no_grad():
            expected = adapter.model.network(ids, mask * (1 + types) if typed else mask).numpy()
        assert found.shape == expected.shape
        seen = mask.numpy().astype(bool) if found.ndim == 3 else slice(None)
        np.testing.assert_allclose(found[seen], expected[seen], atol=1e-5)
    assert (tmp_path / "onnx" / "fedlora.json").is_file()
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "onnx").vocab_size > 10


def test_the_graph_of_a_pair_has_a_place_for_each_text(tiny_bert: Path, tmp_path: Path) -> None:
    task = SequenceClassification(("a", "b"))
    adapter = exported(tiny_bert, "pairs", task, tmp_path / "adapter")
    write_onnx(adapter, tmp_path / "adapter", tmp_path / "onnx")
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx")
    given = adapter.model.tokenizer(
        ["it was good", "bad", "the bank", "it"], padding=True, return_tensors="np"
    )
    names = ("input_ids", "attention_mask")
    inputs = {
        f"{text}{name}": given[name][n::2]
        for n, text in enumerate(("", "second_"))
        for name in names
    }
    (found,) = session.run(None, inputs)
    expected = adapter.logits([("it was good", "bad"), ("the bank", "it")])
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


def test_what_has_no_head_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    adapter = exported(tiny_llama, "default", CausalLanguageModel(), tmp_path / "adapter")
    with pytest.raises(BadInput, match="found the task causal-lm, expected one of texts"):
        write_onnx(adapter, tmp_path / "adapter", tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


def test_a_folder_with_files_is_left_as_it_is(tiny_bert: Path, tmp_path: Path) -> None:
    adapter = exported(tiny_bert, *CASES["a head of ours"], tmp_path / "adapter")
    with pytest.raises(BadInput, match="found files, expected a new folder"):
        write_onnx(adapter, tmp_path / "adapter", tmp_path / "adapter")
