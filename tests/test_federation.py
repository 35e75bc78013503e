"""A federation of real processes: TLS, authentication, SuperLink, three trainers; and kills."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from transformers import AutoModel

from fedlora.client.node.folder import NodeFolder
from fedlora.common.adapter.peft import load_adapter
from fedlora.common.protocol.messages import Started, reply_from_bytes
from fedlora.server.coordinator.folder import Directory
from fedlora.simulations.local.deployment import Federation, running
from fedlora.simulations.local.folders import NAMES
from fedlora.simulations.local.processes import listens, run, wait_until
from fedlora.simulations.local.whole_run import conclude
from tests.isolation import ALONE, NOBODY, NOT_SHOWN, as_nobody, available, public_folder
from tests.proxy import Line

ADDRESS = re.compile(r'(?:inet_addr|inet_pton)\((?:AF_INET6, )?"([^"]+)"')  # as strace writes one
SECONDS = 600.0  # for a whole run on a loaded machine: twice 240 were not enough there
TRACE = ("strace", "-f", "--seccomp-bpf", "-qq", "-e", "trace=connect,sendto,sendmsg,sendmmsg")


def lines(federation: Federation) -> list[dict[str, Any]]:
    path = federation.last_run() / "metrics.jsonl"
    found = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in found if line.endswith("}")]


def wait_for_round(federation: Federation, number: int) -> None:
    """Until the round is committed; an early end of the server fails at once, with every log."""

    def committed() -> bool:
        assert federation.processes["server"].poll() is None or len(lines(federation)) >= number, (
            logs(federation)
        )
        return len(lines(federation)) >= number

    wait_until(committed, f"round {number}", SECONDS)


def logs(federation: Federation) -> str:
    return "\n".join(
        path.read_text(errors="replace")[-2_000:] for path in (federation.root / "logs").iterdir()
    )


def check_ledgers(federation: Federation) -> None:
    """Every update that counted was reserved before; each node stated what its ledger holds."""
    folder = federation.last_run()
    members = Directory.open(federation.coordinator).registry.active()
    for name in federation.names:
        node = NodeFolder(federation.node(name))
        ledger = node.open_ledger(node.load_policy())
        counted = [
            line["attempt"] for line in lines(federation) if name not in dict(line["failures"])
        ]
        reserved = {
            entry.body["attempt"] for entry in ledger.entries() if entry.body["kind"] == "reserve"
        }
        assert reserved >= set(counted), (name, reserved, counted)
        reply = reply_from_bytes(
            (folder / "consents" / f"{name}.started").read_bytes(), "demo", members
        )
        assert isinstance(reply, Started) and ledger.spent("messages").epsilon == reply.epsilon
        ledger.close()


@pytest.mark.flower
def test_killed_in_the_middle_it_goes_on_and_its_export_verifies(
    tiny_bert: Path, tmp_path: Path
) -> None:
    """With noise of their own and with shared noise, two federations at once: either mostly waits
    until Flower has noticed that a SuperNode is gone.
    """
    with ThreadPoolExecutor() as pool:
        runs = [
            pool.submit(_killed_in_the_middle, tiny_bert, tmp_path / short, noise)
            for short, noise in (("o", "own"), ("s", "shared"))  # a socket's path has 100 bytes
        ]
    for run_of_one in runs:
        run_of_one.result()


def _killed_in_the_middle(base: Path, folder: Path, noise: str) -> None:
    """A process of each institution and the coordinator with its SuperLink are killed at once.

    A new Flower run goes on. Updates leave under masks: with three institutions no drop-out is
    borne, so a killed one costs an attempt.
    """
    federation = Federation(
        folder,
        rounds=2,
        spare=9,
        base=str(base),
        layers="[]",
        deadline=90.0,
        secure=True,
        noise=noise,
    )
    federation.prepare()
    with running(federation):
        wait_for_round(federation, 1)
        for victim, name in (
            ("trainer", "bank"),
            ("link", "hospital"),
            ("SuperNode", "university"),
        ):
            _kill(federation, victim, name)
        _kill(federation, "server", "")
        committed = len(lines(federation))
        federation.start_server(resume=True)
        wait_until(lambda: listens(federation.port), "SuperLink", SECONDS)
        code = federation.wait(SECONDS)
        assert code == 0, logs(federation)
        assert not listens(federation.port)  # nor is what the killed one had started left
    assert [line["round"] for line in lines(federation)] == [1, 2] and committed >= 1
    check_ledgers(federation)
    conclude(federation)
    labels = load_adapter(federation.root / "export" / "adapter", str(base)).predict(
        ["my laptop is broken"]
    )
    assert len(labels) == 1
    model = federation.root / "model"
    words = ("--dir", str(federation.coordinator), "--merge", str(model), "--base", str(base))
    run("fedlora-server", "export", str(federation.root / "again"), *words)
    assert AutoModel.from_pretrained(model).config.model_type == "bert"


def traced() -> bool:
    """Whether system calls can be recorded here."""
    words = ["strace", "-f", "--seccomp-bpf", "-e", "trace=connect", "true"]
    return (
        bool(shutil.which("strace"))
        and subprocess.run(words, capture_output=True, check=False).returncode == 0
    )


class Apart(Federation):
    """Each trainer in a network namespace with nothing in it.

    Each relay under another user, in a folder of its own.
    """

    def relay(self, name: str) -> Path:
        return self.root / "relays" / name

    def door(self, name: str) -> Path:
        return self.root / "doors" / name / "s"

    def separate(self) -> None:
        """What an operator does after enrolment.

        The relay's folder to its user, and a socket that it may use.
        """
        for name in self.names:
            self.relay(name).parent.mkdir(exist_ok=True)
            shutil.copytree(self.node(name) / "relay", self.relay(name))
            for path in (self.relay(name), *self.relay(name).rglob("*")):
                os.chown(path, NOBODY, NOBODY)
            self.door(name).parent.mkdir(parents=True)
            os.chown(self.door(name).parent, 0, NOBODY)
            self.door(name).parent.chmod(0o2750)
            policy = self.node(name) / "node.toml"
            listen = f'[trainer]\nlisten = "unix:{self.door(name)}"\ngroup_may_ask = true'
            policy.write_text(policy.read_text().replace("[trainer]", listen))


@pytest.mark.flower
def test_trainers_have_no_network_relays_cannot_read_and_nothing_calls_out(tiny_bert: Path) -> None:
    """One run, whose calls the kernel records: trainers in no network, relays as another user.

    Every connection that it attempts stays on the machine. Another user's processes need a folder
    that everybody may pass.
    """
    apart, recorded = available(), traced()
    with public_folder() as place, public_folder() as scratch:
        calls = place / "calls"
        calls.mkdir()
        federation = Apart(place / "f", rounds=1, base=str(tiny_bert), layers="[]")

        def prefix(process: str) -> list[str]:
            words = [*TRACE, "-o", str(calls / process)] if recorded else []
            kind, _, name = process.partition("-")
            if apart and kind == "trainer":
                words += ALONE
            if apart and kind == "relay":
                words += [*as_nobody(scratch), "env", f"HOME={federation.relay(name)}"]
            return words

        federation.prefix = prefix
        federation.prepare()
        federation.separate()
        with running(federation):
            assert federation.wait(SECONDS) == 0, logs(federation)
        assert len(lines(federation)) == 1 and lines(federation)[0]["replies"] == 3
        check_ledgers(federation)
        if apart:
            _nobody_reads(federation, scratch)
        if recorded:
            _nothing_called_out(calls)
    if not apart:
        pytest.skip(NOT_SHOWN)
    if not recorded:
        pytest.skip("system calls can't be recorded here: that nothing calls out was not shown")


def _nobody_reads(federation: Federation, scratch: Path) -> None:
    for name in NAMES:
        for file in ("data/messages.jsonl", "identity.pem", "ledger.sqlite"):
            path = federation.node(name) / file
            words = [*as_nobody(scratch), "cat", str(path)]
            read = subprocess.run(words, capture_output=True, text=True, check=False)
            assert path.is_file() and "Permission denied" in read.stderr and not read.stdout, path


def _nothing_called_out(calls: Path) -> None:
    files = list(calls.iterdir())
    found = [line for path in files for line in path.read_text(errors="replace").splitlines()]
    addresses = Counter(address for line in found for address in ADDRESS.findall(line))
    assert len(files) == 7 and addresses["127.0.0.1"] >= 10, addresses
    assert set(addresses) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}, addresses


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
    """60 s without three of six: commits with the quorum; 60 s without four: aborts.

    Each within deadline + 5 s.
    """
    deadline = 30.0
    names = (*NAMES, *(f"{name}-2" for name in NAMES))
    federation = Federation(
        tmp_path / "f",
        rounds=40,
        spare=60,
        quorum=0.5,
        deadline=deadline,
        base=str(tiny_bert),
        layers="[]",
        names=names,
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
                f"{2 + len(lost)} of 6 away for 60 s:",
                [(round(seconds, 1), how) for seconds, how in ended],
            )
            mended = time.monotonic()
            wait_for_round(federation, len(lines(federation)) + 1)
            print(f"  next round {time.monotonic() - mended:.1f} s after the line was mended")
            # the first may have had its answers
            assert {how for _, how in ended[1:] or ended} == {outcome}, ended
            assert max(seconds for seconds, _ in ended) <= deadline + 5, ended
            wait_for_round(federation, len(lines(federation)) + 2)
    half.close()
    one.close()
    check_ledgers(federation)


VICTIMS = ("trainer", "link", "SuperNode", "server", "SuperLink", "executor", "server app")
PROGRAMS = {  # words of a command line, of whose process it is
    "SuperNode": "flower-supernode",
    "SuperLink": "flower-superlink",
    "executor": "flower-superexec",
    "server app": "flwr-serverapp",
}


@dataclass(frozen=True)
class Kill:
    """One kill of several at a time, and how long after it the next round was committed."""

    victim: str
    together: int
    seconds: float


@pytest.fixture(scope="session")
def kills(request: pytest.FixtureRequest) -> Iterator[list[Kill]]:
    """Of all runs; printed when all are done."""
    found: list[Kill] = []
    yield found
    if found:
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print(f"\n{len(found)} kills {dict(Counter(kill.victim for kill in found))}")
            for size in (0, *BURSTS):
                times = sorted(kill.seconds for kill in found if size in (0, kill.together))
                ranks = [times[min(len(times) - 1, len(times) * part // 100)] for part in (50, 95)]
                print(
                    f"{f'{size} together' if size else 'all'}: p50 {ranks[0]:.1f} s, p95"
                    f" {ranks[1]:.1f} s"
                )


def _kill(federation: Federation, victim: str, name: str) -> bool:
    """One process, or the command that an operator started.

    A trainer and a link are started again, as systemd would. False: there is none just now.
    """
    if victim in ("trainer", "link"):
        federation.kill(f"{'relay' if victim == 'link' else victim} {name}")
        (federation.start_trainer if victim == "trainer" else federation.start_relay)(name)
        return True
    if victim == "server":
        there = "server" in federation.processes
        federation.kill("server")
        federation.kill_superlink()
        return there
    parent = federation.processes.get(f"relay {name}" if victim == "SuperNode" else "server")
    there = False
    with suppress(psutil.Error):
        for process in psutil.Process(parent.pid).children(recursive=True) if parent else ():
            if any(PROGRAMS[victim] in word for word in process.cmdline()):
                process.kill()
                there = True
    return there


def _moved(federation: Federation, before: int) -> bool:
    """Whether a round was committed since.

    A server that ended with the work undone is started again, by `resume`.
    """
    server = federation.processes.get("server")
    if server is None or server.poll() not in (None, 0, 3):
        federation.kill("server")
        federation.kill_superlink()
        federation.start_server(resume=True)
        return False
    return len(lines(federation)) > before or server.poll() is not None


def _releases(federation: Federation) -> dict[Path, bytes]:
    """Every release that a node keeps, as it lies there."""
    paths = (path for name in NAMES for path in (federation.node(name) / "outbox").glob("*/*"))
    return {
        path: path.read_bytes()
        for path in paths
        if path.suffix in (".reply", ".started", ".masked")
    }


BURSTS = (1, 2, 3, 4, 5)


def _burst(federation: Federation, source: random.Random, size: int) -> list[tuple[str, float]]:
    """`size` kills within seconds of each other: what was killed, and when."""
    done: list[tuple[str, float]] = []
    while len(done) < size:
        victim = source.choice(VICTIMS)
        if _kill(federation, victim, source.choice(NAMES)):
            done.append((victim, time.monotonic()))
        time.sleep(source.uniform(0, 2))
    return done


@pytest.mark.chaos
@pytest.mark.flower
@pytest.mark.parametrize("seed", range(7))
def test_chaos(tiny_bert: Path, tmp_path: Path, seed: int, kills: list[Kill]) -> None:
    """Fifteen kills a run, at random moments, of any process, up to five at a time.

    Every second run under masks.
    """
    source = random.Random(seed)
    federation = Federation(
        tmp_path / "f",
        rounds=16,
        spare=100,
        base=str(tiny_bert),
        layers="[]",
        deadline=120.0 if seed % 2 else 60.0,
        secure=seed % 2 == 1,
    )
    federation.prepare()
    released: dict[Path, bytes] = {}
    with running(federation):
        wait_for_round(federation, 1)
        for size in source.sample(BURSTS, len(BURSTS)):
            time.sleep(source.uniform(0.5, 12))
            if len(lines(federation)) >= federation.rounds - 2:
                break  # what is left is too little for another burst
            committed = lines(federation)
            killed = _burst(federation, source, size)
            before = len(lines(federation))
            wait_until(partial(_moved, federation, before), f"a round after {killed}", 2 * SECONDS)
            kills += [Kill(victim, size, time.monotonic() - at) for victim, at in killed]
            assert lines(federation)[: len(committed)] == committed, "a committed round was lost"
            now = _releases(federation)
            assert all(now.get(path) == data for path, data in released.items()), (
                "other bytes for one attempt"
            )
            released = now
        wait_until(
            lambda: federation.processes["server"].poll() is not None or _moved(federation, 99),
            "the end",
            600,
        )
        assert federation.processes["server"].poll() in (0, 3), logs(federation)
    check_ledgers(federation)
