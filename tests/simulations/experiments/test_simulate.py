"""Whole runs on a tiny model: what they leave, that they resume, that the ledger survives."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import transformers

from fedlora.common.config.load import parse_config
from fedlora.common.config.schema import Config, config_to_toml
from fedlora.common.errors import BadInput, Refused, Spent
from fedlora.common.ledger.ledger import Budget
from fedlora.common.manifest.manifest import RunManifest
from fedlora.common.privacy.accountant import Spend, epsilon_of
from fedlora.common.privacy.record_level import RecordLevel
from fedlora.server.rounds.checkpoint import Checkpoint
from fedlora.server.runs.run import conduct
from fedlora.simulations.begin import begin
from fedlora.simulations.engines.sequential import sequential
from fedlora.simulations.federation.run_folder import Paths, SimulatedRun, finish
from fedlora.simulations.options import Options
from tests.conftest import WORDS

CONFIG = """
seed = 11
[model]
base = "{base}"
pooling = "layers"
projection = 6
max_length = 16
[lora]
rank = 2
[data]
train = "{data}/train.jsonl"
test = "{data}/test.jsonl"
validation = 0.2
[federation]
clients = 3
partition = "iid"
rounds = 4
spare_rounds = 2
[training]
steps = 2
learning_rate = 0.01
sampling_rate = 0.3
expected_units = 8
head_rounds = 2
head_sampling_rate = 0.5
moves = "both"
precision = "fp32"
attention = "sdpa"
[server]
head_learning_rate = 0.05
[privacy]
mode = "{mode}"
epsilon = 8.0
head_epsilon_share = 0.5
delta = 1e-4
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def write_data(folder: Path) -> Path:
    """Sixty short texts whose label is a word in them."""
    rng = np.random.default_rng(0)
    for name, count in (("train", 75), ("test", 20), ("validation", 15)):
        rows = []
        for _ in range(count):
            label = int(rng.integers(0, 2))
            words = [*rng.choice(WORDS, 4), ("good", "bad")[label]]
            rows.append(
                {"text": " ".join(words), "label": label, "person": f"p{rng.integers(0, 20)}"}
            )
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def config(base: Path, data: Path, mode: str, *overrides: str) -> Config:
    return parse_config(CONFIG.format(base=base, data=data, mode=mode), "test", overrides)


def public(base: Path, data: Path) -> Config:
    """A private run whose public files are named, as a shared ledger wants it."""
    return config(base, data, "record", f'data.validation="{data}/validation.jsonl"')


def cpu(**more: Any) -> Options:
    """Options of a run that gives the same figures on every machine."""
    return Options(device="cpu", **more)


def run_whole(
    settings: Config, folder: Path, resume: bool = False
) -> tuple[SimulatedRun, dict[str, object]]:
    run = begin(settings, folder, cpu(resume=resume))
    summary = finish(run, conduct(run, sequential(run)))
    return run, summary


def stopped_after(
    rounds: int, settings: Config, folder: Path, resume: bool = False
) -> SimulatedRun:
    """A run that Ctrl-C stopped as round `rounds` was told, before its commit."""

    def stop(number: int, figures: object) -> None:
        if number == rounds:
            raise KeyboardInterrupt

    run = begin(settings, folder, cpu(resume=resume))
    with pytest.raises(KeyboardInterrupt):
        conduct(run, sequential(run), stop)
    return run


@pytest.mark.parametrize("mode", ["record", "none"])
def test_a_run_by_turns_that_was_stopped_moves_both_halves(
    tiny_bert: Path, data: Path, tmp_path: Path, mode: str
) -> None:
    """Rounds 3 and 5 are B's, begun twice; round 4 A's. Without noise it ends as if undisturbed."""
    turns = ('lora.variant="rolora"', 'training.optimizer="adamw"')
    settings = config(tiny_bert, data, mode, *turns, "federation.rounds=6")
    run = stopped_after(3, settings, tmp_path / "run")
    start, before = run.public.initial.vector, run.checkpoint.load().state.vector
    spec = run.checkpoint.load().state.spec
    run.ledger.close()
    # within the phase: it ends with its best round, which may be one of B alone
    run = stopped_after(5, settings, tmp_path / "run", resume=True)
    found = run.checkpoint.load().state.vector
    run.ledger.close()
    _, summary = run_whole(settings, tmp_path / "run", resume=True)
    for half in "AB":
        mask = spec.half_mask(half)
        assert (before[mask] == start[mask]).all() and (found[mask] != start[mask]).any()
    if mode == "record":
        plain = begin(
            config(tiny_bert, data, mode, "federation.rounds=6"), tmp_path / "plain", cpu()
        )
        told = [each["noise_multiplier"] for each in summary["schedule"]]  # type: ignore[attr-defined]
        assert told == [phase.noise_multiplier for phase in plain.manifest.phases]
        assert any("by turns" in line for line in summary["privacy_statement"])  # type: ignore[attr-defined]
        plain.ledger.close()
    else:
        _, whole = run_whole(settings, tmp_path / "whole")
        assert whole["adapter_digest"] == summary["adapter_digest"]


def test_products_are_averaged_where_that_is_asked_for(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    """FlexLoRA: after a round that moves LoRA, rows of A have length 1; before, and else, not."""
    flexlora = ('aggregation.strategy="flexlora"', "training.carry_optimizer=false")
    run, summary = run_whole(config(tiny_bert, data, "none", *flexlora), tmp_path / "run")
    state = run.checkpoint.load().phases[-1].state
    lengths = [
        np.linalg.norm(value, axis=1) for name, value in state.named().items() if "lora_A" in name
    ]
    np.testing.assert_allclose(lengths, 1.0, rtol=1e-5)
    assert summary["strategy"] == run.manifest.strategy == "flexlora"


def test_a_private_run_leaves_what_the_contract_says(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    run, summary = run_whole(config(tiny_bert, data, "record"), tmp_path / "run")
    for name in [
        "task",
        "accuracy",
        "macro_f1",
        "loss",
        "epsilon",
        "epsilon_by_client",
        "delta",
        "unit",
        "schedule",
        "rounds",
        "clients",
        "seconds",
        "examples_per_second",
        "client_rounds_per_second",
        "peak_rss_bytes",
        "trainable_parameters",
        "strategy",
        "engine",
        "secure_aggregation",
        "base_digest",
        "adapter_digest",
        "confusion",
        "recall_by_class",
        "accuracy_by_client",
        "truncated",
    ]:
        assert name in summary, name
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == json.loads(
        json.dumps(summary)
    )
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["round"] for line in lines] == [1, 2, 3, 4]
    assert [line["phase"] for line in lines] == ["head", "head", "adapter", "adapter"]
    epsilons = [line["epsilon"] for line in lines]
    assert epsilons == sorted(epsilons) and epsilons[0] > 0 and epsilons[-1] <= 8.0
    base = transformers.AutoModel.from_pretrained(tiny_bert)
    peft.PeftModel.from_pretrained(base, tmp_path / "run" / "adapter")
    assert summary["epsilon"] == epsilon_of(RecordLevel(run.manifest).history(), 1e-4) <= 8.0
    said = "packed batches" in " ".join(map(str, summary["privacy_statement"]))  # type: ignore[call-overload]
    assert run.manifest.batches == "packed" and said, "a simulation packs, and says so"
    kinds = [entry.body["kind"] for entry in run.ledger.entries()]
    assert kinds.count("consent") == 1 + 3 and kinds.count("reserve") == kinds.count("commit") == 12


def test_a_run_without_privacy_repeats_itself_and_learns(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    settings = config(tiny_bert, data, "none")
    _, first = run_whole(settings, tmp_path / "a")
    _, again = run_whole(settings, tmp_path / "b")
    _, other = run_whole(replace(settings, seed=12), tmp_path / "c")
    assert first["adapter_digest"] == again["adapter_digest"] != other["adapter_digest"]
    assert first["epsilon"] is None
    lines = [
        json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()
    ]
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_a_robust_strategy_is_what_the_engine_takes(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    ends = {}
    for name in ("fedavg", "median"):
        asked = config(tiny_bert, data, "none", f'aggregation.strategy = "{name}"')
        run, _ = run_whole(asked, tmp_path / name)
        assert run.manifest.strategy == name
        ends[name] = run.checkpoint.load().release.digest
    assert ends["fedavg"] != ends["median"]


def test_a_private_run_never_repeats_itself(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    import torch

    digests = set()
    for name in ("a", "b"):
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        _, summary = run_whole(config(tiny_bert, data, "record"), tmp_path / name)
        digests.add(summary["adapter_digest"])
    assert len(digests) == 2


def test_units_of_several_records_are_accounted_as_units(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    run, summary = run_whole(
        config(tiny_bert, data, "record", "data.unit=person"), tmp_path / "run"
    )
    assert summary["unit"] == "person" and len(run.federation.units) < 20
    owners = [set(run.federation.partition.units_of(client).tolist()) for client in range(3)]
    assert sum(map(len, owners)) == len(set().union(*owners)) == len(run.federation.units)


def test_a_shared_ledger_ends_at_its_cap(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    settings, ledger = public(tiny_bert, data), tmp_path / "shared" / "ledger.sqlite"
    first = begin(settings, tmp_path / "a", cpu(ledger=ledger))
    conduct(first, sequential(first))
    spent = first.ledger.entries()
    moved = replace(settings, seed=12, federation=replace(settings.federation, clients=4))
    for name, again in (("b", settings), ("c", moved)):  # other clients hold the same records
        with pytest.raises(Refused, match="past its cap"):
            begin(again, tmp_path / name, cpu(ledger=ledger))
    assert first.ledger.entries() == spent


@pytest.mark.parametrize(
    "name", ["ledger.sqlite", "checkpoint/ledger-head.json", "checkpoint/ledger.key"]
)
def test_a_run_whose_ledger_was_deleted_does_not_go_on(
    tiny_bert: Path, data: Path, tmp_path: Path, name: str
) -> None:
    settings = config(tiny_bert, data, "record")
    run = begin(settings, tmp_path / "run", cpu())
    budget = Budget("client-0", 8.0, 1e-4)
    run.ledger.consent(budget, run.manifest.digest, Spend(1.0, 1e-5), [1])
    run.ledger.close()
    (tmp_path / "run" / name).unlink()
    with pytest.raises(Refused, match=r"deleted or moved|found no ledger"):
        begin(settings, tmp_path / "run", cpu(resume=True))


def test_a_run_goes_on_with_the_ledger_that_it_began_with(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    """Not with a fresh one, after its three files were deleted, nor with somebody else's."""
    settings, ledger = public(tiny_bert, data), tmp_path / "shared" / "ledger.sqlite"
    begin(settings, tmp_path / "run", cpu(ledger=ledger)).ledger.close()
    with pytest.raises(Refused, match="found no ledger"):
        begin(settings, tmp_path / "run", cpu(resume=True))
    Paths.of(tmp_path / "run").open_ledger().close()
    with pytest.raises(Refused, match="another ledger"):
        begin(settings, tmp_path / "run", cpu(resume=True))
    for path in ledger.parent.iterdir():
        path.unlink()
    with pytest.raises(Refused, match="found no ledger"):
        begin(settings, tmp_path / "run", cpu(ledger=ledger, resume=True))


def test_a_beginning_that_was_killed_begins_again(
    tiny_bert: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(tiny_bert, data, "record")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoint, "create", killed)
    with pytest.raises(KeyboardInterrupt):
        begin(settings, tmp_path / "run", cpu())
    monkeypatch.undo()
    begin(settings, tmp_path / "run", cpu())


def test_checkpoint_older_than_ledger(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    settings = config(tiny_bert, data, "record")
    run = begin(settings, tmp_path / "run", cpu())
    old = {
        path: path.read_bytes()
        for path in (tmp_path / "run" / "checkpoint").glob("*")
        if "ledger" not in path.name
    }
    conduct(run, sequential(run))
    for path, content in old.items():
        path.write_bytes(content)
    with pytest.raises(Refused, match="older than the ledger"):
        begin(settings, tmp_path / "run", cpu(resume=True))


def test_a_folder_is_one_run(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    settings = config(tiny_bert, data, "none")
    begin(settings, tmp_path / "run", cpu())
    with pytest.raises(BadInput, match="--resume"):
        begin(settings, tmp_path / "run", cpu())
    with pytest.raises(BadInput, match="another configuration"):
        begin(replace(settings, seed=1), tmp_path / "run", cpu(resume=True))
    with pytest.raises(BadInput, match="no run to resume"):
        begin(settings, tmp_path / "nothing", cpu(resume=True))


def test_data_changed_between_rounds(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    settings = config(tiny_bert, copy, "none")
    begin(settings, tmp_path / "run", cpu())
    with (copy / "train.jsonl").open("a") as stream:
        stream.write('{"text": "w1 w2", "label": 1, "person": "p1"}\n')
    with pytest.raises(BadInput, match="other bytes than the run began with"):
        begin(settings, tmp_path / "run", cpu(resume=True))


def test_cfg_delta_not_below_one_over_n(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"delta = 0.02: expected less than 1/\d\d = 0.01"):
        begin(config(tiny_bert, data, "record", "privacy.delta=0.02"), tmp_path / "run", cpu())


def test_a_client_that_fails_costs_the_quorum(
    tiny_bert: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedlora.client.training.local import LocalTraining

    original = LocalTraining.update

    def sometimes(self: LocalTraining, data: object, *rest: object) -> object:
        if data.owner == "client-1":  # type: ignore[attr-defined]
            raise BadInput("client-1: on fire")
        return original(self, data, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(LocalTraining, "update", sometimes)
    strict = begin(config(tiny_bert, data, "record"), tmp_path / "strict", cpu())
    with pytest.raises(Spent, match="2 of 3 asked answered"):
        conduct(strict, sequential(strict))
    spent = strict.ledger.entries()
    # all attempts
    assert sum(e.body["kind"] == "reserve" and e.body["budget"] == "client-1" for e in spent) == 4
    lenient = begin(
        config(tiny_bert, data, "record", "federation.quorum=0.6"), tmp_path / "lenient", cpu()
    )
    assert conduct(lenient, sequential(lenient)).round == 4


# --- killed at random moments ---------------------------------------------------------------------


def start(settings: Config, folder: Path, resume: bool) -> subprocess.Popen[bytes]:
    """The run as a process of its own, as the command line starts it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder.with_suffix(".toml")
    path.write_text(config_to_toml(settings))
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        "from fedlora.simulations.cli import main; main()",
        "run",
        str(path),
    ]
    command += ["--out", str(folder), "--threads", "1", *(["--resume"] if resume else [])]
    return subprocess.Popen(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE
    )


def kill_until_done(settings: Config, folder: Path, delays: Sequence[float]) -> int:
    """Start, kill -9 after each delay from the first sign of life, let it end; the exit code."""
    for delay in delays:
        begun = (folder / "checkpoint" / "manifest.json").exists()
        process = start(settings, folder, begun)
        log = folder / "checkpoint" / "attempts.json"
        before = log.stat().st_mtime_ns if log.exists() else 0
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if log.exists() and log.stat().st_mtime_ns != before:
                break
            time.sleep(0.002)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if (folder / "summary.json").exists():
            return 0
    process = start(settings, folder, (folder / "checkpoint" / "manifest.json").exists())
    _, text = process.communicate(timeout=300)
    assert b"Traceback" not in text, text.decode()
    return process.returncode


def check_ledger(settings: Config, folder: Path) -> None:
    """Every begun attempt that any node reserved is in the ledger, and the cap holds."""
    ledger = Paths.of(folder).open_ledger()
    manifest = RunManifest.from_bytes((folder / "checkpoint" / "manifest.json").read_bytes())
    for client in range(3):
        assert ledger.spent(f"client-{client}").epsilon <= settings.privacy.epsilon
    reserves = [e.body for e in ledger.entries() if e.body["kind"] == "reserve"]
    assert len({(r["budget"], r["attempt"]) for r in reserves}) == len(reserves)
    for index, phase in enumerate(manifest.phases):
        for client in range(3):
            used = [
                r for r in reserves if r["budget"] == f"client-{client}" and r["phase"] == index
            ]
            assert len(used) <= phase.attempts
    ledger.close()


def chaos(settings: Config, folder: Path, kills: int, seed: int) -> int:
    delays = np.random.default_rng(seed).uniform(0, 0.25, kills)
    return kill_until_done(settings, folder, [float(delay) for delay in delays])


def adapter_digest(folder: Path) -> str:
    return str(json.loads((folder / "summary.json").read_text())["adapter_digest"])


def slow(settings: Config) -> Config:
    """Enough rounds that a kill falls into the middle of them."""
    return replace(
        settings,
        federation=replace(settings.federation, rounds=14, spare_rounds=6),
        training=replace(settings.training, optimizer="adamw"),
    )


def test_killed_and_resumed_it_ends_with_the_bits_of_an_undisturbed_run(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    settings = slow(config(tiny_bert, data, "none"))
    assert chaos(settings, tmp_path / "undisturbed", 0, seed=1) == 0
    assert chaos(settings, tmp_path / "killed", 2, seed=1) == 0
    assert adapter_digest(tmp_path / "killed") == adapter_digest(tmp_path / "undisturbed")
    lines = (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()
    rounds = [json.loads(line)["round"] for line in lines]
    assert rounds == sorted(set(rounds))


def test_killed_with_noise_the_ledger_never_shows_less_than_was_spent(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    settings = slow(config(tiny_bert, data, "record"))
    assert chaos(settings, tmp_path / "run", 1, seed=2) in (0, 3)
    check_ledger(settings, tmp_path / "run")


@pytest.mark.chaos
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("mode", ["none", "record"])
def test_chaos(tiny_bert: Path, data: Path, tmp_path: Path, seed: int, mode: str) -> None:
    settings = slow(config(tiny_bert, data, mode))
    assert chaos(settings, tmp_path / "run", 2, seed) in ((0,) if mode == "none" else (0, 3))
    if mode == "record":
        check_ledger(settings, tmp_path / "run")
        return
    assert chaos(settings, tmp_path / "undisturbed", 0, seed) == 0
    assert adapter_digest(tmp_path / "run") == adapter_digest(tmp_path / "undisturbed")
