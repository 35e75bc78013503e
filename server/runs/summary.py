"""What is left of a run when it has ended: summary.json."""

from __future__ import annotations

import json
import math
import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedlora.common.disk.files import write_text
from fedlora.common.manifest.manifest import RunManifest
from fedlora.common.model.state import AdapterState
from fedlora.common.privacy.modes import guarantee_of
from fedlora.server.rounds.checkpoint import Progress
from fedlora.server.runs.public_data import PublicSide
from fedlora.server.secagg.log import SumLog

Counts = npt.NDArray[np.float64]  # whole numbers


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """summary.json, whole or not at all."""
    write_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")


def summary_of(
    manifest: RunManifest,
    public: PublicSide,
    folder: Path,
    progress: Progress,
    phases: Sequence[Mapping[str, Any]],
    lines: Sequence[Mapping[str, Any]],
    reserved: Mapping[str, float],
) -> dict[str, Any]:
    """What every run says of itself: what was promised, what was reached, and at what cost.

    `phases` are those of `phase_table`, `lines` those of metrics.jsonl.
    """
    released = next(phase for phase in phases if phase["released"])
    return {
        "task": manifest.task,
        **released["test"],
        "phases": list(phases),
        **_guaranteed(manifest, reserved),
        "rounds": progress.round,
        **_measured(lines),
        "peak_rss_bytes": peak_rss_bytes(),
        "trainable_parameters": public.model.spec.size,
        "strategy": manifest.strategy,
        "secure_aggregation": manifest.secure is not None,
        "secure": SumLog(folder).summary(manifest),
        "base_digest": manifest.base_digest,
        "adapter_digest": progress.release.digest,
        "attention": public.compute.attention,
        "precision": public.compute.precision,
        "dtype": public.compute.dtype,
        "validation": released["validation"],
        "versions": versions(),
    }


HEADS_ROUNDS = "all rounds were the head's"


def doubts(
    confusion: Counts | None,
    release: AdapterState,
    start: AdapterState | None = None,
    meant: bool = True,
) -> list[str]:
    """What a reader of the figures should know first, in sentences; most often none.

    `confusion` (classes, classes) counts the test file's records, rows by their true class; None
    where the task has no classes. `start` is what public records taught before the first round;
    `meant`: rounds were to move LoRA.
    """
    found = []
    if confusion is not None and confusion.sum():
        records = confusion.sum()
        right, most = np.trace(confusion) / records, confusion.sum(axis=1).max() / records
        error = math.sqrt(most * (1 - most) / records)
        if right <= most + 2 * error:
            found.append(
                f"Accuracy {right:.3f} is hardly above always guessing the largest class"
                f" ({most:.3f}): nothing was learnt, or noise drowned it. More units, a larger ε or"
                " fewer classes would help."
            )
    lora = ~release.spec.head_mask()
    if meant and start is not None and lora.any() and (release.vector == start.vector)[lora].all():
        found.append(
            "LoRA is as public records taught it: validation kept the head phase, or no round moved"
            " LoRA."
        )
    elif lora.any() and not release.moves_base:
        why = "validation kept the head alone, or no round moved LoRA" if meant else HEADS_ROUNDS
        found.append(f"LoRA changes nothing in what is released: {why}.")
    return found


def _guaranteed(manifest: RunManifest, reserved: Mapping[str, float]) -> dict[str, Any]:
    guarantee = guarantee_of(manifest)
    private = guarantee.private
    by_client = {name: guarantee.stated(each) for name, each in reserved.items()}
    epsilon = max(by_client.values(), default=0.0) if private else None
    return {
        "epsilon": epsilon,
        "epsilon_by_client": by_client if private else {},
        "delta": manifest.delta if private else None,
        "epsilon_charged": max(reserved.values(), default=0.0) if private else None,
        "epsilon_alone": guarantee.epsilon_alone(),
        "unit": guarantee.unit,
        "mode": manifest.mode,
        "schedule": guarantee.schedule(),
        "noise_source": guarantee.noise,
        "privacy_statement": guarantee.statement(epsilon),
    }


def _measured(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds of the run and of its rounds, and what was done in these."""
    seconds = sum(line["seconds"] for line in lines)
    examples = sum(line["examples_per_second"] * line["seconds"] for line in lines)
    replies = sum(line["replies"] for line in lines)
    return {
        "seconds": lines[-1]["elapsed_seconds"] if lines else 0.0,
        "training_seconds": seconds,
        "examples_per_second": examples / seconds if seconds else 0.0,
        "client_rounds_per_second": replies / seconds if seconds else 0.0,
    }


def versions() -> dict[str, str]:
    """Of everything that can change a result."""
    names = ("fedlora", "torch", "transformers", "peft", "opacus", "numpy", "flwr")
    found = {name: installed for name in names if (installed := _version(name))}
    return {"python": sys.version.split()[0]} | found


def _version(name: str) -> str:
    """ "" where it is not installed: a coordinator has no Opacus."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def peak_rss_bytes() -> int:
    """The most memory this program held; getrusage would count its parent's before it."""
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(status.read_text(encoding="utf-8").split("VmHWM:")[1].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
