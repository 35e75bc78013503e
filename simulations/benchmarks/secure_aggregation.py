"""What secure aggregation costs node and coordinator: the whole protocol, signed and sealed.

Each case runs in a fresh process, the coordinator's; the institutions live in a second one, so that
the memory of one is not taken for the other's. CPU time is counted around the state machines'
steps, not around the pipe. Beside it, in the same run, the primitives of Flower's SecAgg+ (mask
expansion, key agreement, shares, sealing), each measured by itself and multiplied by how often a
complete graph needs it.

    python simulations/benchmarks/secure_aggregation.py [--json FILE] [--quick]
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import time
from collections.abc import Callable
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from rich.console import Console
from rich.table import Table

from fedlora.client.node.outbox import MemoryOutbox
from fedlora.client.secagg.node import SecureNode
from fedlora.common.secagg.cohort import CohortPolicy, threshold
from fedlora.common.secagg.ring import Encoding
from fedlora.common.secagg.wire import Epoch, Slot
from fedlora.common.trust.enrolment import Peer
from fedlora.common.trust.identity import Identity, PublicIdentity
from fedlora.server.runs.summary import peak_rss_bytes
from fedlora.server.secagg.attempt import ServerAttempt
from fedlora.server.secagg.epoch import ServerEpoch
from fedlora.simulations.benchmarks.fresh_process import in_a_fresh_process

CASES = ((100, 1_000_000, 30), (100, 1_000_000, 0), (10, 10_000_000, 3), (10, 1_000_000, 3))
QUICK = ((10, 100_000, 3),)
EPOCH = Epoch("benchmark", "sha256:benchmark", 1, 1, 1)
SLOT = Slot(1, 1, "sha256:adapter", "sha256:base")
LEVELS = 1 << 22
T = TypeVar("T")


def main() -> None:
    """Each case in a process of its own, or with --only one, here."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="one small case")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(measure(*(int(each) for each in arguments.only.split(",")))))
        return
    figures = [
        in_a_fresh_process(__file__, "--only", ",".join(map(str, case)), OMP_NUM_THREADS="1")
        for case in (QUICK if arguments.quick else CASES)
    ]
    _print(figures)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def measure(nodes: int, parameters: int, dropouts: int) -> dict[str, Any]:
    """One epoch of one attempt; `dropouts` institutions deal shares and send no input."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=institutions, args=(theirs, nodes, parameters))
    child.start()
    keys = json.loads(ours.recv_bytes())
    server = _Coordinator(
        ours, {name: PublicIdentity(bytes.fromhex(key)) for name, key in keys.items()}
    )
    gc.collect()
    before = peak_rss_bytes()
    levels = server.run(Encoding.fitting(parameters, 1.0, LEVELS, nodes), dropouts)
    memory = peak_rss_bytes() - before
    ours.send_bytes(b"done")
    told = json.loads(ours.recv_bytes())
    exact = bool((np.frombuffer(ours.recv_bytes(), np.int64) == levels).all())
    child.join()
    plain = 4 * parameters
    return {
        "nodes": nodes,
        "parameters": parameters,
        "dropouts": dropouts,
        "node_cpu_seconds": told["cpu"],
        "node_cpu_seconds_most": told["most"],
        "server_cpu_seconds": server.cpu,
        "server_rss_bytes": memory,
        "exact": exact,
        "sent_to_plain": told["sent"] / plain,
        "received_to_plain": told["received"] / plain,
        "flower_secagg_plus": flower(nodes, parameters, dropouts),
    }


class _Coordinator:
    """Routes between the state machine and the pipe, and counts what the state machine uses."""

    def __init__(self, pipe: Connection, identities: dict[str, PublicIdentity]) -> None:
        self._pipe, self._identities, self.cpu = pipe, identities, 0.0

    def run(self, encoding: Encoding, dropouts: int) -> np.ndarray[Any, Any]:
        names = sorted(self._identities)
        epoch = self._counted(lambda: ServerEpoch(EPOCH, self._identities, 3))
        for name in names:
            self._counted(epoch.add_offer, self._ask(name, "offer", b""))
        members = self._counted(epoch.close_offers)
        for name in names:
            self._counted(epoch.add_deal, self._ask(name, "deal", members))
        listed = self._counted(epoch.close_deals)
        for name in names:
            self._ask(name, "accept", self._counted(epoch.delivery, name))
        attempt = self._counted(lambda: ServerAttempt(listed, SLOT, encoding))
        here = names[dropouts:]
        for name in here:
            self._counted(attempt.add_input, self._ask(name, "mask", b""))
        survivors = self._counted(attempt.close_inputs)
        for name in here:
            self._counted(attempt.add_confirmation, self._ask(name, "confirm", survivors))
        agreement = self._counted(attempt.agreement)
        for name in here:
            self._counted(attempt.add_opening, self._ask(name, "open", agreement))
        return self._counted(attempt.result).levels

    def _counted(self, step: Callable[..., T], *given: Any) -> T:
        before = time.process_time()
        result = step(*given)
        self.cpu += time.process_time() - before
        return result

    def _ask(self, name: str, stage: str, message: bytes) -> bytes:
        self._pipe.send_bytes(f"{name} {stage}".encode())
        self._pipe.send_bytes(message)
        return self._pipe.recv_bytes()


class _Institutions:
    """Every institution, one request at a time, and what each used, sent and received."""

    def __init__(self, nodes: int, parameters: int) -> None:
        names = [f"node-{number:04d}" for number in range(nodes)]
        keys = {name: Identity.generate() for name in names}
        peers = {name: Peer(name, name, key.public) for name, key in keys.items()}
        self.public = {name: key.public.key.hex() for name, key in keys.items()}
        self.encoding = Encoding.fitting(parameters, 1.0, LEVELS, nodes)
        self.cpu, self.sent, self.received = (dict.fromkeys(names, 0.0) for _ in range(3))
        self.total = np.zeros(parameters, dtype=np.int64)
        self._members = {
            name: SecureNode(
                keys[name],
                CohortPolicy(name, peers, 3),
                EPOCH.federation,
                EPOCH.run,
                MemoryOutbox(),
            )
            for name in names
        }

    def answer(self, name: str, stage: str, message: bytes) -> bytes:
        """What `name` sends back; a masked update counts into `total`."""
        update = None
        if stage == "mask":
            source = np.random.default_rng(int(name[5:]))
            update = source.uniform(-1, 1, len(self.total))
        before = time.process_time()
        answer = _answer(self._members[name], stage, message, self.encoding, update)
        self.cpu[name] += time.process_time() - before
        self.sent[name] += len(answer)
        self.received[name] += len(message)
        if update is not None:
            self.total += self.encoding.encode(update)
        return answer

    def told(self) -> dict[str, float]:
        """CPU seconds of those that did not drop out, and the most that anybody sent or got."""
        whole = [name for name, sent in self.sent.items() if sent > len(self.total)]
        return {
            "cpu": float(np.mean([self.cpu[name] for name in whole])),
            "most": max(self.cpu.values()),
            "sent": max(self.sent.values()),
            "received": max(self.received.values()),
        }


def institutions(pipe: Connection, nodes: int, parameters: int) -> None:
    """The second process: answers what is asked, until it is told that all is done."""
    all_of_them = _Institutions(nodes, parameters)
    pipe.send_bytes(json.dumps(all_of_them.public).encode())
    while (asked := pipe.recv_bytes().decode()) != "done":
        name, stage = asked.split()
        pipe.send_bytes(all_of_them.answer(name, stage, pipe.recv_bytes()))
    pipe.send_bytes(json.dumps(all_of_them.told()).encode())
    pipe.send_bytes(all_of_them.total.tobytes())


def _answer(
    node: SecureNode,
    stage: str,
    message: bytes,
    encoding: Encoding,
    update: np.ndarray[Any, Any] | None,
) -> bytes:
    if stage == "offer":
        return node.offer(EPOCH)
    if stage == "deal":
        return node.deal(message)
    if stage == "accept":
        node.accept(message)
        return b"-"
    if stage == "confirm":
        return node.confirm(1, message)
    if stage == "open":
        return node.open(1, message)
    if update is None:
        raise ValueError(f"unknown stage {stage}")
    return node.mask(SLOT, encoding, encoding.encode(update))


def flower(nodes: int, parameters: int, dropouts: int) -> dict[str, float] | None:
    """CPU seconds of Flower's SecAgg+ primitives for the same round on a complete graph.

    None where they don't run. No signatures, no key authentication, no consistency round: less work
    for less protection.
    """
    try:
        utils = import_module("flwr.common.secure_aggregation.secaggplus_utils")
        sharing = import_module("flwr.common.secure_aggregation.crypto.shamir")
        sealing = import_module("flwr.common.secure_aggregation.crypto.symmetric_encryption")
        rounding = import_module("flwr.common.secure_aggregation.quantization")
        curves = import_module("cryptography.hazmat.primitives.asymmetric.ec")
    except ImportError:
        return None
    t, stayed = threshold(nodes), nodes - dropouts
    private = [curves.generate_private_key(curves.SECP384R1()) for _ in range(2)]
    key = sealing.generate_shared_key(private[0], private[1].public_key())
    update = [np.random.default_rng(0).uniform(-1, 1, parameters)]
    shares = sharing.create_shares(bytes(range(32)), t, nodes)
    expand = _each(lambda: utils.pseudo_rand_gen(key, 1 << 24, [(parameters,)]), 3)
    agree = _each(lambda: sealing.generate_shared_key(private[0], private[1].public_key()), 20)
    share = _each(lambda: sharing.create_shares(bytes(range(32)), t, nodes), 3)
    seal = _each(lambda: sealing.decrypt(key, sealing.encrypt(key, bytes(200))), 20)
    quantize = _each(lambda: rounding.quantize(update, 1.0, 1 << 22), 2)
    combine = _each(lambda: sharing.combine_shares(shares[:t]), 2)
    return {
        "node_cpu_seconds": (
            quantize + nodes * expand + 2 * share + (nodes - 1) * (2 * agree + seal)
        ),
        "server_cpu_seconds": (
            nodes * combine + (stayed + dropouts * stayed) * expand + dropouts * stayed * agree
        ),
        "seconds_a_mask": expand,
    }


def _each(step: Callable[[], object], times: int) -> float:
    before = time.process_time()
    for _ in range(times):
        step()
    return (time.process_time() - before) / times


def _print(figures: list[dict[str, Any]]) -> None:
    table = Table(
        "nodes", "parameters", "drop-outs", "node s", "server s", "server MB", "exact", "sent",
        "received", "SecAgg+ node s", "SecAgg+ server s", box=None,
    )  # fmt: skip
    for row in figures:
        theirs = row["flower_secagg_plus"] or {}
        table.add_row(
            str(row["nodes"]),
            f"{row['parameters']:,}",
            str(row["dropouts"]),
            f"{row['node_cpu_seconds']:.3f}",
            f"{row['server_cpu_seconds']:.2f}",
            f"{row['server_rss_bytes'] / 1e6:.0f}",
            str(row["exact"]),
            f"{row['sent_to_plain']:.2f}x",
            f"{row['received_to_plain']:.2f}x",
            f"{theirs['node_cpu_seconds']:.2f}" if theirs else "-",
            f"{theirs['server_cpu_seconds']:.1f}" if theirs else "-",
        )
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
