"""What a plan prints can be read in a terminal of any width."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from fedlora.client.training.memory import Memory
from fedlora.common.manifest.manifest import Phase
from fedlora.simulations.experiments.planning import PhasePlan, Plan

HEAD = Phase(
    name="head",
    rounds=30,
    attempts=32,
    steps=1,
    sampling_rate=1.0,
    expected_units=12_000.0,
    noise_multiplier=33.737969,
    clip=1.0,
    head_clip=0.0,
    optimizer="sgd",
    learning_rate=1.0,
    carry_optimizer=False,
    proximal_mu=0.0,
)
LORA = replace(HEAD, name="adapter", rounds=60, attempts=62, sampling_rate=0.0138889, head_clip=0.5)
PLAN = Plan(
    phases=(PhasePlan(HEAD, 3_600_000.0, 12.34, 0.25), PhasePlan(LORA, 100_000.0, 123.4, None)),
    epsilon_by_round={9: 0.5, 90: 0.9},
    epsilon=0.99,
    delta=1e-5,
    unit="record",
    parameters=12_345,
    leaving=12_345,
    attention="sdpa",
    precision="float32",
    dtype="float32",
    memory=Memory(1 << 20, 1 << 20, 1 << 20, 1 << 20, 1 << 20),
    micro_batch_tokens=4096,
    wire="float32",
)
ROWS = {
    "phase": ("head", "adapter"),
    "rounds": ("30", "60"),
    "attempts": ("32", "62"),
    "steps": ("1", "1"),
    "rate": ("1", "0.0138889"),
    "σ": ("33.74", "33.74"),
    "clip": ("1", "1 / 0.5"),
    "signal / noise": ("≤ 0.25", "–"),
    "examples": ("3,600,000", "100,000"),
    "minutes": ("12.3", "123.4"),
}


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_each_number_stands_whole_beside_its_name(width: int) -> None:
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(PLAN)
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= width
    shown = {" ".join(line.split()) for line in lines[: len(ROWS)]}
    assert shown == {" ".join((name, *values)) for name, values in ROWS.items()}
    assert any(line.split() == ["90", "0.9"] for line in lines)
