"""A federation of real processes: TLS, node authentication, SuperLink, SuperNodes, three trainers; and kills."""

from __future__ import annotations

import hashlib
import json
import random
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fedlora.client.node import NodeFolder
from fedlora.common.export import load_adapter
from fedlora.common.identity import Signed
from fedlora.common.protocol import Consent, reply_from_bytes
from fedlora.server.directory import Directory
from fedlora.simulations.deployment import NAMES, Federation, conclude, listens, running, wait_until
from tests.proxy import Line
from tests.recoveries import record

SECONDS = 240.0  # for a whole run on a loaded machine
VICTIMS = ("trainer", "relay", "supernode", "server", "server app", "superlink")


def lines(federation: Federation) -> list[dict[str, Any]]:
    path = federation.last_run() / "metrics.jsonl"
    found = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in found if line.endswith("}")]


def wait_for_round(federation: Federation, number: int) -> None:
    """Until the round is committed; an early end of the server fails at once, with every log."""

    def committed() -> bool:
        assert federation.processes["server"].poll() is None or len(lines(federation)) >= number, logs(
            federation
        )
        return len(lines(federation)) >= number

    wait_until(committed, f"round {number}", SECONDS)


def logs(federation: Federation) -> str:
    return "\n".join(
        path.read_text(errors="replace")[-2_000:] for path in (federation.root / "logs").iterdir()
    )


def check_ledgers(federation: Federation) -> None:
    """Every update that counted was reserved before; what each node stated is what its ledger holds."""
    folder = federation.last_run()
    members = Directory.open(federation.coordinator).registry.active()
    for name in federation.names:
        node = NodeFolder(federation.node(name))
        ledger = node.open_ledger(node.load_policy())
        counted = [line["attempt"] for line in lines(federation) if name not in dict(line["failures"])]
        reserved = {entry.body["attempt"] for entry in ledger.entries() if entry.body["kind"] == "reserve"}
        assert reserved >= set(counted), (name, reserved, counted)
        reply = reply_from_bytes((folder / "consents" / f"{name}.reply").read_bytes(), "demo", members)
        assert isinstance(reply, Consent) and ledger.spent("messages").epsilon == reply.epsilon
        ledger.close()


@pytest.mark.flower
def test_killed_in_the_middle_it_goes_on_and_its_export_verifies(tiny_bert: Path, tmp_path: Path) -> None:
    """A trainer and then the coordinator with its SuperLink are killed; the run is resumed in a new Flower run."""
    federation = Federation(
        tmp_path / "f", rounds=3, spare=9, base=str(tiny_bert), layers="[]", deadline=60.0
    )
    federation.prepare()
    with running(federation):
        wait_for_round(federation, 1)
        federation.kill("trainer bank")
        federation.start_trainer("bank")
        wait_for_round(federation, 2)
        federation.kill("server")
        federation.kill_superlink()
        committed = len(lines(federation))
        federation.start_server(resume=True)
        wait_until(lambda: listens(federation.port), "SuperLink", SECONDS)
        code = federation.wait(SECONDS)
        assert code == 0, logs(federation)
    assert [line["round"] for line in lines(federation)] == [1, 2, 3] and committed >= 2
    check_ledgers(federation)
    conclude(federation)
    labels = load_adapter(federation.root / "export" / "adapter").predict(["my laptop is broken"])
    assert len(labels) == 1


def attempts_begun(federation: Federation) -> int:
    path = federation.last_run() / "checkpoint" / "attempts.json"
    return int(json.loads(json.loads(path.read_text())["body"])["total"]) if path.exists() else 0


def follow(federation: Federation, until: float) -> list[tuple[float, str]]:
    """(seconds, how it ended) of each attempt that ends, until `until` on the clock."""
    ended: list[tuple[float, str]] = []
    begun, rounds = attempts_begun(federation), len(lines(federation))
    last = lines(federation)[-1]["attempt"] if rounds else 0
    started = time.monotonic() if begun > last else None  # of the attempt that is under way
    while time.monotonic() < until:
        assert federation.processes["server"].poll() is None, logs(federation)
        if len(lines(federation)) > rounds and started is not None:
            rounds = len(lines(federation))
            ended.append((time.monotonic() - started, "committed"))
            started = None
        if attempts_begun(federation) > begun:
            begun = attempts_begun(federation)
            if started is not None:
                ended.append((time.monotonic() - started, "aborted"))
            started = time.monotonic()
        time.sleep(0.05)
    return ended


@pytest.mark.chaos
@pytest.mark.flower
def test_partition(tiny_bert: Path, tmp_path: Path) -> None:
    """60 s without three of six: commits with the quorum; 60 s without four: aborts. Each within deadline + 5 s."""
    deadline = 20.0
    names = (*NAMES, *(f"{name}-2" for name in NAMES))
    federation = Federation(
        tmp_path / "f", 40, 60, 0.5, deadline, base=str(tiny_bert), layers="[]", names=names
    )
    federation.prepare()
    half, one = Line(federation.port), Line(federation.port)
    for name, line in zip(names[:4], (half, half, half, one), strict=True):
        link = {"superlink": f"127.0.0.1:{line.port}"}
        (federation.node(name) / "relay" / "link.json").write_text(json.dumps(link))
    with running(federation):
        wait_for_round(federation, 1)
        for lost, outcome in (((half,), "committed"), ((half, one), "aborted")):
            for line in lost:
                line.cut()
            ended = follow(federation, time.monotonic() + 60)
            for line in lost:
                line.mend()
            print(
                f"{2 + len(lost)} of 6 away for 60 s:", [(round(seconds, 1), how) for seconds, how in ended]
            )
            mended = time.monotonic()
            wait_for_round(federation, len(lines(federation)) + 1)
            print(f"  next round {time.monotonic() - mended:.1f} s after the line was mended")
            assert {how for _, how in ended[1:]} == {outcome}, ended  # the first may have had its answers
            assert max(seconds for seconds, _ in ended) <= deadline + 5, ended
            wait_for_round(federation, len(lines(federation)) + 2)
    half.close()
    one.close()
    check_ledgers(federation)


def _moved(federation: Federation, before: int) -> bool:
    return len(lines(federation)) > before or federation.processes["server"].poll() is not None


def strike(federation: Federation, victim: str, name: str) -> None:
    """SIGKILL, and a start anew of what nobody else starts anew."""
    before = len(lines(federation))
    if victim == "trainer":
        federation.kill(f"trainer {name}")
        federation.start_trainer(name)
    elif victim == "relay":
        federation.kill(f"relay {name}")
        federation.start_relay(name)
    elif victim == "supernode":
        federation.kill_supernode(name)  # its relay starts another one
    else:
        if victim == "server":
            federation.kill("server")
        if victim == "server app":
            federation.kill_server_app()
        else:
            federation.kill_superlink()
        if "server" in federation.processes and federation.wait(SECONDS) in (0, 3):
            return  # it had ended before
        assert len(lines(federation)) >= before  # no round is lost after its commit
        federation.start_server(resume=True)


def releases(federation: Federation) -> dict[str, str]:
    """By file: the digest of what each institution released, and of the plans that it was asked with."""
    folders = [federation.node(name) / "outbox" for name in federation.names]
    folders.append(federation.last_run() / "outbox")
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for folder in folders
        for path in folder.rglob("[!.]*")
        if path.is_file()
    }


def check_releases(federation: Federation, earlier: list[dict[str, str]]) -> None:
    """0 different bytes for one attempt: nothing changed once it was there, and both sides hold the same."""
    now = releases(federation)
    assert all(now[path] == digest for each in earlier for path, digest in each.items())
    folder = federation.last_run()
    for name in federation.names:
        (node,) = NodeFolder(federation.node(name)).runs.iterdir()
        for path in node.glob("plans/*.plan"):
            signed = Signed.from_bytes(
                (folder / "outbox" / f"plan-{int(path.stem)}.signed").read_bytes(), "plan"
            )
            assert signed.body == path.read_bytes(), (name, path.name)
        (consent,) = federation.node(name).glob("outbox/*/000000-000000.reply")
        assert consent.read_bytes()[64:] == (folder / "consents" / f"{name}.reply").read_bytes()


@pytest.mark.chaos
@pytest.mark.flower
@pytest.mark.parametrize("seed", range(20))
def test_chaos(tiny_bert: Path, tmp_path: Path, seed: int) -> None:
    """Five kills a run, at random moments, of any process; a sixth of them each."""
    source = random.Random(seed)
    federation = Federation(
        tmp_path / "f", rounds=30, spare=60, base=str(tiny_bert), layers="[]", deadline=60.0
    )
    federation.prepare()
    kills: list[tuple[str, float]] = []
    seen: list[dict[str, str]] = []
    with running(federation):
        for _ in range(5):
            time.sleep(source.uniform(0.5, 12))
            if federation.processes["server"].poll() is not None:
                break
            before, started = len(lines(federation)), time.monotonic()
            victim, name = source.choice(VICTIMS), source.choice(NAMES)
            seen.append(releases(federation))
            strike(federation, victim, name)
            wait_until(partial(_moved, federation, before), "the next round", SECONDS)
            kills.append((victim, time.monotonic() - started))
        code = federation.wait(2 * SECONDS)
        assert code in (0, 3), logs(federation)
    check_ledgers(federation)
    check_releases(federation, seen)
    record(seed, code, kills)
    print(f"seed {seed}: code {code}, {[(victim, round(took, 1)) for victim, took in kills]}")
