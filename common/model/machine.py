"""Where a machine computes, what memory it has left, and whether a base fits before it is read."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch
from safetensors import safe_open

from fedlora.common.data.free_memory import free_memory, shown
from fedlora.common.errors import BadInput
from fedlora.common.model.stored import Place


def check_room(folder: Path, place: Place) -> None:
    """BadInput where the weights of a base are more than the machine, or the GPU, has free."""
    free, needed = available(place.device), weight_bytes(folder, place.dtype)
    if free is None or needed <= free:
        return
    wide = place.dtype == torch.float32
    advice = 'dtype = "bfloat16" halves it' if wide else "expected a smaller base"
    raise BadInput(
        f"[model] base = {folder}: its weights take {shown(needed)} as {place.dtype_name},"
        f" found {shown(free)} free on {place.device.type}; {advice}"
    )


def weight_bytes(folder: Path, dtype: torch.dtype) -> int:
    """Of all weights in a folder, its matrices stored as `dtype` and all else as float32."""
    total = 0
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118  # it is no mapping
                shape = weights.get_slice(name).get_shape()
                total += math.prod(shape) * (dtype.itemsize if len(shape) > 1 else 4)
    return total


def available(device: torch.device) -> int | None:
    """Bytes that can still be had, None where the system does not say."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free_memory()


def held(device: torch.device) -> int:
    """Bytes that this process has now: of memory, or of the GPU's."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    statm = Path("/proc/self/statm")
    if not statm.is_file():
        return 0
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def device_named(name: str) -> torch.device:
    """cpu, cuda, or auto: a GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise BadInput(f"--device {name}: expected cpu, cuda or auto")
    if name == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device cuda: found no GPU")
    return torch.device(name)
