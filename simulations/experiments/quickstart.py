"""`fedlora-sim quickstart`: untrained, not private and private, side by side, on made-up text.

It shows what a run leaves behind, not how good the method is: the corpus is synthetic, and says so.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from fedlora.common.config.load import load_config
from fedlora.common.config.schema import Config
from fedlora.common.errors import BadInput
from fedlora.common.model.compute import threads as with_threads
from fedlora.common.model.features import PooledTexts
from fedlora.server.runs.run import conduct
from fedlora.server.runs.summary import write_summary
from fedlora.simulations.begin import begin
from fedlora.simulations.engines.sequential import sequential
from fedlora.simulations.experiments.progress import run_progress
from fedlora.simulations.federation.packaged import with_corpus
from fedlora.simulations.federation.run_folder import finish
from fedlora.simulations.options import Options
from fedlora.simulations.report.pages import write_report

CONFIG = Path(__file__).parents[1] / "configs" / "quickstart.toml"
BASELINE = "without-privacy"  # the folder of the run that privacy is compared with
MARK = "quickstart.txt"
WRITTEN = (
    BASELINE,
    "data",
    "adapter",
    "checkpoint",
    "clients",
    *(
        "config.toml",
        "chosen.json",
        "compute.json",
        "data.sha256",
        "ledger.id",
        "manifest.json",
        "metrics.jsonl",
        "lost.jsonl",
        "projection.safetensors",
        "public_start.json",
        "public_start.safetensors",
    ),
    *("ledger.sqlite", "ledger.sqlite-wal", "ledger.sqlite-shm", "ledger.sqlite.lock"),
    *("summary.json", "report.html"),
)


def run_quickstart(folder: Path, console: Console, threads: int = 0) -> dict[str, Any]:
    """Three results and a report under `folder`; returns the private run's summary."""
    _make_room(folder)
    config = load_config(CONFIG)
    config = replace(config, data=with_corpus(config.data, config.seed, folder / "data"))
    console.print(
        "quickstart: a synthetic corpus of five institutions; nothing here is anybody's data"
    )
    open_config = replace(config, privacy=replace(config.privacy, mode="none"))
    with with_threads(threads):
        texts = PooledTexts()
        untrained, plain = _one_run(
            open_config, folder / BASELINE, console, texts, "without privacy"
        )
        _, private = _one_run(config, folder, console, texts, "private")
    comparison = {
        name: {key: summary.get(key) for key in ("accuracy", "macro_f1", "loss", "epsilon")}
        for name, summary in (
            ("untrained", untrained),
            ("non-private", plain),
            ("private", private),
        )
    }
    summary = private | {"comparison": comparison}
    write_summary(folder, summary)
    write_report(folder / BASELINE)
    write_report(folder)
    return summary


def _one_run(
    config: Config, folder: Path, console: Console, texts: PooledTexts, title: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Scores before training, and the summary after it."""
    console.print(title, style="bold")
    with run_progress(console) as progress:
        options = Options(device="cpu", texts=texts)
        run = begin(config, folder, options, on_features=progress.features)
        before = run.public.test.evaluate(run.public.initial)
        summary = finish(run, conduct(run, sequential(run), progress.round), synthetic=True)
    return dict(before), summary


def _make_room(folder: Path) -> None:
    """A quickstart, finished or not, may be run again in place: only what it wrote goes."""
    if not folder.exists() or not any(folder.iterdir()):
        folder.mkdir(parents=True, exist_ok=True)
    elif not (folder / MARK).exists():
        raise BadInput(
            f"{folder}: found other files, expected an empty folder or an earlier quickstart"
        )
    for name in WRITTEN:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    (folder / MARK).write_text(
        "made by fedlora-sim quickstart, which may be run here again\n", encoding="utf-8"
    )
