"""Frozen matrices in 8 or 4 bits: near what they were; each record's gradient is a lone one's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fedlora.client.training.memory import memory_of_step
from fedlora.client.training.step import PerSampleGradients
from fedlora.common.config.schema import ModelConfig
from fedlora.common.errors import BadInput
from fedlora.common.model.quantised import QuantisedLinear, packed, widened
from fedlora.simulations.benchmarks.models import LANGUAGE, examine
from tests.common.model.test_stored import CPU, USES, built, clipped, encoded, published
from tests.oracles import clipped_sum_by_ones

KINDS = ["int8", "nf4"]
# of a normal matrix, relative: NF4 is made for it; int8 has a row's largest over 127
ERRORS = {"int8": 0.01, "nf4": 0.1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_matrix_is_near_what_it_was(kind: str, dtype: torch.dtype) -> None:
    matrix = torch.randn(96, 80, generator=torch.Generator().manual_seed(0))
    codes, scale = packed(matrix, kind)
    found = widened(codes, scale, (96, 80), dtype)
    assert found.shape == matrix.shape and found.dtype == dtype
    off = (found.float() - matrix).norm() / matrix.norm()
    assert ERRORS[kind] / 10 < off < ERRORS[kind]
    assert codes.nbytes == {"int8": 1, "nf4": 0.5}[kind] * matrix.numel()
    again, _ = packed(found.float(), kind)
    assert kind == "nf4" or (again - codes).abs().max() <= 1


def test_nf4_is_that_of_bitsandbytes() -> None:
    """By `quantize_4bit` of bitsandbytes 0.50.2, and the error of what it makes of them."""
    n = torch.arange(128, dtype=torch.float64)
    matrix = (torch.sin(n * n) * torch.exp(-n / 40)).float().reshape(2, 64)
    codes, scale = packed(matrix, "nf4")
    assert codes.numpy().tobytes().hex() == (
        "7f1c4600f22f32e1174a2d9d284822d56c66c439363cab354a56a99899976a45"
        "1cfb301ebe5ee2ee3edb73c272c6a6cb2764664893bba5468ba454945a55a557"
    )
    assert scale.tolist() == [0.8536319732666016, 0.1888853907585144]
    found = widened(codes, scale, (2, 64), torch.float32)
    assert float((found - matrix).norm()) == pytest.approx(0.3167712986469269, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_or_block_of_zeros_stays_one(kind: str) -> None:
    matrix = torch.zeros(2, 64)
    matrix[1] = 1.0
    found = widened(*packed(matrix, kind), (2, 64), torch.float32)
    assert torch.equal(found, matrix)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", USES)
def test_the_sum_is_a_batch_of_one_loops(
    tmp_path: Path, name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the quantised base; and the adapter loads in PEFT."""
    from fedlora.simulations.benchmarks import models

    monkeypatch.setattr(models, "ModelConfig", lambda **given: ModelConfig(**given, dtype=kind))
    found = examine(published(name, tmp_path), USES[name], tmp_path / "out", clipped_sum_by_ones)
    assert [each for each in found.faults if "PEFT" not in each] == []
    assert not found.one_by_one


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", USES)
def test_linear_layers_are_quantised_and_nothing_else_is(
    tmp_path: Path, name: str, kind: str
) -> None:
    model = built(published(name, tmp_path), USES[name], kind)
    assert model.stored == kind
    found = {type(each) for each in model.network.modules() if isinstance(each, nn.Linear)}
    assert QuantisedLinear in found
    for each, parameter in model.network.named_parameters():
        codes = parameter.dtype in (torch.int8, torch.uint8)
        assert not (codes and ("lora_" in each or each.startswith("head.") or "lm_head" in each))
        assert (
            codes
            or parameter.dtype == torch.float32
            or "embed" in each
            or "lm_head" in each
            or ("wte" in each or "wpe" in each)
        )
    narrow = built(published(name, tmp_path / "n"), USES[name], "bfloat16")
    assert (
        memory_of_step(model, 96, 24, True).weights < memory_of_step(narrow, 96, 24, True).weights
    )


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_base_computes_with_the_matrices_it_shows(
    tmp_path: Path, kind: str, precision: torch.dtype
) -> None:
    """As the same network does whose matrices are those, in full; also on the way back."""
    use = USES["Llama"]
    model = built(published("Llama", tmp_path), use, kind)
    wide = built(published("Llama", tmp_path / "w"), use, "float32")
    pairs = zip(model.network.named_modules(), wide.network.modules(), strict=True)
    with torch.no_grad():
        for (_, mine), other in pairs:
            if isinstance(mine, QuantisedLinear):
                matrix = widened(mine.weight, mine.scale, mine.shape, torch.float32)
                other.weight.copy_(matrix)  # type: ignore[operator]
    for each in (model, wide):
        each.precision = precision
    data = encoded(wide)
    batch = data.batch(np.arange(len(data)), wide.pad, CPU)
    close = 1e-6 if precision == torch.float32 else 2e-2
    with torch.no_grad():
        torch.testing.assert_close(model.logits(batch), wide.logits(batch), rtol=close, atol=close)
    found, expected = clipped(model, data), clipped(wide, data)
    assert np.linalg.norm(found - expected) <= 10 * close * np.linalg.norm(expected)


def test_what_is_kept_for_the_way_back_is_the_codes(tmp_path: Path) -> None:
    """And not a widened matrix for each layer."""
    model = built(published("Llama", tmp_path), USES["Llama"], "nf4")
    known = {each.untyped_storage().data_ptr() for each in model.network.parameters()}
    large: list[int] = []
    sizes = {
        m.shape[0] * m.shape[1] for m in model.network.modules() if isinstance(m, QuantisedLinear)
    }

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in known and tensor.numel() in sizes:
            large.append(tensor.numel())
        return tensor

    data = encoded(model)
    batch = data.batch(np.arange(1), model.pad, CPU)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda each: each):
        model.losses(batch).sum()
    assert large == []


def test_where_no_matrix_can_be_quantised_it_is_said(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r'dtype = "nf4": found no matrices .* float32 or bfloat16'):
        built(published("Mamba", tmp_path), replace(LANGUAGE, targets=("in_proj",)), "nf4")


def test_rows_of_a_batch_stay_apart(tmp_path: Path) -> None:
    """A record's scores have the same bits beside one whose activations are huge."""
    model = built(published("Llama", tmp_path), USES["Llama"], "int8")
    gradients = PerSampleGradients(model)
    layer = next(each for each in model.network.modules() if isinstance(each, QuantisedLinear))
    rows = torch.randn(4, layer.shape[1], generator=torch.Generator().manual_seed(1))
    beside = rows.clone()
    beside[1:] *= 1e6
    assert torch.equal(layer(rows)[0], layer(beside)[0]) and not gradients.one_by_one
