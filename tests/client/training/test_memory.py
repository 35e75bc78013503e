"""What a step will take is counted before it is made; what does not fit is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedlora.client.training import memory
from fedlora.client.training.memory import Activations, check_fits, memory_of_step
from fedlora.common.data import free_memory
from fedlora.common.errors import BadInput
from fedlora.common.model import machine
from fedlora.common.model.machine import available, check_room, weight_bytes
from fedlora.common.model.network import AdapterModel
from fedlora.common.model.stored import Place
from fedlora.simulations.benchmarks.models import LANGUAGE
from tests.common.model.test_stored import built, published

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return published("Llama", tmp_path_factory.mktemp("base"))


def model_on(base: Path, dtype: str = "float32") -> AdapterModel:
    return built(base, replace(LANGUAGE, targets=("all-linear",)), dtype)


@pytest.fixture(scope="module")
def model(base: Path) -> AdapterModel:
    return model_on(base)


def test_activations_are_what_autograd_keeps_of_a_longer_text(
    model: AdapterModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted at 4, 8 and 12 tokens, and at 24."""
    model.set_attention("eager")  # scores, which grow with the square
    monkeypatch.setattr(memory, "LENGTHS", (4, 8, 12))
    found = Activations.of(model)
    kept, _ = memory._kept(model, 24)
    assert found.square > 0
    assert abs(found.once + found.linear * 24 + found.square * 24**2 - kept) <= 0.05 * kept


def test_matrices_that_autocast_narrows_are_kept_once(base: Path) -> None:
    """However many records a batch has."""
    narrowed = model_on(base)
    narrowed.precision = torch.bfloat16
    frozen = [each for each in narrowed.network.parameters() if not each.requires_grad]
    found = Activations.of(narrowed)
    assert found.once > 0.3 * sum(2 * each.numel() for each in frozen)
    assert found.bytes(64, 24) < 64 * found.bytes(1, 24) - 60 * found.once


def test_more_records_take_more_and_fixed_batches_hold_sixteen(model: AdapterModel) -> None:
    small, large = (memory_of_step(model, tokens, 24, packed=True) for tokens in (48, 480))
    assert large.activations > 5 * small.activations
    few, more = (memory_of_step(model, tokens, 24, packed=False) for tokens in (96, 480))
    assert few.activations < more.activations < large.activations
    large, fixed = (memory_of_step(model, 4800, 24, packed=each) for each in (True, False))
    assert fixed.activations < large.activations / 3
    assert fixed.gradients < large.gradients


def test_layers_that_are_computed_again_are_not_kept(base: Path) -> None:
    plain, again = model_on(base), model_on(base)
    again.recompute()
    found, expected = (memory_of_step(each, 96, 24, True).activations for each in (again, plain))
    assert found < expected


def test_a_step_that_does_not_fit_is_refused_with_a_size_that_does(
    model: AdapterModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = memory_of_step(model, 480, 24, True).step
    monkeypatch.setattr(memory, "available", lambda device: needed // 2)
    with pytest.raises(
        BadInput, match=r"micro_batch_tokens = 480: a step needs about .* free; "
    ) as e:
        check_fits(model, 480, 24, True)
    fitting = int(str(e.value).rpartition("micro_batch_tokens = ")[2].split()[0])
    assert check_fits(model, fitting, 24, True).step <= needed // 2
    monkeypatch.setattr(memory, "available", lambda device: 1)
    with pytest.raises(BadInput, match="checkpointing = true or a shorter"):
        check_fits(model, 480, 24, True)
    monkeypatch.setattr(memory, "available", lambda device: None)  # nobody knows
    assert check_fits(model, 480, 24, True).step == needed


def test_a_base_that_does_not_fit_is_refused_before_it_is_read(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide, narrow = (weight_bytes(base, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert (
        sum(each.nbytes for each in model_on(base).network.parameters() if not each.requires_grad)
        == wide
    )
    assert narrow < 0.52 * wide
    monkeypatch.setattr(machine, "available", lambda device: narrow)
    with pytest.raises(BadInput, match=r"float32, found .* free on cpu; dtype = .bfloat16. halves"):
        model_on(base)
    check_room(base, Place(CPU, torch.bfloat16))


def test_what_is_free_is_the_least_of_machine_and_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9000 kB\nMemAvailable:    4000 kB\n")
    monkeypatch.setattr(free_memory, "MEMINFO", meminfo)
    monkeypatch.setattr(free_memory, "CGROUP", tmp_path)
    assert available(CPU) == 4000 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert available(CPU) == 4000 * 1024
    (tmp_path / "memory.max").write_text("5000\n")
    assert available(CPU) == 4000
    monkeypatch.setattr(free_memory, "MEMINFO", tmp_path / "none")
    (tmp_path / "memory.max").unlink()
    assert available(CPU) is None
