"""Institutions' noisy counts beside the truth, their noise and their price beside the predicted.

Of a run that was simulated with `[evaluation] hold_out`; the truth is a researcher's, who holds all
the data. The price's second figure is a closed form (Balle and Wang 2018, theorem 8), which the
accountant does not use.

    python simulations/benchmarks/noisy_counts.py RUN [--draws 200000] [--json OUT]
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import brentq

from fedlora.client.training.hold_out import counted, noisy_counts, parted
from fedlora.common.config.load import load_config
from fedlora.common.errors import BadInput
from fedlora.common.manifest.counts import Cells
from fedlora.common.manifest.manifest import RunManifest
from fedlora.common.privacy.modes import guarantee_of
from fedlora.common.privacy.randomness import OsRandom
from fedlora.server.rounds.counted import kept_counts
from fedlora.server.runs.at_institutions import at_institutions, figures
from fedlora.simulations.begin import begin
from fedlora.simulations.federation.population import client_name
from fedlora.simulations.federation.run_folder import SimulatedRun
from fedlora.simulations.options import Options


def main() -> None:
    """Print each institution's line, and the three comparisons."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--draws", type=int, default=200_000, help="cells of noise alone")
    parser.add_argument("--json", type=Path, help="write what was found to this file")
    wanted = parser.parse_args()
    config = load_config(wanted.run / "config.toml")
    run = begin(config, wanted.run, Options(device="cpu", resume=True))
    if run.manifest.evaluation is None:
        raise BadInput(
            f"{wanted.run}: found a run without [evaluation], expected one with hold_out"
        )
    found = {**_beside_the_truth(run), **_noise(run, wanted.draws), **_price(run.manifest)}
    for name, value in found.items():
        print(f"{name}: {value}")
    if wanted.json is not None:
        wanted.json.write_text(json.dumps(found, indent=2))


def _beside_the_truth(run: SimulatedRun) -> dict[str, Any]:
    """Each institution's accuracy as told and as it is, and how many errors apart they are."""
    told = at_institutions(run.manifest, kept_counts(run.folder)) or {}
    cells, names = Cells.of(run.manifest), run.federation.partition.names
    run.public.model.load(run.checkpoint.load().release)
    rows, scores = {}, []
    for client in run.federation.clients:
        data = run.federation.data_in(client, run.manifest, run.ledger)
        total = counted(run.public.model, parted(data, run.manifest)[1], cells)
        true, noisy = figures(cells.named(total), 0.0), told["institutions"][client_name(client)]
        rows[names[client] if names else client_name(client)] = {"told": noisy, "true": true}
        scores.append((noisy["units"] - (true["units"] or 0.0)) / (math.sqrt(2) * told["noise"]))
    return {"institutions": rows, "worst": told["worst"], "units_off_in_deviations": scores}


def _noise(run: SimulatedRun, draws: int) -> dict[str, float]:
    """The deviation of counts of nobody, as they would leave, and the one that is accounted."""
    manifest, model = run.manifest, run.public.model
    cells, source = Cells.of(manifest), OsRandom()
    data = run.federation.data_in(0, manifest, run.ledger)
    nobody = parted(data, replace(manifest, evaluation=None))[1]
    parts = [
        noisy_counts(model, nobody, manifest, source).astype(np.float64)
        for _ in range(math.ceil(draws / cells.size))
    ]
    expected = manifest.accounted[-1].expected_units
    measured = float(np.concatenate(parts).std()) * expected
    predicted = manifest.accounted[-1].noise_multiplier
    return {"noise_measured": measured, "noise_predicted": predicted}


def _price(manifest: RunManifest) -> dict[str, float | None]:
    """ε of the evaluation by itself: the accountant's, and the closed form at σ / √attempts."""
    phase = manifest.accounted[-1]
    sigma = phase.noise_multiplier / math.sqrt(phase.attempts)

    def below(z: float) -> float:
        return 0.5 * math.erfc(-z / math.sqrt(2))

    def excess(epsilon: float) -> float:
        lower = below(1 / (2 * sigma) - epsilon * sigma)
        upper = math.exp(epsilon) * below(-1 / (2 * sigma) - epsilon * sigma)
        return lower - upper - manifest.delta

    guarantee = guarantee_of(manifest)
    return {
        "epsilon_accounted": guarantee.evaluation_epsilon(),
        "epsilon_closed_form": float(brentq(excess, 0.0, 100.0)),
        "epsilon_of_the_run": guarantee.stated_epsilon(),
    }


if __name__ == "__main__":
    main()
