"""Vectors that travel in parts, between real nodes and the deployment's cohort: cut off, lied to.

A part has 1 KiB here, and a vector three of them.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedlora.client.node.outbox import Outbox
from fedlora.common.errors import BadInput
from fedlora.common.manifest.manifest import RunManifest
from fedlora.common.manifest.plan import RoundPlan
from fedlora.common.model.state import AdapterSpec, AdapterState, TensorSpec
from fedlora.common.protocol import vector_parts as parts
from fedlora.common.protocol.messages import (
    PLAN_TAG,
    Decline,
    Reply,
    Task,
    reply_to_bytes,
    request_from_bytes,
    request_to_bytes,
)
from fedlora.common.protocol.pieces import PARTS_TAG, Coming, Fetch, Part, Parted, Piece, Taken
from fedlora.common.protocol.vector_parts import cut, listed, part_of
from fedlora.common.trust.identity import Identity, Signed
from fedlora.server.coordinator.coordinator import Coordinator
from fedlora.server.deployment.cohorts import ClearCohort
from fedlora.server.deployment.participants import Participants
from fedlora.server.rounds.checkpoint import Checkpoint
from fedlora.server.rounds.cohort import CohortSum, Failure
from fedlora.server.strategies.gathered import Floats
from tests.client.institution import COORDINATOR, Institution, declined, manifest_of
from tests.server.fakes import ByAsking

NAMES = ("east", "north", "south")
SIZE = 600  # coordinates: 2,400 bytes, the last part of 352
COUNT = 3
SPEC = AdapterSpec((TensorSpec("lora.a", (SIZE,)),))
STATE = AdapterState(SPEC, np.linspace(-1, 1, SIZE, dtype=np.float32))
RUN = manifest_of(spec_digest=SPEC.digest, vector_size=SIZE)
Change = Callable[[str, bytes], bytes]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "PART_BYTES", 1 << 10)


class Killed(BaseException):
    """The server's process ends."""


class Federation(ByAsking):
    """Real nodes behind the deployment's cohort, and a line that can be cut or lie."""

    def __init__(self, root: Path, run: RunManifest = RUN) -> None:
        self.run, self.root = run, root / "run"
        self.nodes = {name: Institution(root / name, name, f"The {name}") for name in NAMES}
        source = np.random.default_rng(3)
        self.updates = {name: source.normal(scale=1e-3, size=SIZE).astype("<f4") for name in NAMES}
        for name in NAMES:
            self._works(name)
        self.carried: list[tuple[str, str]] = []  # to whom, and what
        self.cut_after = 10**9
        self.change: Change = lambda name, answer: answer
        self.root.mkdir()
        self.resume()

    def _works(self, name: str) -> None:
        self.nodes[name].work.update = self.updates[name].tobytes()
        self.nodes[name].work.adapter = SPEC

    def resume(self) -> None:
        """As a server's process that was started again."""
        members = {name: node.identity.public for name, node in self.nodes.items()}
        coordinator = Coordinator("f", COORDINATOR, lambda: members)
        self.who = Participants(
            self.run, coordinator, self, self.root, len(NAMES), 5.0, sleep=lambda _: None
        )
        self.cohort = ClearCohort(self.who)

    def restart(self, name: str) -> None:
        """As a trainer's process that was."""
        self.nodes[name].ledger.close()
        self.nodes[name].restart()
        self._works(name)

    def online(self) -> set[str]:
        return set(self.nodes)

    def ask(
        self, requests: Mapping[str, bytes], deadline: float
    ) -> Iterator[tuple[str, bytes | Failure]]:
        for name, data in requests.items():
            kind = type(request_from_bytes(data)).__name__
            if kind in ("Piece", "Fetch", "Task"):
                if len(self.carried) == self.cut_after:
                    raise Killed
                self.carried.append((name, kind))
            yield name, self.change(name, self.nodes[name].resident.ask(data))

    def plan(self, attempt: int = 1) -> RoundPlan:
        return RoundPlan(self.run.digest, 0, 1, attempt, STATE.digest)

    def total(self, attempt: int = 1) -> CohortSum:
        return self.cohort.total(self.plan(attempt), STATE)

    def sent(self, kind: str) -> int:
        return sum(each == kind for _, each in self.carried)

    def begun(self) -> Federation:
        """With a run that was started."""
        self.who.gather()
        return self

    def signs(self, name: str, change: Callable[[Reply], Reply | None]) -> None:
        """Node `name` says what `change` makes of its replies, under its own key."""
        node = self.nodes[name]

        def changed(asked: str, answer: bytes) -> bytes:
            found = change(node.read(answer)) if asked == name else None
            return answer if found is None else reply_to_bytes(node.identity, "f", found)

        self.change = changed


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    return Federation(tmp_path)


def expected(federation: Federation) -> Floats:
    total = np.zeros(SIZE)
    for update in federation.updates.values():
        total += update
    return total


# --- what is carried ------------------------------------------------------------------------------


def test_a_round_in_parts_is_the_round(federation: Federation) -> None:
    found = federation.total()
    assert (found.failures, found.replies) == ((), 3)
    assert (found.total == expected(federation)).all()
    for kind, each in (("Piece", COUNT), ("Task", 1), ("Fetch", COUNT)):
        assert federation.sent(kind) == each * len(NAMES)
    assert not (federation.root / "incoming").exists()
    north = federation.nodes["north"]
    (trained,) = north.work.trained
    assert trained == federation.plan()


def test_an_update_is_rounded_before_it_is_cut(tmp_path: Path) -> None:
    federation = Federation(tmp_path, replace(RUN, wire="bfloat16"))
    for name, update in federation.updates.items():
        federation.updates[name] = (update.view("<u4") & 0xFFFF0000).view("<f4")
        federation._works(name)
    found = federation.total()
    assert found.replies == 3 and (found.total == expected(federation)).all()
    assert federation.sent("Fetch") == 2 * len(NAMES)  # half as many bytes


def test_a_small_run_travels_as_it_did(tmp_path: Path) -> None:
    federation = Federation(tmp_path, manifest_of(spec_digest=SPEC.digest))
    assert b"vector_size" not in federation.run.to_bytes()
    assert federation.total().replies == 3
    assert {kind for _, kind in federation.carried} == {"Task"}
    assert not (tmp_path / "north" / "inbox").exists()


@pytest.mark.parametrize(("size", "said"), [(256, 0), (257, 257), ((1 << 28) + 1, 0)])
def test_a_manifest_says_what_travels_in_parts(size: int, said: int) -> None:
    assert parts.vector_size(size) == said
    if size > 1 << 28:
        with pytest.raises(BadInput, match="expected at most 1073741824"):
            parts.check_travels(size)
    else:
        parts.check_travels(size)


# --- cut off --------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [0, 2, 5, 16])
def test_a_server_that_is_killed_goes_on_with_the_same_attempt(
    federation: Federation, after: int
) -> None:
    federation.begun().cut_after = after
    with pytest.raises(Killed):
        federation.total()
    assert federation.who.unfinished(federation.plan())
    assert not federation.who.unfinished(federation.plan(2))
    federation.cut_after = 10**9
    federation.resume()
    found = federation.total()
    assert found.replies == 3 and (found.total == expected(federation)).all()
    assert not federation.who.unfinished(federation.plan())
    assert federation.sent("Fetch") == COUNT * len(NAMES)  # none twice
    # the first piece is how a server asks what is there, and a task for what it was answered
    assert federation.sent("Piece") <= (COUNT + 1) * len(NAMES)
    for node in federation.nodes.values():
        assert [plan.attempt for plan in node.work.trained] == [1]


def test_a_trainer_that_is_killed_goes_on(federation: Federation) -> None:
    federation.begun()
    asked = federation.ask

    def restarting(
        requests: Mapping[str, bytes], deadline: float
    ) -> Iterator[tuple[str, bytes | Failure]]:
        for name in requests:
            federation.restart(name)
        return asked(requests, deadline)

    federation.ask = restarting  # type: ignore[method-assign]
    found = federation.total()
    assert found.replies == 3 and (found.total == expected(federation)).all()
    assert federation.sent("Piece") == federation.sent("Fetch") == COUNT * len(NAMES)


def test_a_part_that_a_kill_cut_short_comes_again(federation: Federation) -> None:
    north = federation.begun().nodes["north"]
    for number in range(2):
        assert north.ask(piece(number)) == Taken("north", RUN.digest, number + 1)
    (path,) = (north.root / "inbox").iterdir()
    path.write_bytes(path.read_bytes()[:-7])
    assert north.ask(piece(0)) == Taken("north", RUN.digest, 1)
    for number in range(1, COUNT):
        assert north.ask(piece(number)) == Taken("north", RUN.digest, number + 1)
    assert path.read_bytes() == STATE.vector.tobytes()


def test_the_same_request_has_the_same_bytes(federation: Federation) -> None:
    """Noise is drawn once: an update in parts, asked for again, is the one that lies there."""
    federation.total()
    north, again = federation.nodes["north"], list[bytes]()
    for _ in range(2):
        again.append(b"".join(north.resident.ask(fetch(number)) for number in range(COUNT)))
        federation.restart("north")
    assert again[0] == again[1]
    assert federation.updates["north"].tobytes() == b"".join(
        each.data for number in range(COUNT) if isinstance(each := north.ask(fetch(number)), Part)
    )
    assert north.work.trained == []  # since its restart


def test_a_kept_answer_makes_room_for_the_next(federation: Federation) -> None:
    federation.total()
    outbox = federation.nodes["north"].root / "outbox"
    assert [path.name for path in outbox.rglob("*.body")] == ["000001-000001.body"]
    sizes = [each.size for each in Outbox(outbox).sizes(RUN.digest)]
    federation.total(2)
    assert [path.name for path in outbox.rglob("*.body")] == ["000001-000002.body"]
    told = declined(federation.nodes["north"], fetch(0))
    assert "fetch: found no part 0 of round 1 attempt 1" in told.reason
    # what left is known by its list
    kept = [each.size for each in Outbox(outbox).sizes(RUN.digest)]
    assert kept[: len(sizes)] == sizes and max(sizes) > 4 * SIZE


# --- lied to --------------------------------------------------------------------------------------


def coming(
    state: AdapterState = STATE, run: RunManifest = RUN, key: Identity = COORDINATOR
) -> Signed:
    body = Coming(run.digest, state.digest, listed(cut(state.vector))).to_bytes()
    return Signed.by(key, PARTS_TAG, body)


def piece(number: int, data: bytes | None = None, signed: Signed | None = None) -> bytes:
    part = part_of(STATE.vector, number) if data is None else data
    return request_to_bytes(Piece(signed or coming(), number, part))


def fetch(number: int, key: Identity = COORDINATOR) -> bytes:
    plan = RoundPlan(RUN.digest, 0, 1, 1, STATE.digest).to_bytes()
    return request_to_bytes(Fetch(Signed.by(key, PLAN_TAG, plan), number))


def test_a_node_keeps_no_part_that_was_not_signed_for(federation: Federation) -> None:
    north = federation.begun().nodes["north"]
    good = part_of(STATE.vector, 0)
    long = AdapterSpec((TensorSpec("lora.a", (SIZE + 1,)),))
    other = coming(AdapterState.zeros(long))
    few = replace(listed(cut(STATE.vector)), digests=("0" * 64,))
    short = Signed.by(COORDINATOR, PARTS_TAG, Coming(RUN.digest, STATE.digest, few).to_bytes())
    for request, reason in (
        (piece(0, bytes([good[0] ^ 1]) + good[1:]), "part 0: found other bytes"),
        (piece(0, good + b"\0"), "part 0: found 1025 bytes, expected 1024"),
        (piece(0, b""), "part 0: found 0 bytes, expected 1024"),
        (piece(1, good), "part 1: found other bytes"),
        (piece(COUNT, good), "found part 3, expected 0 to 2"),
        (piece(0, good, other), "adapter: found 2404 bytes, expected 2400 to 2400"),
        (piece(0, good, short), "adapter: found 1 digests, expected 3"),
        (piece(0, good, coming(key=Identity.generate())), "found the key"),
    ):
        assert reason in declined(north, request).reason, reason
    inbox = north.root / "inbox"
    assert not inbox.exists() or not [*inbox.iterdir()]


def test_a_part_that_is_missing_or_comes_twice_changes_nothing(federation: Federation) -> None:
    north = federation.begun().nodes["north"]
    for number, count in ((1, 0), (0, 1), (0, 1), (2, 1), (1, 2), (1, 2)):
        assert north.ask(piece(number)) == Taken("north", RUN.digest, count)
    (path,) = (north.root / "inbox").iterdir()
    assert path.read_bytes() == STATE.vector.tobytes()[: 2 << 10]


def test_a_task_before_its_adapter_is_whole_costs_nothing(federation: Federation) -> None:
    north = federation.begun().nodes["north"]
    north.ask(piece(0))
    plan = Signed.by(COORDINATOR, PLAN_TAG, federation.plan().to_bytes())
    task = request_to_bytes(Task(RUN.digest, plan, b""))
    assert "found 1024 bytes that came before it, expected 2400" in declined(north, task).reason
    assert not north.work.trained and not north.ledger.reservations(RUN.digest)


def test_an_adapter_that_was_changed_on_disk_comes_again(federation: Federation) -> None:
    north = federation.begun().nodes["north"]
    for number in range(COUNT):
        north.ask(piece(number))
    (path,) = (north.root / "inbox").iterdir()
    path.write_bytes(bytes(4 * SIZE))
    plan = Signed.by(COORDINATOR, PLAN_TAG, federation.plan().to_bytes())
    task = request_to_bytes(Task(RUN.digest, plan, b""))
    assert "other bytes on disk" in declined(north, task).reason and not path.exists()
    found = federation.total()
    assert found.replies == 3 and (found.total == expected(federation)).all()


def test_one_adapter_lies_at_a_node(federation: Federation) -> None:
    """Whatever is signed: a coordinator that sends the start of many fills no disk."""
    north = federation.begun().nodes["north"]
    for value in range(20):
        state = AdapterState(SPEC, np.full(SIZE, value, np.float32))
        north.ask(piece(0, part_of(state.vector, 0), coming(state)))
    assert sum(path.stat().st_size for path in (north.root / "inbox").iterdir()) == 1 << 10


def test_no_run_but_one_that_was_started_in_parts_takes_any(federation: Federation) -> None:
    north = federation.begun().nodes["north"]
    stranger = coming(run=replace(RUN, run="2"))
    assert "which was not started" in declined(north, piece(0, signed=stranger)).reason
    whole = manifest_of(spec_digest=SPEC.digest, run="3")
    north.begin(whole)
    assert (
        "whose vectors travel whole" in declined(north, piece(0, signed=coming(run=whole))).reason
    )


def test_a_policy_that_forbids_a_run_takes_and_hands_out_no_part(federation: Federation) -> None:
    federation.total()
    north = federation.nodes["north"]
    text = north.folder.policy.read_text()
    north.set_policy(text.replace("noise_multiplier = 0.6", "noise_multiplier = 9.0"))
    for request in (piece(0), fetch(0)):
        assert declined(north, request).refused


def test_an_update_with_other_bytes_than_its_list_does_not_count(federation: Federation) -> None:
    def lie(reply: Reply) -> Reply | None:
        if isinstance(reply, Part):
            return replace(reply, data=reply.data[:-1] + bytes([reply.data[-1] ^ 1]))
        return None

    federation.signs("north", lie)
    found = federation.total()
    assert found.replies == 2
    assert [each.reason for each in found.failures] == [
        "update of north part 0: found other bytes than were signed for"
    ]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda each: replace(each, size=2401), "found 2401 bytes, expected 1 to 2400"),
        (lambda each: replace(each, digests=each.digests[:-1]), "found 2 digests, expected 3"),
        (lambda each: replace(each, size=2396), "part 2: found 352 bytes, expected 348"),
    ],
)
def test_a_list_of_another_size_does_not_count(
    federation: Federation, change: Callable[[parts.Parts], parts.Parts], reason: str
) -> None:
    def lie(reply: Reply) -> Reply | None:
        return replace(reply, parts=change(reply.parts)) if isinstance(reply, Parted) else None

    federation.signs("north", lie)
    found = federation.total()
    assert found.replies == 2 and reason in found.failures[0].reason


def test_an_answer_of_another_attempt_or_kind_does_not_count(federation: Federation) -> None:
    for lie, reason in (
        (
            lambda each: replace(each, attempt=9) if isinstance(each, Parted) else None,
            "attempt 9 of",
        ),
        (
            lambda each: (
                Decline("north", each.manifest, 1, 1, "no disk", False)
                if isinstance(each, Taken)
                else None
            ),
            "no disk",
        ),
        (
            lambda each: replace(each, count=4) if isinstance(each, Taken) else None,
            "found 4 parts taken, expected 3",
        ),
        (
            lambda each: replace(each, count=0) if isinstance(each, Taken) else None,
            "found 0 parts taken, expected 3",
        ),
    ):
        federation.signs("north", lie)
        found = federation.total()
        assert found.replies == 2 and reason in found.failures[0].reason


@pytest.mark.parametrize("digests", [(), ("0" * 64,)])
@pytest.mark.parametrize("said", [Taken, Part])
def test_a_list_in_place_of_another_answer_does_not_count(
    federation: Federation, said: type[Reply], digests: tuple[str, ...]
) -> None:
    """Nothing was fetched for it: it is no reason to look for a file."""

    def lie(reply: Reply) -> Reply | None:
        if not isinstance(reply, said):
            return None
        return Parted("north", RUN.digest, 1, 1, parts.Parts(8, 8, digests))

    federation.signs("north", lie)
    found = federation.total()
    assert found.replies == 2
    assert found.failures[0].reason == (
        "update of north: found a list of parts, expected the parts before it"
    )


# --- memory ---------------------------------------------------------------------------------------


def test_no_hop_holds_a_vector(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes and coordinator in one process; its adapter and their sum are files."""
    monkeypatch.setattr(parts, "PART_BYTES", 1 << 18)
    size = 1 << 20
    spec = AdapterSpec((TensorSpec("lora.a", (size,)),))
    federation.run = manifest_of(spec_digest=spec.digest, vector_size=size)
    checkpoint = Checkpoint.create(
        federation.root / "checkpoint", federation.run, AdapterState.zeros(spec)
    )
    state = checkpoint.load().state
    update = np.full(size, 0.01, dtype="<f4").tobytes()
    for node in federation.nodes.values():
        node.work.update, node.work.adapter = update, spec
    federation.resume()
    federation.begun()
    plan = RoundPlan(federation.run.digest, 0, 1, 1, state.digest)
    tracemalloc.start()
    try:
        assert federation.cohort.total(plan, state).replies == 3
        assert tracemalloc.get_traced_memory()[1] < 4 * size
    finally:
        tracemalloc.stop()
