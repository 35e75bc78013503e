"""Choosing attention and precision by a short measurement, not by name.

On some CPUs the backward pass of fused attention takes half of a step, on others bfloat16 products
are a hundred times slower than float32. Neither choice changes what is clipped or accounted, but
each changes the last bits of what is computed: so a run measures once, and keeps what came of it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedlora.common.config.schema import ModelConfig
from fedlora.common.disk.files import write_text
from fedlora.common.errors import BadInput
from fedlora.common.model.loading import ATTENTIONS
from fedlora.common.model.network import AdapterModel
from fedlora.common.model.stored import Place
from fedlora.common.tasks.batch import Encoded

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
PROBE_ROWS = 12
COMPUTE = "compute.json"  # in a run's folder


@dataclass(frozen=True)
class Compute:
    """What was chosen, and the seconds that each alternative took on the probe."""

    attention: str
    precision: str
    seconds: dict[str, float]
    dtype: str = "float32"  # what frozen matrices are stored as


def choose_compute(model: AdapterModel, data: Encoded, attention: str, precision: str) -> Compute:
    """Set the model's attention and precision.

    "auto" measures forward and backward on `PROBE_ROWS` records. Not fused attention on a GPU: its
    backward adds in an order that the moment decides, and a record's gradient must not depend on
    what is computed beside it (`common.model.shapes`).
    """
    ordered = model.attentions if model.device.type == "cpu" else ("eager",)
    attentions = ordered if attention == "auto" else (_known(attention, ATTENTIONS, "attention"),)
    precisions = (
        _precisions(model.device)
        if precision == "auto"
        else (_known(precision, PRECISIONS, "precision"),)
    )
    pairs = [(a, p) for a in attentions for p in precisions]
    seconds = {}
    for pair in pairs if len(pairs) > 1 else []:
        _apply(model, *pair)
        seconds["/".join(pair)] = _fastest(lambda: _probe(model, data))
    best = min(pairs, key=lambda pair: seconds.get("/".join(pair), 0.0))
    _apply(model, *best)
    return Compute(*best, seconds, model.stored)


def stored_for_run(model: ModelConfig, device: torch.device | None, folder: Path) -> ModelConfig:
    """`model` with the dtype that the run in `folder` began with on such a device, or begins with.

    Settled before a base is loaded; `compute_of_run` keeps it. BadInput for what is none.
    """
    if model.dtype != "auto":
        return model
    kept = _kept(folder / COMPUTE).get((device or torch.device("cpu")).type)
    name = "auto" if kept is None else str(kept.get("dtype", "float32"))
    return replace(model, dtype=Place.of(name, device).dtype_name)


def compute_of_run(
    model: AdapterModel, data: Encoded, attention: str, precision: str, folder: Path
) -> Compute:
    """`choose_compute`, whose "auto" is measured once for the run in `folder` and a kind of device.

    Every process of the run, and a resumed one, computes as the first did. BadInput where what it
    kept can't be read.
    """
    path, device = folder / COMPUTE, model.device.type
    table = _kept(path)
    kept = table.get(device, {})
    chosen = choose_compute(
        model,
        data,
        str(kept.get("attention", "auto")) if attention == "auto" else attention,
        str(kept.get("precision", "auto")) if precision == "auto" else precision,
    )
    if not kept:
        write_text(path, json.dumps(table | {device: asdict(chosen)}, indent=1) + "\n")
    return chosen


def measured_once(
    folder: Path, device: torch.device, field: str, measure: Callable[[], int]
) -> int:
    """What `measure` found for the run in `folder` when it was first asked on such a device.

    Kept beside what `compute_of_run` keeps. BadInput where that can't be read.
    """
    path = folder / COMPUTE
    table = _kept(path)
    kept = table.get(device.type, {})
    if field not in kept:
        kept = kept | {field: measure()}
        write_text(path, json.dumps(table | {device.type: kept}, indent=1) + "\n")
    found = kept[field]
    if not isinstance(found, int) or found < 1:
        raise BadInput(f"{path} {field}: found {found!r}, expected a whole number >= 1")
    return found


def _kept(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        table = json.loads(path.read_bytes())
    except ValueError as error:
        raise BadInput(f"{path}: found bytes that are not JSON ({error})") from error
    if not isinstance(table, dict) or not all(isinstance(each, dict) for each in table.values()):
        raise BadInput(f"{path}: found no table of devices, expected what the run chose")
    return table


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run with `count` CPU threads; 0 leaves the setting alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def matmul_seconds(dtype: torch.dtype, device: torch.device, size: int = 256) -> float:
    """Seconds of a (size, 384) x (384, 384) product, which decides a step; the best of three."""
    left = torch.randn(size, 384, device=device).to(dtype)
    right = torch.randn(384, 384, device=device).to(dtype)
    return _fastest(lambda: left @ right)


def _precisions(device: torch.device) -> tuple[str, ...]:
    """bf16 is worth a whole step's measurement only where its bare product is not slower."""
    fp32, bf16 = (matmul_seconds(PRECISIONS[name], device) for name in ("fp32", "bf16"))
    return ("fp32",) if bf16 > fp32 else ("fp32", "bf16")


def _apply(model: AdapterModel, attention: str, precision: str) -> None:
    model.set_attention(attention)
    model.precision = PRECISIONS[precision]


def _probe(model: AdapterModel, data: Encoded) -> None:
    rows = np.arange(min(PROBE_ROWS, len(data)), dtype=np.int64)
    batch = data.batch(rows, model.pad, model.device)
    model.losses(batch).sum().backward()  # type: ignore[no-untyped-call]
    for parameter in model.parameters.values():
        parameter.grad = None
        parameter.grad_sample = None  # type: ignore[attr-defined]


def _fastest(work: Callable[[], object]) -> float:
    """Seconds of the fastest of three runs, after one to warm up."""
    work()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def _known(name: str, known: Iterable[str], field: str) -> str:
    if name not in known:
        raise BadInput(f"[training] {field} = {name!r}: expected auto or one of {', '.join(known)}")
    return name
