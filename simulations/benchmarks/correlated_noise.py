"""What noise that is correlated over rounds could save, for the schedules that the rules choose.

Matrix factorisation (Choquette-Choo et al. 2023, "(Amplified) banded matrix factorization"): a
round t gets noise Σ_s (C⁻¹)_ts z_s in place of z_t, for a lower triangular C of a band. What a unit
moves is bounded by C's columns: by √Σ|CᵀC| where every unit is in every round, and by one column
where a unit is drawn at most once in a band, by cyclic Poisson draws: T/band rounds at band times
the rate (their theorem 4). C is optimised here by gradients, for either of two aims: the noise in
the last adapter, and the root of its mean square over the rounds' adapters. A figure is the least
noise that is possible over that of independent noise at the same ε. Weights of a round are the
server's: warm-up and a linear decay. Band 1 has no correlation: with every unit in every round C is
diagonal, and deals the same budget to rounds by their weights.

    python simulations/benchmarks/correlated_noise.py [--epsilon 8] [--json OUT]
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.table import Table

from fedlora.common.privacy.calibration import calibrate
from fedlora.server.defaults.decide import HEAD_ROUNDS, WARMUP
from fedlora.server.defaults.lora_rules import LARGEST_DRAW, LORA_ROUNDS, SMALLEST_DRAW

Floats = npt.NDArray[np.float64]
DELTA = 1e-5
BANDS = (1, 2, 4, 8, 16, 60)


@dataclass(frozen=True)
class Case:
    """A phase: its rounds, and the rate at which units are drawn for each."""

    name: str
    rounds: int
    rate: float


CASES = (
    Case("head, every unit in every round", HEAD_ROUNDS, 1.0),
    Case("LoRA, every unit in every round", LORA_ROUNDS, 1.0),
    Case("LoRA, few units", LORA_ROUNDS, LARGEST_DRAW),
    Case("LoRA, many units", LORA_ROUNDS, SMALLEST_DRAW),
)


def main() -> None:
    """A row for each phase and band."""
    wanted = _arguments().parse_args()
    torch.manual_seed(0)
    found = []
    for case in CASES:
        alone = _multiplier(case, 1, wanted.epsilon)
        for band in (band for band in BANDS if band <= case.rounds):
            if case.rate < 1 and band * case.rate > 1:
                continue  # more than all units would have to be drawn
            noise = _multiplier(case, band, wanted.epsilon) / alone
            row = {"phase": case.name, "band": band, "noise multiplier": noise}
            for aim in ("last", "all"):
                row[aim] = noise * _least(case, band, aim) / _independent(case, aim)
            found.append(row)
    Console(width=120).print(_table(found))
    if wanted.json is not None:
        wanted.json.write_text(json.dumps({"found": found, "epsilon": wanted.epsilon}))


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--epsilon", type=float, default=8.0)
    parser.add_argument("--json", type=Path, help="write what was found to this file")
    return parser


def _multiplier(case: Case, band: int, epsilon: float) -> float:
    """The noise multiplier that keeps ε, of a unit's whole part in all rounds where all are in."""
    if case.rate == 1:
        return calibrate([], 1.0, 1, epsilon, DELTA)
    rounds = math.ceil(case.rounds / band)
    return calibrate([], case.rate * band, rounds, epsilon, DELTA)


def _workload(case: Case, aim: str) -> Floats:
    """(adapters, rounds): what of each round's noise is in an adapter."""
    after = np.arange(case.rounds)
    warm = np.minimum(1.0, (after + 1) / max(1.0, WARMUP * case.rounds))
    weights = warm * (1 - after / case.rounds)
    every = np.tril(np.ones((case.rounds, case.rounds))) * weights
    return every[-1:] if aim == "last" else every / math.sqrt(case.rounds)


def _independent(case: Case, aim: str) -> float:
    """The noise of C = 1, at a noise multiplier of 1."""
    return _noise(case, torch.eye(case.rounds, dtype=torch.float64), aim).item()


def _noise(case: Case, matrix: torch.Tensor, aim: str) -> torch.Tensor:
    """‖A C⁻¹‖ times the most that one unit moves."""
    workload = torch.from_numpy(_workload(case, aim))
    noise = torch.linalg.solve_triangular(matrix, workload, upper=False, left=False).norm()
    gram = matrix.T @ matrix
    most = gram.abs().sum() if case.rate == 1 else gram.diagonal().max()
    bounded: torch.Tensor = noise * most.sqrt()
    return bounded


def _least(case: Case, band: int, aim: str) -> float:
    """The least noise over all C of that band that L-BFGS finds, from C = 1."""
    size = case.rounds
    offsets = torch.arange(size)[:, None] - torch.arange(size)[None, :]
    inside = ((offsets > 0) & (offsets < band)).double()
    diagonal = torch.zeros(size, dtype=torch.float64, requires_grad=True)
    below = torch.zeros(size, size, dtype=torch.float64, requires_grad=True)

    def matrix() -> torch.Tensor:
        made = torch.diag(diagonal.exp()) + below * inside
        # columns of one length cost nothing where a unit is in one of them at most
        return made if case.rate == 1 else made / made.norm(dim=0)

    optimizer: Any = torch.optim.LBFGS(
        [diagonal, below], max_iter=400, history_size=50, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = _noise(case, matrix(), aim).log()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    for _ in range(3):
        optimizer.step(closure)
    return min(_independent(case, aim), float(_noise(case, matrix(), aim).detach()))


def _table(found: list[dict[str, object]]) -> Table:
    table = Table("phase", "band", "noise multiplier", "last adapter", "all adapters", box=None)
    for row in found:
        values = (f"{row[name]:.3f}" for name in ("noise multiplier", "last", "all"))
        table.add_row(str(row["phase"]), str(row["band"]), *values)
    return table


if __name__ == "__main__":
    main()
