"""Heads of institutions' own after a simulated run: compared, and in the report."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from fedlora.common.errors import BadInput
from fedlora.simulations import personalise, simulate
from tests.simulations.experiments.test_simulate import config, cpu, data

__all__ = ["data"]


def entries(folder: Path) -> list[str]:
    """All that a ledger holds: its file may also change as SQLite moves pages from its log."""
    with closing(sqlite3.connect(f"file:{folder / 'ledger.sqlite'}?mode=ro", uri=True)) as ledger:
        return list(ledger.iterdump())


def test_a_run_that_has_ended(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    skewed = ('federation.partition="dirichlet"', "federation.alpha=0.1", "federation.rounds=2")
    folder = tmp_path / "run"
    with pytest.raises(BadInput, match="expected a run that has ended"):
        personalise(folder, cpu())
    result = simulate(config(tiny_bert, data, "record", *skewed), folder, cpu())
    ledger = entries(folder)
    told: list[str] = []
    found = personalise(folder, cpu(), told.append)
    assert told == ["client-0", "client-1", "client-2"] == list(found["by_client"])
    for name, row in found["by_client"].items():
        assert row["released"] == pytest.approx(result.summary["accuracy_by_client"][name])
    assert found["released_worst"] <= found["released_mean"]
    assert found["own_worst"] <= found["own_mean"] <= 1
    assert json.loads((folder / "summary.json").read_text()) == {
        **result.summary,
        "personal": found,
    }
    assert "With its own head" in (folder / "report.html").read_text()
    assert entries(folder) == ledger
    assert personalise(folder, cpu()) == found
    with_b = personalise(folder, cpu(), lora=True)
    for name, row in with_b["by_client"].items():
        assert {key: row[key] for key in found["by_client"][name]} == found["by_client"][name]
        assert row["passes"] > 0 or row["adapter"] == pytest.approx(row["own"])
    assert with_b["adapter_worst"] <= with_b["adapter_mean"] <= 1
    assert any(row["passes"] for row in with_b["by_client"].values())
    assert "With its own adapter" in (folder / "report.html").read_text()
    assert entries(folder) == ledger
