"""Examples a second of one training step on AG News' real lengths.

Ours with and without privacy, and others'.

    private  this project's step: Poisson-sized batch, per-unit clip, noise; batches of fixed shapes
    packed   the same, batches packed by length
    plain    the same without clip and noise
    tuned    what who cares for speed writes without privacy: texts of like length together, padded
             to the batch's longest, the machine's best attention and precision
    recipe   what people write with torch, transformers and PEFT: float32, padded to max_length,
             no privacy
    opacus   Opacus' PrivacyEngine (hooks) on that recipe

The same records, the same network (MiniLM, LoRA r=8 on query and value, its own head) and the same
batch for all; repetitions are interleaved in one process, and ratios are of medians. `WARM` steps
go before them, in which a private step tries which records may go together: `tries` says how many
later steps these took longer by. Peak
memory is taken from one process for each. The floor is what the machine's own matrix products would
need for the real tokens.

    python simulations/benchmarks/private_step.py [--json FILE] [--records 128] [--repeats 5]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from opacus import PrivacyEngine
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, TensorDataset

from fedlora.client.training.sampling import micro_batches
from fedlora.client.training.step import ClipGroups, PerSampleGradients, private_mean
from fedlora.common.config.schema import LoraConfig, ModelConfig
from fedlora.common.data.records import Columns, read_records, unit_groups
from fedlora.common.model.compute import choose_compute
from fedlora.common.model.network import AdapterModel, build_model
from fedlora.common.privacy.randomness import OsRandom
from fedlora.common.tasks.batch import Encoded
from fedlora.common.tasks.classification import SequenceClassification
from fedlora.server.runs.summary import peak_rss_bytes
from fedlora.simulations.benchmarks.fresh_process import in_a_fresh_process
from fedlora.simulations.benchmarks.products import matmul_rates

AG_NEWS = Path("../shared/data/ag_news/train.parquet")
MAX_LENGTH = 128
RECIPE_BATCH = 32
WARM = 12
# of a micro-batch: small ones pad less, and a GPU wants to be filled
TOKENS = {"cpu": 2048, "cuda": 65536}
LABELS = ("0", "1", "2", "3")
Step = Callable[[], None]


@dataclass(frozen=True)
class Case:
    """One of them: `step` goes once through all records."""

    step: Step
    model: AdapterModel
    padded: Callable[[], int]  # tokens that are computed, after the warm-up


def main() -> None:
    """Time the steps alternately, and print them against the first."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads or torch.get_num_threads())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    warnings.filterwarnings("ignore", message="Secure RNG turned off")
    warnings.filterwarnings("ignore", message="Optimal order is the largest alpha")
    cases = CASES if not arguments.only else {arguments.only: CASES[arguments.only]}
    tokens = arguments.tokens or TOKENS[device.type]
    built = {name: build(arguments.records, device, tokens) for name, build in cases.items()}
    every = _interleaved({name: case.step for name, case in built.items()}, arguments.repeats)
    seconds = {name: times[WARM:] for name, times in every.items()}
    if arguments.only:
        print(json.dumps({"rss": peak_rss_bytes()}))
        return
    figures = _figures(built, seconds, arguments, device)
    settled = statistics.median(seconds["private"])
    figures["tries"] = sum(every["private"][:WARM]) / settled - WARM
    _print(figures)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def _private(records: int, device: torch.device, tokens: int, packed: bool = False) -> Case:
    model, data = _model(records, device)
    choose_compute(model, data, "auto", "auto")
    gradients, groups = PerSampleGradients(model), ClipGroups.flat(model.spec, 1.0)
    units, drawn = unit_groups(None, records), np.arange(records, dtype=np.int64)

    def step() -> None:
        total = gradients.clipped_sum(data, units, drawn, groups, tokens, packed)
        private_mean(total, groups, 1.0, float(records), OsRandom())

    def padded() -> int:
        fixed = gradients.batches(data, units, drawn, tokens)
        return sum(batch.shape[0] * batch.shape[1] for batch in fixed if batch.shape is not None)

    return Case(step, model, partial(_padded, data, units, drawn, tokens) if packed else padded)


def _packed(records: int, device: torch.device, tokens: int) -> Case:
    return _private(records, device, tokens, packed=True)


def _plain(records: int, device: torch.device, tokens: int) -> Case:
    model, data = _model(records, device)
    choose_compute(model, data, "auto", "auto")
    gradients = PerSampleGradients(model)
    units, drawn = unit_groups(None, records), np.arange(records, dtype=np.int64)

    def step() -> None:
        gradients.plain_sum(data, micro_batches(units, drawn, data.lengths, tokens))

    return Case(step, model, partial(_padded, data, units, drawn, tokens))


def _recipe(records: int, device: torch.device, tokens: int) -> Case:
    model, data = _model(records, device)
    optimizer = torch.optim.AdamW(
        [p for p in model.network.parameters() if p.requires_grad], lr=1e-3
    )
    loader = DataLoader(_padded_set(data), batch_size=RECIPE_BATCH, shuffle=True)

    def step() -> None:
        _epoch(model.network, optimizer, loader, device)

    return Case(step, model, lambda: records * MAX_LENGTH)


def _tuned(records: int, device: torch.device, tokens: int) -> Case:
    model, data = _model(records, device)
    choose_compute(model, data, "auto", "auto")
    order = np.argsort(-data.lengths, kind="stable").astype(np.int64)
    optimizer = torch.optim.AdamW(
        [p for p in model.network.parameters() if p.requires_grad], lr=1e-3
    )
    parts = [order[start : start + RECIPE_BATCH] for start in range(0, records, RECIPE_BATCH)]
    loader = [data.batch(rows, model.pad, device) for rows in parts]

    def step() -> None:
        with torch.autocast(device.type, model.precision, enabled=model.precision != torch.float32):
            _epoch(model.network, optimizer, [(b.ids, b.mask, b.targets) for b in loader], device)

    return Case(step, model, lambda: sum(batch.ids.numel() for batch in loader))


def _opacus(records: int, device: torch.device, tokens: int) -> Case:
    model, data = _model(records, device)
    optimizer: Any = torch.optim.AdamW(
        [p for p in model.network.parameters() if p.requires_grad], lr=1e-3
    )
    loader: Any = DataLoader(_padded_set(data), batch_size=RECIPE_BATCH, shuffle=True)
    network, optimizer, loader = PrivacyEngine().make_private(
        module=model.network.train(),  # asked for by Opacus; every dropout is off
        optimizer=optimizer,
        data_loader=loader,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=False,  # the same batches as the recipe: this measures time, not privacy
    )

    def step() -> None:
        _epoch(network, optimizer, loader, device)

    return Case(step, model, lambda: records * MAX_LENGTH)


CASES: dict[str, Callable[[int, torch.device, int], Case]] = {
    "private": _private,
    "packed": _packed,
    "plain": _plain,
    "tuned": _tuned,
    "recipe": _recipe,
    "opacus": _opacus,
}


def _epoch(network: torch.nn.Module, optimizer: Any, loader: Any, device: torch.device) -> None:
    for ids, mask, targets in loader:
        optimizer.zero_grad()
        logits = network(ids.to(device), mask.to(device))
        torch.nn.functional.cross_entropy(logits, targets.to(device)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def _model(records: int, device: torch.device) -> tuple[AdapterModel, Encoded]:
    task = SequenceClassification(LABELS)
    model = build_model(
        ModelConfig(max_length=MAX_LENGTH, pooling="default"),
        LoraConfig(rank=8),
        task,
        seed=1,
        device=device,
    )
    read = read_records(AG_NEWS, Columns(text="text", label="label"), LABELS)
    rows = np.random.default_rng(0).permutation(len(read))[:records].astype(np.int64)
    return model, task.encode(read.take(rows), model.tokenizer, MAX_LENGTH)


def _padded_set(data: Encoded) -> TensorDataset:
    """All records padded to max_length, as `tokenizer(..., padding="max_length")` gives them."""
    batch = data.batch(np.arange(len(data), dtype=np.int64), 0, torch.device("cpu"))
    short = MAX_LENGTH - batch.ids.shape[1]
    pad = torch.nn.functional.pad
    return TensorDataset(pad(batch.ids, (0, short)), pad(batch.mask, (0, short)), batch.targets)


def _padded(data: Encoded, units: Any, drawn: Any, tokens: int) -> int:
    batches = micro_batches(units, drawn, data.lengths, tokens)
    return sum(int(data.lengths[batch.rows].max()) * len(batch.rows) for batch in batches)


def _interleaved(steps: dict[str, Step], repeats: int) -> dict[str, list[float]]:
    """Seconds of each repetition, those of the warm-up first."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(WARM + repeats):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def _figures(
    built: dict[str, Case],
    seconds: dict[str, list[float]],
    arguments: argparse.Namespace,
    device: torch.device,
) -> dict[str, Any]:
    model, data = _model(arguments.records, device)
    real = int(data.lengths.sum())
    speed = {name: arguments.records / statistics.median(times) for name, times in seconds.items()}
    floors = {
        name: arguments.records / (_flop(model, real) / rate)
        for name, rate in matmul_rates(device, 2048, 384, 1536).items()
    }
    return {
        **speed,
        "private_to_plain": speed["private"] / speed["plain"],
        "packed_to_plain": speed["packed"] / speed["plain"],
        "packed_to_tuned": speed["packed"] / speed["tuned"],
        "private_to_recipe": speed["private"] / speed["recipe"],
        "private_to_floor": speed["private"] / max(floors.values()),
        "floor": floors,
        "records": arguments.records,
        "real_tokens": real,
        "padded_tokens": {name: case.padded() for name, case in built.items()},
        "peak_rss_bytes": {
            name: in_a_fresh_process(
                __file__, "--only", name, "--records", arguments.records, "--repeats", 1
            )["rss"]
            for name in built
        },
        "attention": built[
            "private"
        ].model.network.backbone.base_model.model.config._attn_implementation,  # type: ignore[union-attr]
        "precision": str(built["private"].model.precision),
        "micro_batch_tokens": arguments.tokens or TOKENS[device.type],
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "seconds": seconds,
    }


def _flop(model: AdapterModel, tokens: int) -> float:
    """Forward and backward through frozen matrices: 2 + 2 operations for each weight and token."""
    layers = [
        p
        for n, p in model.network.named_parameters()
        if ".layer." in n and "lora_" not in n and p.ndim == 2
    ]
    return 4.0 * tokens * sum(p.numel() for p in layers)


def _print(figures: dict[str, Any]) -> None:
    table = Table("what", "examples/s", "padded / real tokens", "peak MB", box=None)
    for name in CASES:
        ratio = figures["padded_tokens"][name] / figures["real_tokens"]
        table.add_row(
            name,
            f"{figures[name]:.1f}",
            f"{ratio:.2f}",
            f"{figures['peak_rss_bytes'][name] / 1e6:.0f}",
        )
    for name, rate in figures["floor"].items():
        table.add_row(f"floor by {name} products", f"{rate:.1f}", "", "")
    console = Console()
    console.print(table)
    for name in (each for each in figures if "_to_" in each or each == "tries"):
        console.print(f"{name} {figures[name]:.2f}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--records", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=0, help="of a micro-batch; 0: by device")
    parser.add_argument("--only", choices=list(CASES))
    return parser.parse_args()


if __name__ == "__main__":
    main()
