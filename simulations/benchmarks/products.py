"""What a machine's own matrix product does: the bound that a step is held against."""

from __future__ import annotations

import time

import torch

from fedlora.common.model.compute import PRECISIONS


def matmul_rates(device: torch.device, rows: int, inner: int, outer: int) -> dict[str, float]:
    """Operations a second of (rows, inner) times (inner, outer) by precision; the best of five."""
    rates = {}
    for name, dtype in PRECISIONS.items():
        left = torch.randn(rows, inner, device=device).to(dtype)
        right = torch.randn(inner, outer, device=device).to(dtype)
        times = []
        for _ in range(6):
            started = time.perf_counter()
            left @ right
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        rates[name] = 2.0 * rows * inner * outer / min(times[1:])
    return rates
