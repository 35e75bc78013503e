"""A simulated federation whose institutions count how its adapter does: in clear, under masks."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fedlora.client.training.hold_out import counted, parted
from fedlora.common.manifest.counts import Cells
from fedlora.common.privacy.modes import guarantee_of
from fedlora.server.rounds.counted import kept_counts
from fedlora.simulations.experiments.planning import plan
from fedlora.simulations.report.pages import write_report
from tests.simulations.experiments.test_simulate import config, cpu, run_whole, write_data

EVALUATED = ("federation.rounds=2", "evaluation.hold_out=0.4", "privacy.epsilon=60.0")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def test_in_clear_each_institution_s_counts_are_the_truth_and_noise(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    settings = config(tiny_bert, data, "record", *EVALUATED, 'data.unit="person"')
    run, summary = run_whole(settings, tmp_path / "run")
    told, cells = summary["evaluation"], Cells.of(run.manifest)
    planned = " ".join(str(plan(settings, cpu())).split())
    assert re.search(r"evaluation: a count is noised by .* ε 1[12]\.?\d* by itself", planned)
    assert isinstance(told, dict) and sorted(told["institutions"]) == [
        f"client-{n}" for n in range(3)
    ]
    terms = run.manifest.evaluation
    assert terms is not None and told["noise"] == terms.noise_multiplier > 0
    run.public.model.load(run.checkpoint.load().release)
    for client in range(3):  # a researcher who holds all the data may know the truth
        given = run.federation.data_in(client, run.manifest, run.ledger)
        train, held = parted(given, run.manifest)
        assert len(train.units) + len(held.units) == len(given.units)
        truth = cells.named(counted(run.public.model, held, cells))["right"].sum()
        noisy = told["institutions"][f"client-{client}"]["units"]
        assert abs(noisy - truth) < 6 * 2**0.5 * told["noise"]
    spent = [entry.body for entry in run.ledger.entries() if entry.body["kind"] == "reserve"]
    assert sum(body["phase"] == 1 for body in spent) == 3  # one attempt of each, and no more
    whole = guarantee_of(run.manifest).stated_epsilon()
    assert summary["epsilon"] == whole <= 60 and told["epsilon"] == pytest.approx(12, rel=0.01)
    statement = " ".join(run_statement(summary))
    assert "this run did not train on" in statement and "which ε covers once" in statement
    before = kept_counts(run.folder)
    _, again = run_whole(settings, tmp_path / "run", resume=True)
    assert kept_counts(run.folder) == before and again["evaluation"] == told
    page = write_report(run.folder).read_text()
    assert "At the institutions" in page and "client-2" in page


def test_under_masks_the_sum_alone_is_told(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    masks = ("aggregation.secure=true", "aggregation.minimum_cohort=3")
    groups = ('evaluation.group="person"', 'evaluation.groups=["p1", "p2"]')
    counts = 'evaluation.counts=["right", "groups"]'
    settings = config(tiny_bert, data, "record", *EVALUATED, *masks, *groups, counts)
    run, summary = run_whole(settings, tmp_path / "run")
    told = summary["evaluation"]
    assert isinstance(told, dict) and told["institutions"] == {} and told["replies"] == 3
    assert told["worst"] is None and run.manifest.secure is not None
    model, cells = run.public.model, Cells.of(run.manifest)
    model.load(run.checkpoint.load().release)
    truth = sum(
        cells.named(counted(model, parted(data, run.manifest)[1], cells))["right"].sum()
        for data in (run.federation.data_in(n, run.manifest, run.ledger) for n in range(3))
    )
    assert abs(told["together"]["units"] - truth) < 6 * 6**0.5 * told["noise"]
    assert [*told["groups"]] == ["p1", "p2", "all others"]
    page = write_report(run.folder).read_text()
    assert "told only in sum" in page and "all others" in page


def run_statement(summary: dict[str, object]) -> list[str]:
    found = summary["privacy_statement"]
    assert isinstance(found, list)
    return found
