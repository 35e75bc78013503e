"""The deployment's cohort over a carrier in this process.

What counts, what is refused and who is blamed for it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

from fedlora.common.codec.framing import frame
from fedlora.common.codec.strict import digest_of
from fedlora.common.disk.files import write_atomically
from fedlora.common.errors import QuorumLost, Refused, Spent
from fedlora.common.manifest.manifest import RunManifest, SecureTerms
from fedlora.common.manifest.plan import RoundPlan
from fedlora.common.privacy.modes import guarantee_of
from fedlora.common.protocol import messages
from fedlora.common.protocol.consent import Start
from fedlora.common.protocol.messages import (
    MANIFEST_TAG,
    OFFER_TAG,
    PLAN_TAG,
    START_TAG,
    Address,
    Answer,
    Consent,
    Decline,
    Offer,
    Reply,
    SignedStart,
    Started,
    Task,
    reply_to_bytes,
    request_from_bytes,
)
from fedlora.common.secagg.cohort import THRESHOLD_RULE
from fedlora.common.trust.identity import Identity, PublicIdentity, Signed
from fedlora.server.coordinator.coordinator import Coordinator
from fedlora.server.deployment.cohorts import ClearCohort, cohort_of
from fedlora.server.deployment.participants import WAITING, Participants
from fedlora.server.rounds.checkpoint import Checkpoint
from fedlora.server.rounds.cohort import CohortSum, Failure
from fedlora.server.rounds.loop import Around, Rules, run_rounds
from fedlora.server.secagg.attempt import SecureSum
from fedlora.server.secagg.sums import SecureCohort
from fedlora.server.strategies.fedavg import FedAvg, ServerOptimizer
from tests.server.fakes import SPEC, START, ByAsking, manifest_of

NAMES = ("east", "north", "south")


def head_of(entry: int) -> str:
    """What a node says of its ledger's newest entry."""
    return f"keyed:{entry:064x}"


@dataclass
class Node:
    """An institution that adds one to each coordinate, or does what its `habit` says."""

    name: str
    coordinator: PublicIdentity
    identity: Identity = field(default_factory=Identity.generate)
    habit: str = "honest"
    sent: list[bytes] = field(default_factory=list)
    consent: bytes = b""
    starts: list[Start] = field(default_factory=list)

    def answer(self, data: bytes) -> bytes:
        request = request_from_bytes(data)
        if isinstance(request, Offer):
            body = request.manifest.opened(MANIFEST_TAG, self.coordinator)
            digest = RunManifest.from_bytes(body).digest
            address = Address.from_bytes(request.address.opened(OFFER_TAG, self.coordinator))
            assert (address.manifest, address.institution) == (digest, self.name)
            assert address.not_after >= time.time()
            if self.habit == "declines":
                return self._signed(Decline(self.name, digest, 0, 0, "budget spent", True))
            epsilon = {
                "understates": 0.01,
                "overstates": 1.7e308,
                "a little more": COST * 1.001,
            }.get(self.habit, COST)
            delta = 2e-5 if self.habit == "another delta" else 1e-5
            consent = Consent(
                self.name, digest, "sha256:p", epsilon, delta, height=5, head=head_of(5)
            )
            exceeds = self.habit == "exceeds"
            self.consent = self._beyond(consent) if exceeds else self._signed(consent)
            return self.consent
        if isinstance(request, SignedStart):
            return self._started(request)
        assert isinstance(request, Task)
        plan = RoundPlan.from_bytes(request.plan.opened(PLAN_TAG, self.coordinator))
        return self._update(plan)

    def _started(self, request: SignedStart) -> bytes:
        start = Start.from_bytes(request.start.opened(START_TAG, self.coordinator))
        named = {party.institution: party.consent for party in start.cohort}
        assert named[self.name] == digest_of(self.consent)
        self.starts.append(start)
        if self.habit in ("is too late", "does not start"):
            for_good = self.habit == "does not start"
            return self._signed(Decline(self.name, start.manifest, 0, 0, self.habit, for_good))
        said = (self.name, start.manifest, "sha256:p", COST, 1e-5)
        # a start that is charged is an entry more, and one that was charged before is none
        height, head = {
            "was put back": (4, head_of(4)),
            "was put back by one": (5, head_of(7)),
            "was charged before": (5, head_of(5)),
        }.get(self.habit, (6, head_of(6)))
        digest = digest_of(request.start.to_bytes())
        return self._signed(Started(*said, start=digest, height=height, head=head))

    def _update(self, plan: RoundPlan) -> bytes:
        if self.habit == "replays" and self.sent:
            return self.sent[0]
        vector = np.ones(SPEC.size, dtype="<f4")
        if self.habit == "nan":
            vector[0] = np.nan
        if self.habit == "huge":
            vector *= 1e9
        if self.habit == "head alone":
            vector[~SPEC.head_mask()] = 0
        if self.habit == "short":
            vector = vector[:-1]
        answer = Answer(self.name, plan.manifest, plan.round, plan.attempt, vector.tobytes())
        if self.habit == "wrong round":
            answer = replace(answer, round=plan.round + 1)
        if self.habit == "other run":
            answer = replace(answer, manifest="sha256:other")
        data = self._signed(answer)
        if self.habit == "forged":
            data = data[:-1] + bytes([data[-1] ^ 1])
        if self.habit == "another's key":
            data = reply_to_bytes(Identity.generate(), "test", answer)
        if self.habit == "consents again":
            data = self._signed(Consent(self.name, plan.manifest, "sha256:p", 0.5, 1e-5))
        self.sent.append(data)
        return data

    def _beyond(self, consent: Consent) -> bytes:
        """A consent to ε = 10⁴⁰⁰, which our own code would not write."""
        kind, sent = messages._sent(consent)
        body = sent.body.replace(repr(consent.epsilon).encode(), b"1" + b"0" * 400)
        sent = replace(sent, body=body)
        signature = self.identity.sign(messages.REPLY_TAG, *sent.signed("test", kind))
        whole = frame(replace(sent, signature=signature), kind)
        return messages._marked(messages.REPLY_VERSION, whole)

    def _signed(self, reply: Reply) -> bytes:
        return reply_to_bytes(self.identity, "test", reply)


@dataclass
class World(ByAsking):
    """A coordinator, its members, and a carrier that loses what it is told to lose."""

    folder: Path
    key: Identity = field(default_factory=Identity.generate)
    away: set[str] = field(default_factory=set)
    revoked: set[str] = field(default_factory=set)
    down: set[str] = field(default_factory=set)  # connected, and nobody behind it
    tasks: int = 0
    offers: int = 0
    looks: int = 0

    def __post_init__(self) -> None:
        self.nodes = {name: Node(name, self.key.public) for name in NAMES}

    @property
    def coordinator(self) -> Coordinator:
        return Coordinator("test", self.key, self.members)

    def members(self) -> Mapping[str, PublicIdentity]:
        return {
            name: node.identity.public
            for name, node in self.nodes.items()
            if name not in self.revoked
        }

    def online(self) -> set[str]:
        return set(self.nodes) - self.away

    def ask(
        self, requests: Mapping[str, bytes], deadline: float
    ) -> Iterator[tuple[str, bytes | Failure]]:
        for name, data in requests.items():
            assert name not in self.revoked
            self.offers += isinstance(request_from_bytes(data), Offer)
            self.tasks += isinstance(request_from_bytes(data), Task)
            if name in self.away | self.down:
                yield name, Failure(name, "no answer")
            else:
                yield name, self.nodes[name].answer(data)

    def sleep(self) -> None:
        self.looks += 1
        if self.looks == 3:
            self.down.clear()

    def cohort(
        self, manifest: RunManifest, expected: int = 3, deadline: float = 1.0, quorum: float = 0.6
    ) -> ClearCohort:
        self.who = Participants(
            manifest,
            self.coordinator,
            self,
            self.folder,
            expected,
            deadline,
            quorum,
            lambda _: self.sleep(),
        )
        return ClearCohort(self.who)


def manifest(rounds: int = 2, **changes: object) -> RunManifest:
    made = manifest_of(
        rounds, spare=1, mode="record", learning_rate=0.5, clip=1.0, noise_multiplier=2.0
    )
    return replace(made, **changes)  # type: ignore[arg-type]


COST = guarantee_of(manifest()).stated_epsilon()


def plan_of(run: RunManifest, attempt: int = 1) -> RoundPlan:
    return RoundPlan(run.digest, 0, 1, attempt, START.digest)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_the_sum_of_honest_institutions(world: World) -> None:
    cohort = world.cohort(manifest())
    found = cohort.total(plan_of(manifest()), START)
    assert (found.replies, found.asked, found.failures) == (3, 3, ())
    assert np.array_equal(found.total, np.full(SPEC.size, 3.0))
    assert {name: consent.epsilon for name, consent in world.who.reserved.items()} == dict.fromkeys(
        NAMES, COST
    )


@pytest.mark.parametrize(
    ("habit", "reason"),
    [
        ("nan", "not finite"),
        ("huge", "L2 norm"),
        ("short", "found 24 bytes"),
        ("wrong round", "round"),
        ("other run", "another run"),
        ("forged", "did not make"),
        ("another's key", "did not make"),
        ("consents again", "expected an update"),
    ],
)
def test_what_does_not_count_is_its_senders_failure(world: World, habit: str, reason: str) -> None:
    cohort = world.cohort(manifest())
    cohort.total(plan_of(manifest()), START)
    world.nodes["north"].habit = habit
    found = cohort.total(plan_of(manifest(), 2), START)
    assert np.array_equal(found.total, np.full(SPEC.size, 2.0)) and found.replies == 2
    assert [failure.client for failure in found.failures] == ["north"]
    assert reason in found.failures[0].reason


def test_a_head_phase_moves_the_head_alone(world: World) -> None:
    """Who moves LoRA in it is a failure; who leaves it alone counts."""
    run = replace(manifest(), phases=(replace(manifest().phases[0], name="head"),))
    for name in ("east", "south"):
        world.nodes[name].habit = "head alone"
    found = world.cohort(run).total(plan_of(run), START)
    assert found.replies == 2 and found.total.tolist() == [0, 0, 0, 0, 2, 2, 2]
    assert [failure.client for failure in found.failures] == ["north"]
    assert "phase head leaves alone" in found.failures[0].reason


def test_under_masks_a_head_phase_s_sum_is_of_the_head_alone(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody can tell who moved the rest."""
    terms = SecureTerms(THRESHOLD_RULE, 0, 1, 32, 1 << 16, (1.0,))
    run = replace(
        manifest(),
        minimum_cohort=3,
        secure=terms,
        phases=(replace(manifest().phases[0], name="head"),),
    )
    world.cohort(run)
    levels = np.full(SPEC.size, terms.levels)  # ones, where the bound is 1
    whole = SecureSum(levels, NAMES, (), (), 3, 3)
    monkeypatch.setattr(SecureCohort, "_epoch_for", lambda *_: None)
    monkeypatch.setattr(SecureCohort, "_sum", lambda *_: (whole, None))
    found = cohort_of(world.who).total(plan_of(run), START)
    assert found.total.tolist() == [0, 0, 0, 0, 1, 1, 1] and found.replies == 3


def test_an_answer_to_another_attempt_is_refused(world: World) -> None:
    """msg-replayed and late-input: the very bytes of attempt 1 do not count in attempt 2."""
    cohort = world.cohort(manifest())
    cohort.total(plan_of(manifest()), START)
    world.nodes["south"].habit = "replays"
    found = cohort.total(plan_of(manifest(), 2), START)
    assert found.replies == 2 and "attempt" in found.failures[0].reason


def test_a_decline_is_told_apart_from_a_failure(world: World) -> None:
    world.nodes["east"].habit = "declines"
    found = world.cohort(manifest(), expected=2).total(plan_of(manifest()), START)
    assert found.replies == 2 and found.asked == 3
    assert found.failures == (Failure("east", "budget spent", refused=True),)


@pytest.mark.parametrize("habit", ["understates", "overstates", "a little more", "another delta"])
def test_a_consent_at_another_price_than_the_schedule_s_is_a_decline(
    world: World, habit: str
) -> None:
    """The release states the largest ε.

    Too little is a false promise, too much one member's word for all.
    """
    world.nodes["east"].habit = habit
    found = world.cohort(manifest(), expected=2).total(plan_of(manifest()), START)
    reason = f"consent {'delta' if habit == 'another delta' else 'epsilon'}: found "
    assert found.failures[0].client == "east" and found.failures[0].reason.startswith(reason)
    assert found.failures[0].refused and set(world.who.reserved) == {"north", "south"}


def test_a_consent_on_disk_at_another_price_is_asked_for_anew(world: World) -> None:
    world.cohort(manifest()).total(plan_of(manifest()), START)
    east = world.nodes["east"]
    absurd = Started("east", manifest().digest, "sha256:p", 1.7e308, 1e-5, "sha256:s")
    (world.folder / "consents" / "east.started").write_bytes(
        reply_to_bytes(east.identity, "test", absurd)
    )
    resumed = world.cohort(manifest())
    assert set(world.who.reserved) == {"north", "south"}
    assert (
        resumed.total(plan_of(manifest(), 2), START).replies == 3
        and world.who.reserved["east"].epsilon == COST
    )


def test_a_number_that_nothing_can_hold_is_its_senders_failure(world: World) -> None:
    world.nodes["east"].habit = "exceeds"
    cohort = world.cohort(manifest(), expected=2)
    found = cohort.total(plan_of(manifest()), START)
    assert found.replies == 2 and "out of range" in found.failures[0].reason


def test_nobody_trains_for_a_sum_that_may_not_be_made(world: World) -> None:
    world.nodes["east"].habit = "declines"
    run = manifest(minimum_cohort=3)
    found = world.cohort(run).total(plan_of(run), START)
    assert found.replies == 0 and not world.nodes["north"].sent
    assert found.failures[-1] == Failure("cohort", "2 take part, expected at least 3", refused=True)


def test_who_is_waited_for_is_said_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    def note(path: Path, data: bytes) -> None:
        if path.name == WAITING:
            said.append(data.decode())
        write_atomically(path, data)

    def sleep() -> None:
        world.looks += 1
        if world.looks == 3:
            world.away = {"north"}
        if world.looks == 5:
            world.away = set()

    monkeypatch.setattr("fedlora.server.deployment.participants.write_atomically", note)
    monkeypatch.setattr(world, "sleep", sleep)
    world.away = {"east", "north"}
    assert world.cohort(manifest(), deadline=60.0).total(plan_of(manifest()), START).replies == 3
    assert said == [
        "waiting for 3 members: 1 connected; missing east, north",
        "waiting for 3 members: 2 connected; missing north",
        "",
    ]


def test_a_revocation_that_leaves_too_few_ends_the_run_at_its_next_attempt(world: World) -> None:
    run = manifest(minimum_cohort=3)
    cohort = world.cohort(run, expected=3)
    assert cohort.total(plan_of(run), START).replies == 3
    world.revoked, tasks = {"south"}, world.tasks
    found = cohort.total(plan_of(run, 2), START)
    expected = Failure("cohort", "2 take part, expected at least 3", refused=True)
    assert found.failures == (expected,) and world.tasks == tasks


def test_a_revocation_counts_from_the_next_attempt(world: World) -> None:
    cohort = world.cohort(manifest(), expected=2)
    assert cohort.total(plan_of(manifest()), START).replies == 3
    world.revoked = {"south"}
    assert cohort.total(plan_of(manifest(), 2), START).replies == 2


def test_who_is_away_is_no_reason_to_wait_for_the_deadline_twice(world: World) -> None:
    cohort = world.cohort(manifest())
    cohort.total(plan_of(manifest()), START)
    world.away = {"east"}
    found = cohort.total(plan_of(manifest(), 2), START)
    assert found.replies == 2 and found.failures == (Failure("east", "not connected"),)


def test_no_attempt_begins_while_one_that_failed_starts_anew(world: World) -> None:
    """An attempt costs all others a part of their budget.

    The offer that asks meanwhile costs nobody anything.
    """
    cohort = world.cohort(manifest(), deadline=60.0)
    cohort.total(plan_of(manifest()), START)
    world.down, world.looks = {"east"}, 0
    assert cohort.total(plan_of(manifest(), 2), START).replies == 2
    asked = world.tasks
    found = cohort.total(plan_of(manifest(), 3), START)
    assert found.replies == 3 and world.looks == 3 and world.tasks == asked + 3


def test_an_attempt_waits_for_those_without_whom_it_is_vain(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Longer than for one that the quorum can do without, up to the deadline."""
    now = [0.0]

    def sleep() -> None:
        now[0] += 1.0
        if now[0] == 50.0:
            world.down.clear()

    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(world, "sleep", sleep)
    cohort = world.cohort(manifest(), deadline=60.0, quorum=1.0)
    cohort.total(plan_of(manifest()), START)
    world.down = {"east"}
    assert cohort.total(plan_of(manifest(), 2), START).replies == 2 and now == [0.0]
    assert cohort.total(plan_of(manifest(), 3), START).replies == 3 and now == [50.0]


def test_the_signed_plan_is_on_disk_before_it_leaves_and_stays_the_same(world: World) -> None:
    cohort, path = world.cohort(manifest()), world.folder / "outbox" / "plan-1.signed"
    asked = world.nodes["north"].answer

    def looks(data: bytes) -> bytes:
        request = request_from_bytes(data)
        if isinstance(request, Task):
            assert path.read_bytes() == request.plan.to_bytes()
        return asked(data)

    world.nodes["north"].answer = looks  # type: ignore[method-assign]
    cohort.total(plan_of(manifest()), START)
    before = path.read_bytes()
    assert (
        Signed.from_bytes(before, "plan").opened(PLAN_TAG, world.key.public)
        == plan_of(manifest()).to_bytes()
    )
    world.cohort(manifest()).total(plan_of(manifest()), START)
    assert path.read_bytes() == before


def test_a_resumed_run_knows_who_consented(world: World) -> None:
    world.cohort(manifest()).total(plan_of(manifest()), START)
    offers = world.offers
    resumed = world.cohort(manifest())
    assert set(world.who.reserved) == set(NAMES)
    resumed.total(plan_of(manifest(), 2), START)
    assert world.offers == offers


def test_a_run_of_before_there_were_starts_is_resumed(world: World) -> None:
    """Its folder has consents alone; they are asked for again, and then started."""
    world.cohort(manifest()).total(plan_of(manifest()), START)
    for kind in ("start", "started"):
        for path in (world.folder / "consents").glob(f"*.{kind}"):
            path.unlink()
    resumed, offers = world.cohort(manifest()), world.offers
    assert not world.who.reserved
    assert resumed.total(plan_of(manifest(), 2), START).replies == 3
    assert world.offers == offers + 3 and set(world.who.reserved) == set(NAMES)


def test_who_refuses_its_start_is_a_drop_out(world: World) -> None:
    world.nodes["east"].habit = "does not start"
    cohort = world.cohort(manifest())
    for attempt in (1, 2):
        found = cohort.total(plan_of(manifest(), attempt), START)
        assert found.replies == 2 and set(world.who.reserved) == {"north", "south"}
        assert found.failures == (Failure("east", "does not start", refused=True),)
    assert len(world.nodes["east"].starts) == 1, "asked for good"


@pytest.mark.parametrize(
    ("habit", "reason"),
    [
        ("was put back", "ledger height: found 4, expected at least 5"),
        ("was put back by one", "ledger height: found another entry 5"),
    ],
)
def test_a_ledger_that_is_put_back_between_consent_and_start_is_noticed(
    world: World, habit: str, reason: str
) -> None:
    world.nodes["east"].habit = habit
    found = world.cohort(manifest()).total(plan_of(manifest()), START)
    assert found.replies == 2 and set(world.who.reserved) == {"north", "south"}
    assert found.failures[0].client == "east" and reason in found.failures[0].reason


def test_a_start_that_was_charged_before_is_none_of_these(world: World) -> None:
    world.nodes["east"].habit = "was charged before"
    assert world.cohort(manifest()).total(plan_of(manifest()), START).replies == 3


def test_whose_consent_is_over_is_offered_the_run_anew(world: World) -> None:
    east = world.nodes["east"]
    east.habit = "is too late"
    cohort = world.cohort(manifest())
    assert cohort.total(plan_of(manifest()), START).replies == 2
    east.habit, offers = "honest", world.offers
    assert cohort.total(plan_of(manifest(), 2), START).replies == 3
    assert world.offers == offers + 1 and len(east.starts) == 2
    first, second = east.starts
    assert first.cohort == second.cohort


def test_who_comes_late_is_started_by_itself(world: World) -> None:
    """Nobody who was started is started anew."""
    world.away = {"east"}
    cohort = world.cohort(manifest(), expected=2)
    assert cohort.total(plan_of(manifest()), START).replies == 2
    world.away = set()
    assert cohort.total(plan_of(manifest(), 2), START).replies == 3
    assert [len(world.nodes[name].starts) for name in NAMES] == [1, 1, 1]
    assert [len(world.nodes[name].starts[0].cohort) for name in NAMES] == [3, 2, 2]


def test_a_start_is_on_disk_before_it_leaves_and_goes_out_again_as_it_is(world: World) -> None:
    world.cohort(manifest())
    path = world.folder / "consents" / "north.start"
    asked, sent = world.nodes["north"].answer, []

    def looks(data: bytes) -> bytes:
        request = request_from_bytes(data)
        if isinstance(request, SignedStart):
            sent.append(request.start.to_bytes())
            assert path.read_bytes() == sent[-1]
        return asked(data)

    world.nodes["north"].answer = looks  # type: ignore[method-assign]
    world.cohort(manifest()).total(plan_of(manifest()), START)
    (world.folder / "consents" / "north.started").unlink()  # the acknowledgement was lost
    world.cohort(manifest()).total(plan_of(manifest(), 2), START)
    assert len(sent) == 2 and sent[0] == sent[1]


def test_a_consent_that_was_changed_on_disk_is_refused(world: World) -> None:
    world.cohort(manifest()).total(plan_of(manifest()), START)
    path = world.folder / "consents" / "north.started"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(Refused):
        world.cohort(manifest())


@pytest.mark.parametrize(("minimum", "ends"), [(2, True), (3, False)])
def test_fewer_than_the_promised_cohort_are_never_summed(
    world: World, minimum: int, ends: bool
) -> None:
    """The quorum alone would take two of three; the manifest promised `minimum`."""
    run = manifest(minimum_cohort=minimum)
    world.away = {"east"}
    checkpoint = Checkpoint.create(world.folder / "checkpoint", run, START)
    rules = Rules(quorum=0.5, minimum=run.minimum_cohort)
    strategy = FedAvg(ServerOptimizer("none", 1.0, 0.0, 0.0))

    def go() -> int:
        return run_rounds(
            checkpoint,
            world.cohort(run),
            [strategy],
            rules,
            lambda state, phase: {},
            lambda *_: None,
        ).round

    if ends:
        assert go() == 2
    else:
        with pytest.raises(Spent, match="at least 3"):
            go()
        assert checkpoint.load().round == 0


@pytest.mark.parametrize("left", ["away", "revoked"])
def test_who_is_missing_before_an_attempt_burns_none(world: World, left: str) -> None:
    """Five were spent within a second, with nobody asked, and the run ended."""
    run = manifest(minimum_cohort=3)
    checkpoint = Checkpoint.create(world.folder / "checkpoint", run, START)
    cohort, strategy = world.cohort(run), FedAvg(ServerOptimizer("none", 1.0, 0.0, 0.0))

    def go() -> int:
        return run_rounds(
            checkpoint, cohort, [strategy], Rules(minimum=3), lambda state, phase: {},
            lambda *_: None, Around(world.who.ready),
        ).round  # fmt: skip

    setattr(world, left, {"east"})
    with pytest.raises(QuorumLost if left == "away" else Refused, match="no attempt is begun"):
        go()
    assert checkpoint.attempts_in_all == 0 == world.tasks
    setattr(world, left, set())
    assert go() == 2 and checkpoint.attempts_in_all == 2


def test_members_are_counted_and_nobody_else(world: World) -> None:
    """Three members were said to be four: the cohort's own failure was one of them."""
    cohort = world.cohort(manifest(), quorum=1.0)
    cohort.total(plan_of(manifest()), START)
    world.down = {"east"}
    found = cohort.total(plan_of(manifest(), 2), START)
    assert (found.asked, found.replies) == (3, 2) and not found.counts(1.0, 1)
    world.down, world.away = set(), {"east"}
    found = cohort.total(plan_of(manifest(), 3), START)
    assert (found.asked, found.replies) == (0, 0) and not found.counts(0.5, 1)
    assert CohortSum(found.total, 0, 0, (), 0.0).counts(1.0, 3)  # nobody was drawn


def test_a_round_ends_with_its_deadline_also_where_members_are_waited_for(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quarter of the deadline for who is away, the rest for who is there.

    A silent newcomer costs no more.
    """
    now, asked = [0.0], []

    def ask(requests: Mapping[str, bytes], seconds: float) -> Iterator[tuple[str, bytes | Failure]]:
        for name, data in requests.items():
            offer = isinstance(request_from_bytes(data), Offer)
            asked.append((name, "offer" if offer else "task", seconds))
            if name == "silent":
                now[0] += seconds
                yield name, Failure(name, "no answer")
            else:
                yield name, world.nodes[name].answer(data)

    def sleep() -> None:
        now[0] += 1.0

    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(world, "ask", ask)
    monkeypatch.setattr(world, "sleep", sleep)
    run = manifest(minimum_cohort=2)
    cohort = world.cohort(run, 3, 20.0)
    assert cohort.total(plan_of(run), START).replies == 3 and now == [0.0]
    world.away = {"east"}
    assert cohort.total(plan_of(run, 2), START).replies == 2 and now == [5.0]
    assert asked[-1] == ("south", "task", 15.0)
    world.nodes["silent"] = Node("silent", world.key.public)
    assert cohort.total(plan_of(run, 3), START).replies == 2 and now == [10.0]
    world.away, trained = {"east", "south"}, len(world.nodes["north"].sent)
    # the quorum is away: waited for to the end, and nobody trains
    found = cohort.total(plan_of(run, 4), START)
    assert found.replies == 0 and now == [30.0] and len(world.nodes["north"].sent) == trained


def test_an_attempt_that_can_not_reach_its_quorum_costs_nobody_anything(world: World) -> None:
    cohort = world.cohort(manifest(), quorum=1.0)
    assert cohort.total(plan_of(manifest()), START).replies == 3
    world.away, tasks = {"east"}, world.tasks
    found = cohort.total(plan_of(manifest(), 2), START)
    assert found.replies == 0 and world.tasks == tasks
    assert found.failures[0] == Failure("east", "not connected") and not found.failures[-1].refused
