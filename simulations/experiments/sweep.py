"""`fedlora-sim sweep`: one run for each value of a key, and the privacy-utility curve over them.

Choosing the best of several trials leaks something about the data that no trial's ε covers: the
page says that the trials were not accounted together.
"""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from fedlora.common.config.schema import config_to_toml, load_config
from fedlora.common.disk.files import write_atomically
from fedlora.common.errors import BadInput
from fedlora.common.model.features import PooledTexts
from fedlora.simulations.begin import Options
from fedlora.simulations.experiments.simulate import simulate
from fedlora.simulations.report.pages import write_sweep_report

KEPT = (
    "accuracy",
    "macro_f1",
    "perplexity",
    "loss",
    "epsilon",
    "delta",
    "mode",
    "seconds",
    "validation",
)


def run_sweep(
    config: Path,
    over: str,
    overrides: list[str],
    folder: Path,
    console: Console,
    device: str = "auto",
    threads: int = 0,
) -> Path:
    """Run `config` for each value, sweep.json and .html in `folder`; finished values stay."""
    key, values = _values(over)
    trials, texts = [], PooledTexts()
    # all of them first: a bad value is named before anything runs
    configured = [(value, load_config(config, [*overrides, f"{key}={value}"])) for value in values]
    for value, settings in configured:
        setting = f"{key}={value}"
        target = folder / setting.replace("/", "_")
        done = target / "summary.json"
        if done.is_file():
            if (target / "config.toml").read_text(encoding="utf-8") != config_to_toml(settings):
                raise BadInput(
                    f"{target}: found a trial of another configuration, expected another --out"
                )
            summary = json.loads(done.read_text(encoding="utf-8"))
            if summary.get("ended"):
                raise BadInput(
                    f"{target}: found a trial that ended early ({summary['ended']}), expected"
                    " another --out"
                )
        else:
            console.print(f"[bold]{setting}[/bold]")
            resume = (target / "checkpoint" / "manifest.json").exists()
            options = Options(device=device, threads=threads, resume=resume, texts=texts)
            summary = simulate(settings, target, console, options)
        trials.append({"key": key, "value": value, **{name: summary.get(name) for name in KEPT}})
        write_atomically(folder / "sweep.json", (json.dumps(trials, indent=2) + "\n").encode())
    return write_sweep_report(folder)


def _values(over: str) -> tuple[str, list[str]]:
    key, equals, listed = over.partition("=")
    values = [value.strip() for value in listed.split(",") if value.strip()]
    if not equals or not values or "." not in key:
        raise BadInput(f"--over {over}: expected section.key=VALUE,VALUE,…")
    return key.strip(), values
