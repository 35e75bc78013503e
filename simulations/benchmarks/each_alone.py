"""Each institution by itself at the whole ε, beside all of them together: what a federation gives.

The institutions of a configuration are dealt out as its run deals them; then each trains alone on
its records, and is scored on the same public test records as all are. What the configuration says
of one institution holds for each; what it leaves open, the rules choose for each by itself.

    python simulations/benchmarks/each_alone.py CONFIG --out FOLDER [--set KEY=VALUE …] [--json OUT]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import fmean

from fedlora.common.config.load import load_config
from fedlora.common.model.features import PooledTexts
from fedlora.simulations.experiments.alone import runs
from fedlora.simulations.experiments.simulate import simulate
from fedlora.simulations.options import Options


def main() -> None:
    """Print a line for each institution, and one for all together."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("config", type=Path, help="of a Parquet training file")
    parser.add_argument("--out", type=Path, required=True, help="a folder for the runs")
    parser.add_argument("--set", action="append", default=[], help="section.key=VALUE")
    parser.add_argument("--json", type=Path, help="write what was found to this file")
    wanted = parser.parse_args()
    config = load_config(wanted.config, wanted.set)
    options = Options(device="cpu", texts=PooledTexts())
    found = {
        name: simulate(settings, wanted.out / name, options, train=table).summary
        for name, settings, table in runs(config, wanted.out)
    }
    measure = "accuracy" if "accuracy" in found["together"] else "loss"
    alone = [found[name][measure] for name in found if name != "together"]
    for name, summary in found.items():
        print(f"{name}: {summary[measure]:.4f}, ε {summary['epsilon'] or 'none'}")
    print(f"alone, mean: {fmean(alone):.4f}, from {min(alone):.4f} to {max(alone):.4f}")
    if wanted.json is not None:
        kept = {name: {measure: each[measure]} for name, each in found.items()}
        wanted.json.write_text(json.dumps(kept, indent=2))


if __name__ == "__main__":
    main()
