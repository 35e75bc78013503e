"""Secure aggregation between machines.

Real nodes behind the deployment's cohort, byte for byte what travels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedlora.client.node import roster
from fedlora.client.node.outbox import Outbox
from fedlora.client.report.report import write_report
from fedlora.client.secagg.node import SecureNode
from fedlora.client.service.dialogue import PRIVATE_REASON
from fedlora.common.errors import Refused
from fedlora.common.manifest.manifest import RunManifest, SecureTerms, SkellamTerms
from fedlora.common.manifest.plan import RoundPlan
from fedlora.common.model.state import AdapterSpec, AdapterState, TensorSpec
from fedlora.common.privacy.figures import shown_epsilon
from fedlora.common.privacy.modes import guarantee_of
from fedlora.common.privacy.shared_record_level import SharedRecordLevel
from fedlora.common.protocol import vector_parts as parts
from fedlora.common.protocol.messages import (
    PLAN_TAG,
    STAGE_TAG,
    Answer,
    Consent,
    Decline,
    Offer,
    Reply,
    SignedStage,
    SignedStart,
    Staged,
    Started,
    reply_from_bytes,
    request_from_bytes,
    request_to_bytes,
)
from fedlora.common.protocol.pieces import Fetch, Part, Parted, Taken
from fedlora.common.protocol.stages import Request
from fedlora.common.secagg.cohort import THRESHOLD_RULE
from fedlora.common.secagg.wire import KEYS_TAG, Epoch, KeyOffer, MaskedInput
from fedlora.common.trust.identity import Identity, PublicIdentity, Signed
from fedlora.server.coordinator.coordinator import Coordinator
from fedlora.server.deployment.cohorts import cohort_of
from fedlora.server.deployment.participants import Participants
from fedlora.server.release.card import model_card, shown_figures
from fedlora.server.rounds.cohort import CohortSum, Failure
from fedlora.server.secagg.log import SUMS, SumLog
from fedlora.server.secagg.sums import SecureCohort
from tests.client.institution import COORDINATOR, Institution, manifest_of, offer_of, task_of
from tests.server.fakes import ByAsking

NAMES = ("east", "north", "south", "west")
SPEC = AdapterSpec((TensorSpec("lora.a", (16, 64)),))
START = AdapterState(SPEC, np.linspace(-1, 1, SPEC.size, dtype=np.float32))
TERMS = SecureTerms(THRESHOLD_RULE, 1, 4, 32, 1 << 20, (2.0,))
RUN = manifest_of(spec_digest=SPEC.digest, secure=TERMS)
# privacy of whole institutions: each adds a share of the noise
SHARED = replace(
    RUN,
    mode="client",
    epsilon=60.0,
    phases=(replace(RUN.phases[0], clip=2.0, noise_multiplier=3.0),),
    skellam=SkellamTerms((SPEC.size,), 2),
)

# privacy of records: likewise
RECORDS = replace(
    SHARED,
    mode="shared-record",
    phases=(replace(SHARED.phases[0], steps=1, optimizer="sgd", noise_multiplier=3.0),),
    largest_cohort=4,
)
RECORDS = replace(
    RECORDS,
    secure=replace(
        TERMS,
        levels=1 << 26,
        update_bounds=(SharedRecordLevel.coordinate_bound(RECORDS.phases[0]),),
    ),
)


class World(ByAsking):
    """Four institutions that approved each other, and a carrier that keeps what it carries."""

    def __init__(self, root: Path, run: RunManifest = RUN, quorum: float = 0.75) -> None:
        self.run, self.folder = run, root / "run"
        self.folder.mkdir()
        self.nodes = {name: Institution(root / name, name, f"The {name}") for name in NAMES}
        source = np.random.default_rng(3)
        self.updates = {
            name: source.uniform(-0.05, 0.05, SPEC.size).astype("<f4") for name in NAMES
        }
        for name, node in self.nodes.items():
            node.work.update, node.work.adapter = self.updates[name].tobytes(), SPEC
            for other in NAMES:
                if other != name:
                    roster.approve(
                        node.folder, (root / other / "enrolment.json").read_text(), other
                    )
        self.away: dict[str, set[str]] = {}  # by stage: who does not answer
        self.revoked: set[str] = set()
        self.carried: list[tuple[str, Reply]] = []
        sleep = lambda seconds: None  # noqa: E731
        coordinator = Coordinator("f", COORDINATOR, self.members)
        self.who = Participants(run, coordinator, self, self.folder, len(NAMES), 5.0, quorum, sleep)
        self.cohort = cohort_of(self.who)

    def members(self) -> Mapping[str, PublicIdentity]:
        return {
            name: each.identity.public
            for name, each in self.nodes.items()
            if name not in self.revoked
        }

    def online(self) -> set[str]:
        return set(self.nodes)

    def ask(
        self, requests: Mapping[str, bytes], deadline: float
    ) -> Iterator[tuple[str, bytes | Failure]]:
        for name, data in requests.items():
            stage = stage_of(data)
            if name in self.away.get(stage, ()):
                yield name, Failure(name, "away")
                continue
            answer = self.nodes[name].resident.ask(data)
            self.carried.append((stage, reply_from_bytes(answer, "f", self.members())))
            yield name, answer

    def restart(self, name: str) -> None:
        node = self.nodes[name]
        node.ledger.close()
        node.restart()
        node.work.update, node.work.adapter = self.updates[name].tobytes(), SPEC

    def total(self, attempt: int, round_number: int | None = None) -> CohortSum:
        plan = RoundPlan(self.run.digest, 0, round_number or attempt, attempt, START.digest)
        return self.cohort.total(plan, START)

    def trained(self, name: str) -> int:
        return len(self.nodes[name].work.trained)


def stage_of(data: bytes) -> str:
    request = request_from_bytes(data)
    if isinstance(request, SignedStage):
        return Request.from_bytes(request.request.body).stage
    kinds = {Offer: "offered", SignedStart: "start"}
    return kinds.get(type(request), "task")


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_the_sum_is_exact_and_only_masked_vectors_leave(world: World) -> None:
    assert isinstance(world.cohort, SecureCohort)
    step = TERMS.update_bounds[0] / TERMS.levels
    for attempt in (1, 2, 3):
        found = world.total(attempt)
        assert found.replies == 4 and not found.failures and found.secure is not None
        expected = sum(each.astype(np.float64) for each in world.updates.values())
        assert np.abs(found.total - expected).max() <= 4 * step / 2 + 1e-12
    assert [stage for stage, _ in world.carried].count("deal") == 4  # one epoch for three attempts
    for stage, reply in world.carried:
        kinds = {"offered": Consent, "start": Started}
        assert type(reply) is kinds.get(stage, Staged), stage
        if isinstance(reply, Staged) and stage == "input":
            words = np.frombuffer(MaskedInput.from_bytes(reply.message).vector, dtype="<u4")[
                : SPEC.size
            ]
            assert abs(np.corrcoef(words, world.updates[reply.institution])[0, 1]) < 0.2
        elif isinstance(reply, Staged):
            for vector in world.updates.values():
                assert vector.tobytes()[:16] not in reply.message


def test_a_masked_input_in_parts_is_the_same_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "PART_BYTES", 1 << 10)
    world = World(tmp_path, replace(RUN, vector_size=SPEC.size))
    step = TERMS.update_bounds[0] / TERMS.levels
    found = world.total(1)
    expected = sum(each.astype(np.float64) for each in world.updates.values())
    assert found.replies == 4 and np.abs(found.total - expected).max() <= 4 * step / 2 + 1e-12
    stages, kinds = [stage for stage, _ in world.carried], [type(each) for _, each in world.carried]
    assert kinds.count(Taken) == 4 * 4  # an adapter of 4 KiB
    assert [kind for stage, kind in zip(stages, kinds, strict=True) if stage == "input"] == (
        [Parted] * 4
    )
    north = world.nodes["north"]
    (kept,) = (north.root / "outbox").rglob("*.masked")
    sent = [each for _, each in world.carried if isinstance(each, Part)]
    mine = b"".join(each.data for each in sent if each.institution == "north")
    assert mine == kept.read_bytes()
    assert not world.who.unfinished(RoundPlan(world.run.digest, 0, 1, 1, START.digest))


def test_large_masked_inputs_of_all_attempts_take_the_room_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A coordinator whose attempts all count, or none, fills no disk with what it has had."""
    monkeypatch.setattr(parts, "PART_BYTES", 1 << 10)
    world = World(tmp_path, replace(RUN, vector_size=SPEC.size))
    north = world.nodes["north"]
    for attempt in (1, 2, 3):
        assert world.total(attempt).replies == 4
    folder = Outbox(north.root / "outbox").masked(world.run.digest)
    (kept,) = (north.root / "outbox").rglob("*.masked")
    assert folder.used() == [(1, 1), (2, 2), (3, 3)] and folder.get(1, 1) is None
    # it has left all the same: the report has each, and none is made again after a restart
    left = Outbox(north.root / "outbox").sizes(world.run.digest)
    sizes = [each for each in left if each.attempt]
    assert [each.attempt for each in sizes] == [1, 2, 3]
    assert {each.size for each in sizes} == {kept.stat().st_size}
    world.restart("north")
    lost = world.total(1)
    assert lost.replies == 0 and world.trained("north") == 0
    assert world.total(4, 3).replies == 4


def test_what_a_stage_is_refused_for_keeps_its_parts_back_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A policy that expects more colluders, once an input was made: none of it leaves any more."""
    monkeypatch.setattr(parts, "PART_BYTES", 1 << 10)
    world = opted_in(tmp_path, replace(SHARED, vector_size=SPEC.size))
    assert world.total(1).replies == 4
    north, plan = world.nodes["north"], RoundPlan(world.run.digest, 0, 1, 1, START.digest)
    fetch = request_to_bytes(Fetch(Signed.by(COORDINATOR, PLAN_TAG, plan.to_bytes()), 0))
    assert isinstance(north.ask(fetch), Part)
    stricter = north.folder.policy.read_text().replace("[limits]", "[limits]\nmax_colluders = 2")
    north.set_policy(stricter)
    assert isinstance(north.ask(fetch), Decline)


@pytest.mark.parametrize("stage", ["offer", "deal", "input", "confirm", "open"])
def test_a_drop_out_at_any_stage(world: World, stage: str) -> None:
    world.away[stage] = {"west"}
    found = world.total(1)
    here = [world.updates[name] for name in NAMES if name != "west" or stage in ("confirm", "open")]
    assert found.replies == len(here) and [each.client for each in found.failures] == ["west"]
    assert np.abs(found.total - np.sum(here, axis=0, dtype=np.float64)).max() < 1e-5
    world.away.clear()
    # an epoch's cohort is fixed
    assert world.total(2).replies == (3 if stage in ("offer", "deal") else 4)


def test_report_and_card_say_how_it_was_added(world: World, tmp_path: Path) -> None:
    world.total(1)
    world.away["input"] = {"west"}
    world.total(2)
    world.away["confirm"] = {"south"}  # too few signatures are left: nothing was learnt
    assert not world.total(3, 3).replies
    world.away = {"open": {"east"}}
    world.total(4, 3)
    north = world.nodes["north"]
    body = write_report(
        north.folder, north.folder.load_policy(), north.identity, north.ledger, tmp_path / "out"
    )
    (run,) = body["runs"]
    assert run["aggregation"] == "updates left under masks" and "aggregated securely" in " ".join(
        run["statement"]
    )
    said = [
        (each["round"], each["cohort"], each["threshold"], each["dropped"]) for each in run["sums"]
    ]
    # it may, for all that this node knows
    assert said == [(1, 4, 3, 0), (2, 4, 3, 1), (3, 4, 3, 1), (3, 4, 3, 0)]
    figures = shown_figures({"secure": SumLog(world.folder).summary(RUN)})
    card = model_card(RUN, dict.fromkeys(NAMES, "Org"), dict(world.who.reserved), figures)
    assert (
        "aggregated securely" in card
        and "3 sums were learnt under masks: cohorts of 4 to 4" in card
    )
    assert (
        "at least 3 updates in each" in card
        and "keys 0, shares 0, input 1, confirm 0, open 1" in card
    )
    clear = model_card(
        replace(RUN, secure=None), dict.fromkeys(NAMES, "Org"), dict(world.who.reserved), {}
    )
    assert "securely" not in clear and "masks" not in clear


def test_a_report_holds_sums_that_the_node_was_not_asked_about(
    world: World, tmp_path: Path
) -> None:
    """Its input left: t others can make the sum legible, and it may never hear of it."""
    world.away = {"confirm": {"north"}}
    assert world.total(1).replies == 4
    world.away = {"input": {"west", "south"}}
    assert not world.total(2).replies  # as far as this node knows, it may have been
    world.away = {}
    assert world.total(3).replies == 4
    north = world.nodes["north"]
    policy = north.folder.load_policy()
    (run,) = write_report(north.folder, policy, north.identity, north.ledger, tmp_path / "out")[
        "runs"
    ]
    assert [
        (each["attempt"], each["dealt"], each["members"], each["dropped"]) for each in run["sums"]
    ] == [(1, 4, None, None), (2, 4, None, None), (3, 4, 4, 0)]
    for attempt in (4, 5):  # nothing left: nothing is written
        world.away = {"input": {"north"}}
        world.total(attempt, 3)
    assert len((north.folder.run(RUN.digest) / "secure.jsonl").read_text().splitlines()) == 4


def test_too_few_end_the_attempt_and_not_the_run(world: World) -> None:
    world.away["input"] = {"west", "south"}
    found = world.total(1)
    assert found.replies == 0 and not all(failure.refused for failure in found.failures)
    assert "open" not in {stage for stage, _ in world.carried}
    world.away.clear()
    assert world.total(2, 1).replies == 4


def test_a_restarted_node_is_a_drop_out_until_the_next_epoch(world: World) -> None:
    world.total(1)
    world.restart("north")
    found = world.total(2)
    assert (
        found.replies == 3
        and not found.failures[0].refused
        and "joins the next" in found.failures[0].reason
    )
    for attempt in (3, 4):
        assert world.total(attempt, 3).replies == 3
    # nothing was trained for an attempt that it could not be part of
    assert world.trained("north") == 0


def test_where_everybody_is_needed_a_restart_costs_one_attempt_and_nothing_is_learnt(
    tmp_path: Path,
) -> None:
    """A sum that would be thrown away stays masked; who was missed is in the next epoch."""
    world = World(tmp_path, quorum=1.0)
    assert world.total(1).replies == 4
    world.restart("north")
    assert world.total(2).replies == 0
    assert [stage for stage, _ in world.carried].count("confirm") == 4 and len(
        SumLog(world.folder).sums
    ) == 1
    assert world.total(3, 2).replies == 4


def test_every_node_restarted_meets_in_a_new_epoch(world: World) -> None:
    world.total(1)
    for name in NAMES:
        world.restart(name)
    lost = world.total(2)
    assert lost.replies == 0 and not all(failure.refused for failure in lost.failures)
    assert world.total(3, 2).replies == 4


def test_the_same_bytes_for_one_attempt_also_after_a_restart(world: World) -> None:
    world.total(1)
    (kept,) = [
        reply for stage, reply in world.carried if stage == "input" and reply.institution == "north"
    ]
    assert isinstance(kept, Staged)
    assert [path.suffix for path in sorted((world.nodes["north"].root / "outbox").glob("*/*"))] == [
        ".reply",
        ".started",
        ".masked",
    ]
    plan = RoundPlan(RUN.digest, 0, 1, 1, START.digest)
    body = Request("input", "north", plan, b"", START.vector.tobytes()).to_bytes()
    request = request_to_bytes(SignedStage(Signed.by(COORDINATOR, STAGE_TAG, body)))
    for _ in range(2):
        assert world.nodes["north"].ask(request) == kept
        world.restart("north")
    assert world.trained("north") == 0  # of the new process: nothing


def test_a_policy_that_was_tightened_holds_for_a_masked_input_that_is_asked_for_again(
    world: World,
) -> None:
    world.total(1)
    north = world.nodes["north"]
    policy = north.folder.policy.read_text()
    plan = RoundPlan(RUN.digest, 0, 1, 1, START.digest)
    body = Request("input", "north", plan, b"", START.vector.tobytes()).to_bytes()
    request = request_to_bytes(SignedStage(Signed.by(COORDINATOR, STAGE_TAG, body)))
    north.set_policy(policy.replace("rounds = 10", "rounds = 2"))
    for data in (request, stage(RUN, name="confirm"), stage(RUN, name="open")):
        reply = north.ask(data)
        assert isinstance(reply, Decline) and "expected at most 2" in reply.reason
    north.set_policy(policy)
    assert isinstance(north.ask(request), Staged)


def test_a_revocation_ends_the_epoch(world: World) -> None:
    world.total(1)
    world.revoked = {"west"}
    found = world.total(2)
    assert found.replies == 3 and found.secure is not None and found.secure.cohort == 3
    assert [stage for stage, _ in world.carried].count("offer") == 7


def test_a_peer_that_the_operator_removed_is_in_no_cohort(world: World) -> None:
    world.total(1)
    roster.remove_peer(world.nodes["north"].folder, "west")
    found = world.total(2)
    # north goes, rather than be summed with west
    assert found.replies == 3 and world.trained("north") == 1
    assert {each.client for each in found.failures} == {"north"}


def stage(
    run: RunManifest, to: str = "north", key: Identity = COORDINATOR, name: str = "input"
) -> bytes:
    plan = RoundPlan(run.digest, 0, 1, 1, START.digest)
    vector = START.vector.tobytes() if name == "input" else b""
    return request_to_bytes(
        SignedStage(Signed.by(key, STAGE_TAG, Request(name, to, plan, b"", vector).to_bytes()))
    )


def test_what_is_promised_to_be_masked_does_not_leave_in_clear(world: World) -> None:
    north, clear = world.nodes["north"], manifest_of(epsilon=1.0)
    world.total(1)
    trained = world.trained("north")
    for data, said in (
        (task_of(RUN, 1, 2), "under masks only"),
        (stage(RUN, to="south"), "stage institution"),
        (stage(RUN, key=Identity.generate()), "fedlora-stage-1"),
        (stage(clear), "not started"),
    ):
        reply = north.ask(data)
        assert isinstance(reply, Decline) and said in reply.reason, reply
    assert world.trained("north") == trained
    entries = [entry.body["kind"] for entry in north.ledger.entries()]
    assert entries == ["open", "consent", "reserve", "commit"]


def test_a_run_in_clear_takes_no_stage_and_may_be_refused_by_policy(tmp_path: Path) -> None:
    north = Institution(tmp_path / "n")
    clear = manifest_of()
    north.begin(clear)
    reply = north.ask(stage(clear))
    assert isinstance(reply, Decline) and "without secure aggregation" in reply.reason
    assert isinstance(north.ask(task_of(clear)), Answer)
    north.set_policy(north.folder.policy.read_text() + "require_secure = true\n")
    north.ledger.close()
    north.restart()
    reply = north.ask(offer_of(replace(clear, run="2")))
    assert isinstance(reply, Decline) and "require_secure" in reply.reason and reply.refused


def test_a_liar_stays_out_when_the_coordinator_starts_again(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    found = world.total(1)
    assert found.secure is not None
    SumLog(world.folder).note(replace(found.secure, liars=("west",)))
    with (world.folder / SUMS).open("a") as stream:
        stream.write('{"attempt": 1, "lia')  # a kill
    world.cohort = cohort_of(world.who)
    assert "found 1 lines that can't be read" in caplog.text
    found = world.total(2)
    assert found.replies == 3 and [(each.client, each.reason[:8]) for each in found.failures] == [
        ("west", "left out")
    ]
    assert SumLog(world.folder).summary(RUN)["liars"] == ["west"]  # type: ignore[index]


def test_a_key_that_is_repeated_after_a_restart_costs_its_member_only(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The nodes remember it, and would refuse each list that holds it.

    So the coordinator remembers it too.
    """
    offer, before = SecureNode.offer, dict[str, bytes]()

    def repeating(node: SecureNode, epoch: Epoch) -> bytes:
        made = KeyOffer.from_bytes(offer(node, epoch))
        if made.name != "west":
            return made.to_bytes()
        made = replace(made, share_key=before.setdefault("west", made.share_key))
        return replace(made, signature=node._identity.sign(KEYS_TAG, *made.signed())).to_bytes()

    monkeypatch.setattr(SecureNode, "offer", repeating)
    assert world.total(1).replies == 4
    for attempt, reason in (
        (2, "that west signed for an earlier epoch"),
        (3, "left out: it signed a lie"),
    ):
        world.cohort = cohort_of(world.who)  # as a coordinator that was started again makes it
        found = world.total(attempt)
        assert found.replies == 3, found.failures
        (failure,) = found.failures
        assert failure.client == "west" and reason in failure.reason
    summary = SumLog(world.folder).summary(RUN)
    assert summary is not None and summary["liars"] == ["west"]


def test_a_coordinator_that_was_killed_while_masks_were_asked_for_counts_no_drop_outs(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until its second line nobody knows how many opened.

    All that is known is that the sum may have been learnt.
    """
    ask = Participants.ask

    def killed(self: Participants, stage: str, *rest: Any) -> Iterator[tuple[str, bytes | Failure]]:
        if stage == "open":
            raise KeyboardInterrupt
        return ask(self, stage, *rest)

    monkeypatch.setattr(Participants, "ask", killed)
    with pytest.raises(KeyboardInterrupt):
        world.total(1)
    summary = SumLog(world.folder).summary(RUN)
    assert summary is not None and summary["sums"] == 1 and summary["dropouts"]["open"] == 0


def test_a_node_without_enough_peers_declines_once(tmp_path: Path) -> None:
    north = Institution(tmp_path / "n")
    reply = north.ask(offer_of(RUN))
    assert (
        isinstance(reply, Decline)
        and reply.refused
        and "approved 0 peers, expected at least 2" in reply.reason
    )
    assert [entry.body["kind"] for entry in north.ledger.entries()] == ["open"]


def test_a_restored_ledger_is_noticed_by_what_left_masked(world: World, tmp_path: Path) -> None:
    """Head and ledger of the day of the consent: the masked input that left knows better."""
    north = world.nodes["north"]
    world.who.gather()
    north.ledger.close()
    kept = {
        path: path.read_bytes()
        for path in (north.root / "ledger.sqlite", north.root / "head/head.json")
    }
    world.restart("north")
    world.total(1)
    assert list(Outbox(north.root / "outbox").masked(RUN.digest).used()) == [(1, 1)]
    north.ledger.close()
    for path, data in kept.items():
        path.write_bytes(data)
        for suffix in ("-wal", "-shm"):
            path.with_name(path.name + suffix).unlink(missing_ok=True)
    with pytest.raises(Refused, match="restored from an older copy"):
        north.restart()


def opted_in(root: Path, run: RunManifest, to: str = "client_level = true") -> World:
    """A world whose policies take shared noise, and pay for it."""
    world = World(root, run)
    for node in world.nodes.values():
        text = node.folder.policy.read_text().replace("epsilon = 2.0", "epsilon = 90.0")
        node.set_policy(text.replace("[limits]", f"[limits]\n{to}"))
        node.ledger.close()
        node.restart()
    for name in NAMES:
        world.nodes[name].work.update, world.nodes[name].work.adapter = (
            world.updates[name].tobytes(),
            SPEC,
        )
    return world


def test_privacy_of_whole_institutions(tmp_path: Path) -> None:
    """The noise of the sum is at least what ε was computed for.

    A record is charged, an institution stated.
    """
    world = opted_in(tmp_path, SHARED)
    found = world.total(1)
    assert found.replies == 4 and not found.failures
    noise = found.total - np.sum(list(world.updates.values()), axis=0, dtype=np.float64)
    least = SHARED.phases[0].noise_multiplier * SHARED.phases[0].clip
    # six deviations; any two carry it all
    assert 0.87 < noise.std() / (least * np.sqrt(4 / 2)) < 1.13
    cost = guarantee_of(SHARED).charged_epsilon()
    assert {name: each.epsilon for name, each in world.who.reserved.items()} == dict.fromkeys(
        NAMES, cost
    )
    assert (
        world.nodes["east"].ledger.spent("people").epsilon
        == cost
        > guarantee_of(SHARED).stated_epsilon()
    )
    card = model_card(SHARED, dict.fromkeys(NAMES, "Org"), dict(world.who.reserved), {})
    assert (
        f"({shown_epsilon(guarantee_of(SHARED).stated_epsilon())}, 1e-05)" in card
        and "ε of a record" in card
    )
    assert f"| east | Org | {shown_epsilon(cost)} |" in card


def test_records_with_noise_that_institutions_share(tmp_path: Path) -> None:
    """What a trainer hands over in float64 is added exactly; noise and charge are as claimed."""
    world = opted_in(tmp_path, RECORDS, "shared_noise = true\nhonest_peers = 1")
    plain = np.zeros(SPEC.size)
    for place, node in enumerate(world.nodes.values()):
        step = np.random.default_rng(place).normal(0, 1e-4, SPEC.size)
        assert (step.astype(np.float32) != step).any()
        plain += step
        node.work.step = step
    found = world.total(1)
    assert found.replies == 4 and not found.failures
    phase = RECORDS.phases[0]
    whole = phase.noise_multiplier * phase.clip * phase.learning_rate / phase.expected_units
    assert 0.87 < (found.total - plain).std() / (whole * np.sqrt(4 / 2)) < 1.13
    cost = guarantee_of(RECORDS).stated_epsilon()
    reserved = {name: each.epsilon for name, each in world.who.reserved.items()}
    assert reserved == dict.fromkeys(NAMES, cost)
    card = model_card(RECORDS, dict.fromkeys(NAMES, "Org"), dict(world.who.reserved), {})
    assert f"({shown_epsilon(cost)}, 1e-05)" in card and "If all other institutions" in card


@pytest.mark.parametrize(
    ("to", "said"),
    [
        ("client_level = true", "shared_noise is false"),
        ("shared_noise = true\nhonest_peers = 2", "expected at least 2 honest peers in any sum"),
        ("shared_noise = true\nmax_colluders = 2", "expected at least this node's 2"),
    ],
)
def test_a_policy_that_asks_for_more_consents_to_no_records_with_shared_noise(
    tmp_path: Path, to: str, said: str
) -> None:
    world = opted_in(tmp_path, RECORDS, to)
    found = world.total(1)
    assert found.replies == 0 and all(failure.refused for failure in found.failures)
    assert said in found.failures[0].reason and not world.trained("east")
    assert world.nodes["east"].ledger.spent("people").epsilon == 0


def test_nobody_shares_noise_who_did_not_opt_in(tmp_path: Path) -> None:
    world = World(tmp_path, SHARED)
    found = world.total(1)
    assert found.replies == 0 and all(failure.refused for failure in found.failures)
    assert "client_level is false" in found.failures[0].reason and not world.trained("east")


def test_what_is_wrong_with_an_update_before_its_noise_is_not_told(tmp_path: Path) -> None:
    """An update longer than its clip.

    The coordinator learns that a node failed, and not how long it was.
    """
    world = opted_in(tmp_path, SHARED)
    world.nodes["north"].work.update = (100 * world.updates["north"]).astype("<f4").tobytes()
    found = world.total(1)
    (failure,) = found.failures
    assert found.replies == 3 and failure.client == "north" and failure.reason == PRIVATE_REASON
