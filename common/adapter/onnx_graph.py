"""A released adapter as one ONNX graph: tokens to a head's numbers, for whoever runs no torch.

Pooling, projection and head are in the graph, so that it is whole where the head is ours, too.
"""

from __future__ import annotations

import copy
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedlora.common.adapter.peft import LoadedAdapter
from fedlora.common.adapter.released import DESCRIPTION, refuse_used
from fedlora.common.errors import BadInput
from fedlora.common.libraries import library
from fedlora.common.model.pooling import PooledClassifier
from fedlora.common.tasks.task import RECORD, WORD

EXTRA = "onnx"
GRAPH = "model.onnx"


def write_onnx(adapter: LoadedAdapter, released: Path, folder: Path) -> None:
    """Write the graph, its tokenizer and `fedlora.json` into `folder`, which must be new.

    `input_ids` and `attention_mask` are (n, length) int64, and so is `token_type_ids` where the
    base tells the texts of a pair apart; where a pair's texts are read each by itself, so are
    `second_input_ids` and `second_attention_mask`, and `length` at most half of the longest.
    `logits` are (n, outputs) float32, or (n, length, outputs) where the task answers each word.
    Labels and the longest length are in `fedlora.json`. BadInput for a task whose base writes text,
    or a folder that is not empty.
    """
    model = adapter.model
    if model.task.reads not in (RECORD, WORD) or model.task.medium is not None:
        raise BadInput(
            f"--onnx: found the task {model.task.name}, expected one of texts that is answered by a"
            " head"
        )
    refuse_used(folder)
    for name in ("onnx", "onnxscript"):
        library(name, EXTRA)
    network: nn.Module = copy.deepcopy(model.network).to("cpu", torch.float32).eval()
    program = _program(network, model.pad, adapter.description.max_length)
    folder.mkdir(parents=True, exist_ok=True)
    program.save(folder / GRAPH)
    model.tokenizer.save_pretrained(folder)
    shutil.copyfile(released / DESCRIPTION, folder / DESCRIPTION)


def _program(network: Any, pad: int, longest: int) -> Any:
    pairs = isinstance(network, PooledClassifier) and network.pairs
    longest //= 1 + pairs
    ids = torch.full((2, min(8, longest)), pad)
    mask = torch.ones_like(ids)
    mask[1, -1] = 0  # as a shorter text has it, so that no path is taken for full rows alone
    inputs, wrapped = {"input_ids": ids, "attention_mask": mask}, _Plain
    if pairs:
        # of their own: the exporter takes one tensor in two places for one input
        inputs |= {"second_input_ids": ids.clone(), "second_attention_mask": mask.clone()}
        wrapped = _Apart
    elif network.inputs.typed:
        inputs["token_type_ids"] = torch.zeros_like(ids)
        wrapped = _Typed
    rows, length = torch.export.Dim("rows"), torch.export.Dim("length", max=longest)
    with warnings.catch_warnings():  # the exporter's own, of names it chose and of its old calls
        warnings.simplefilter("ignore")
        return torch.onnx.export(
            wrapped(network),
            tuple(inputs.values()),
            dynamo=True,
            verbose=False,
            input_names=list(inputs),
            output_names=["logits"],
            dynamic_shapes={name: {0: rows, 1: length} for name in inputs},
        )


class _Plain(nn.Module):
    """Whose arguments have the names that transformers' tokenizers give."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        """What `network` gives."""
        return self.network(input_ids, attention_mask)


class _Typed(_Plain):
    """Likewise, of a base that tells the texts of a pair apart: our mask is 2 in the second one."""

    def forward(  # type: ignore[override]
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor
    ) -> Any:
        """What `network` gives."""
        return self.network(input_ids, attention_mask * (1 + token_type_ids))


class _Apart(_Plain):
    """Likewise, of a base that reads each text of a pair by itself, in a half of a row."""

    def forward(  # type: ignore[override]
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        second_input_ids: torch.Tensor,
        second_attention_mask: torch.Tensor,
    ) -> Any:
        """What `network` gives."""
        ids = torch.cat([input_ids, second_input_ids], dim=1)
        return self.network(ids, torch.cat([attention_mask, second_attention_mask], dim=1))
