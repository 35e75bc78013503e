"""Nothing is charged before there is a cohort, and a coordinator starts no other than it offered.

Before: an offer reserved the whole schedule. One refusal, or one wrong clock, charged all others
for rounds that never ran; consents that cost next to nothing kept up to 64 MB each; and 22 offers
told all of what a budget had left.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.client.consent import promise
from fedlora.client.consent.judge import judge
from fedlora.client.node import waiting_runs as offers
from fedlora.client.node.outbox import Outbox
from fedlora.client.node.policy import parse_policy
from fedlora.client.node.waiting_runs import MOST, Offers
from fedlora.client.service import answer_start
from fedlora.common.ledger.ledger import Budget
from fedlora.common.manifest import manifest as manifests
from fedlora.common.manifest.manifest import version_of
from fedlora.common.manifest.plan import RoundPlan
from fedlora.common.model.state import AdapterState
from fedlora.common.privacy.accountant import Spend
from fedlora.common.privacy.figures import exact
from fedlora.common.privacy.modes import guarantee_of
from fedlora.common.protocol.messages import Answer, Consent, Started
from fedlora.common.trust.identity import Identity
from fedlora.server.coordinator.coordinator import Coordinator
from fedlora.server.deployment.cohorts import ClearCohort
from fedlora.server.deployment.participants import Participants
from fedlora.server.rounds.cohort import CohortSum, Failure
from tests.client.institution import (
    ADAPTER_SPEC,
    BASE,
    COORDINATOR,
    OTHERS,
    PHASE,
    POLICY,
    FakeWork,
    Institution,
    declined,
    manifest_of,
    offer_of,
    start_of,
    task_of,
)
from tests.server.fakes import ByAsking

RUN = manifest_of(spec_digest=ADAPTER_SPEC.digest)
COST = guarantee_of(RUN).charge().epsilon
NAMES = ("east", "north", "south", "west")
ZEROS = AdapterState(ADAPTER_SPEC, np.zeros(ADAPTER_SPEC.size, np.float32))
now = time.time


class Federation(ByAsking):
    """Real nodes behind the deployment's cohort; `late` is by how many seconds a clock is ahead."""

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        self.nodes = {name: Institution(root / name, name, f"The {name}") for name in NAMES}
        for node in self.nodes.values():
            node.work.update = ZEROS.vector.tobytes()
        self.late: dict[str, float] = {}
        self.lost: set[str] = set()  # whose next answer is lost on its way
        self._root, self._patch = root, patch
        self.resume()

    def resume(self) -> None:
        """As a coordinator that was started again."""
        members = {name: node.identity.public for name, node in self.nodes.items()}
        coordinator = Coordinator("f", COORDINATOR, lambda: members)
        self.who = Participants(
            RUN, coordinator, self, self._root / "run", len(NAMES), 5.0, sleep=lambda _: None
        )
        (self._root / "run").mkdir(exist_ok=True)
        self.cohort = ClearCohort(self.who)

    def online(self) -> set[str]:
        return set(self.nodes)

    def ask(
        self, requests: Mapping[str, bytes], deadline: float
    ) -> Iterator[tuple[str, bytes | Failure]]:
        for name, data in requests.items():
            self._patch.setattr(time, "time", lambda name=name: now() + self.late.get(name, 0.0))
            answer = self.nodes[name].resident.ask(data)
            self._patch.setattr(time, "time", now)
            if name in self.lost:
                self.lost.remove(name)
                yield name, Failure(name, "lost")
            else:
                yield name, answer

    def total(self, attempt: int) -> CohortSum:
        return self.cohort.total(RoundPlan(RUN.digest, 0, 1, attempt, ZEROS.digest), ZEROS)

    def spent(self) -> dict[str, float]:
        return {name: node.ledger.spent("people").epsilon for name, node in self.nodes.items()}


@pytest.fixture
def federation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Federation:
    return Federation(tmp_path, monkeypatch)


@pytest.fixture
def north(tmp_path: Path) -> Institution:
    return Institution(tmp_path / "node")


def forbid(node: Institution) -> None:
    text = node.folder.policy.read_text()
    node.set_policy(text.replace("rounds = 10", "rounds = 2"))


def test_what_an_earlier_node_does_not_know_it_declines_before_it_is_charged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the version, which a manifest moves for a new use of what it always could say: before, a
    head phase of words was charged, and failed in its first round.
    """
    words = replace(RUN.network, pooling="words")
    phases = (replace(PHASE, name="head"), PHASE)
    pairs = replace(RUN.network, pooling="pairs")
    assert version_of(words, phases) == version_of(pairs, phases[1:]) == 2
    assert version_of(words, phases[1:]) == version_of(RUN.network, phases) == RUN.version == 1
    run = manifest_of(*phases, spec_digest=ADAPTER_SPEC.digest, version=2)
    north = Institution(tmp_path)
    with monkeypatch.context() as earlier:
        earlier.setattr(manifests, "VERSION", 1)
        assert "manifest version: found 2" in declined(north, offer_of(run)).reason
    later = replace(run, version=3)
    assert "manifest version: found 3" in declined(north, offer_of(later)).reason
    assert [entry.body["kind"] for entry in north.ledger.entries()] == ["open"]
    assert isinstance(north.ask(offer_of(run)), Consent)


def test_one_refusal_charges_nobody(federation: Federation) -> None:
    before = federation.spent()
    forbid(federation.nodes["west"])
    found = federation.total(1)
    assert found.replies == 0 and {each.client for each in found.failures} == {"west", "cohort"}
    assert all(each.refused for each in found.failures), "the run ends"
    assert federation.spent() == before == dict.fromkeys(NAMES, 0.0)


def test_one_wrong_clock_charges_nobody(federation: Federation) -> None:
    before = federation.spent()
    federation.late["west"] = 3600.0
    assert federation.total(1).replies == 0
    assert federation.spent() == before
    federation.late.clear()
    federation.resume()
    assert federation.total(2).replies == 4
    assert federation.spent() == dict.fromkeys(NAMES, COST)


def test_a_lost_acknowledgement_reserves_once_and_is_asked_for_again(
    federation: Federation,
) -> None:
    answers = []
    ask = federation.nodes["west"].resident.ask

    def heard(data: bytes) -> bytes:
        answers.append(ask(data))
        if len(answers) == 2:  # a consent, then the acknowledgement
            federation.lost.add("west")
        return answers[-1]

    federation.nodes["west"].resident.ask = heard  # type: ignore[method-assign]
    assert federation.total(1).replies == 0, "everybody is needed"
    federation.resume()
    assert federation.total(2).replies == 4 and answers[2] == answers[1]
    assert federation.spent() == dict.fromkeys(NAMES, COST)
    kinds = [entry.body["kind"] for entry in federation.nodes["west"].ledger.entries()]
    assert kinds == ["open", "consent", "reserve", "commit"]


def test_a_policy_that_was_tightened_since_the_consent_starts_nothing(north: Institution) -> None:
    consent = north.resident.ask(offer_of(RUN))
    forbid(north)
    reply = declined(north, start_of(RUN, {"north": consent, **OTHERS}))
    assert "expected at most 2" in reply.reason and reply.refused
    assert north.ledger.spent("people").epsilon == 0


def test_nothing_trains_before_its_start(north: Institution) -> None:
    assert isinstance(north.ask(offer_of(RUN)), Consent)
    assert "which was not started" in declined(north, task_of(RUN)).reason
    assert north.ledger.spent("people").epsilon == 0 and not north.work.trained


Starts = Callable[[bytes], bytes]  # the start that a hostile coordinator makes of a consent
BAD_STARTS: dict[str, tuple[Starts, str]] = {
    "without it": (lambda own: start_of(RUN, {**OTHERS, "others-3": b"3"}), "found no consent"),
    "another's consent": (lambda own: start_of(RUN, {"north": b"4", **OTHERS}), "this node's last"),
    "too few": (lambda own: start_of(RUN, {"north": own, "south": b"1"}), "found 2 institutions"),
    "alone": (lambda own: start_of(RUN, {"north": own}), "expected at least 3"),
    "a stranger's": (
        lambda own: start_of(RUN, {"north": own, **OTHERS}, Identity.generate()),
        "fedlora-start-1",
    ),
    "of another run": (
        lambda own: start_of(replace(RUN, run="2"), {"north": own, **OTHERS}),
        "was not consented to",
    ),
}


@pytest.mark.parametrize("name", BAD_STARTS)
def test_another_cohort_than_offered_is_not_started(north: Institution, name: str) -> None:
    make, reason = BAD_STARTS[name]
    consent = north.resident.ask(offer_of(RUN))
    assert reason in declined(north, make(consent)).reason
    assert north.ledger.spent("people").epsilon == 0
    assert isinstance(north.ask(start_of(RUN, {"north": consent, **OTHERS})), Started)


def test_as_many_are_started_as_the_manifest_promised(north: Institution) -> None:
    """Where that is more than the policy's least."""
    run = replace(RUN, minimum_cohort=4)
    consent = north.resident.ask(offer_of(run))
    reply = declined(north, start_of(run, {"north": consent, **OTHERS}))
    assert "found 3 institutions, expected at least 4" in reply.reason


def test_a_start_for_one_node_starts_no_other(federation: Federation) -> None:
    consents = {name: federation.nodes[name].resident.ask(offer_of(RUN, to=name)) for name in NAMES}
    start = start_of(RUN, {name: consents[name] for name in NAMES if name != "south"})
    assert "found no consent" in declined(federation.nodes["south"], start).reason
    assert isinstance(federation.nodes["north"].ask(start), Started)
    assert federation.spent() == dict.fromkeys(NAMES, 0.0) | {"north": COST}


def test_a_consent_ends(north: Institution, monkeypatch: pytest.MonkeyPatch) -> None:
    consent = north.resident.ask(offer_of(RUN))
    start = start_of(RUN, {"north": consent, **OTHERS})
    monkeypatch.setattr(time, "time", lambda: now() + 7200)
    reply = declined(north, start)
    assert "offer not_after" in reply.reason and not reply.refused
    assert north.ledger.spent("people").epsilon == 0
    assert north.resident.ask(offer_of(RUN)) == consent, "offered anew"
    assert isinstance(north.ask(start), Started)


def test_an_offer_is_not_kept_alive_for_ever(north: Institution) -> None:
    assert isinstance(north.ask(offer_of(RUN, seconds=6.9 * 86_400)), Consent)
    reply = north.ask(offer_of(RUN, seconds=7.1 * 86_400))
    assert "an offer for too long" in getattr(reply, "reason", "")


def test_a_start_is_answered_by_the_same_bytes_and_another_never(
    north: Institution, monkeypatch: pytest.MonkeyPatch
) -> None:
    consent = north.resident.ask(offer_of(RUN))
    start = start_of(RUN, {"north": consent, **OTHERS})
    first = north.resident.ask(start)
    assert isinstance(north.read(first), Started)
    monkeypatch.setattr(time, "time", lambda: now() + 30 * 86_400)
    policy = north.folder.policy.read_text()
    for line in ("", "rank = 63\n"):
        north.set_policy(policy + line)
        assert north.resident.ask(start) == first
        north.ledger.close()
        north.restart()
    other = start_of(RUN, {"north": consent, **OTHERS, "others-3": b"3"})
    assert "answered for another request" in declined(north, other).reason
    forbid(north)
    assert "expected at most 2" in declined(north, start).reason, "the present policy decides"


class Killed(BaseException):
    """What no handler of errors catches."""


def killed_at(north: Institution, owner: object, step: str, after: bool, data: bytes) -> None:
    """A request whose node is killed before or after a step of its answer, and started again."""
    original = getattr(owner, step)

    def killed(*arguments: Any, **options: Any) -> Any:
        if after:
            original(*arguments, **options)
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, step, killed)
        with pytest.raises(Killed):
            north.resident.ask(data)
    north.ledger.close()
    north.restart()


MOMENTS: list[tuple[type, str]] = [
    (FakeWork, "consent"), (Offers, "begin"), (Outbox, "write"), (Offers, "read"),
]  # fmt: skip


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(("owner", "step"), MOMENTS, ids=[step for _, step in MOMENTS])
@pytest.mark.parametrize("flooded", [False, True])
def test_a_kill_reserves_nothing_twice_and_loses_nothing(
    north: Institution, owner: type, step: str, after: bool, flooded: bool
) -> None:
    """Killed around each step of a start; `flooded`: with newer offers before it comes again."""
    start = start_of(RUN, {"north": north.resident.ask(offer_of(RUN)), **OTHERS})
    killed_at(north, owner, step, after, start)
    reserved = north.ledger.spent("people").epsilon > 0
    for number in range(MOST + 1 if flooded else 0):
        assert isinstance(north.ask(offer_of(replace(RUN, run=f"later {number}"))), Consent)
    if flooded and not reserved:
        assert "gave way" in declined(north, start).reason
        return
    assert isinstance(north.ask(start), Started)
    assert isinstance(north.ask(task_of(RUN)), Answer)
    kinds = [entry.body["kind"] for entry in north.ledger.entries()]
    assert kinds == ["open", "consent", "reserve", "commit"]


UNPROTECTED = manifest_of(replace(PHASE, noise_multiplier=0.0), mode="none", epsilon=0.0)
CHARGED: list[tuple[object, str, bool]] = [  # what a kill is before or after
    (FakeWork, "consent", True), (Offers, "begin", False), (Offers, "begin", True),
    (answer_start, "note", False), (answer_start, "note", True), (Outbox, "write", False),
]  # fmt: skip


@pytest.mark.parametrize("mode", ["record", "none"])
@pytest.mark.parametrize(("owner", "step", "after"), CHARGED)
def test_once_charged_no_other_cohort_is_started_though_a_kill_came_first(
    north: Institution, owner: object, step: str, after: bool, mode: str
) -> None:
    """Before, a start that a kill left without an acknowledgement gave way to another one."""
    north.set_policy(north.folder.policy.read_text() + "allow_unnoised = true\n")
    run = RUN if mode == "record" else UNPROTECTED
    consent = north.resident.ask(offer_of(run))
    start = start_of(run, {"north": consent, **OTHERS})
    killed_at(north, owner, step, after, start)
    if mode == "none" and not north.folder.manifest(run.digest).exists():
        return  # nothing was charged, nor moved: it has not begun
    assert north.resident.ask(offer_of(run)) == consent, "what the start names"
    other = start_of(run, {"north": consent, "others-3": b"3", "others-4": b"4"})
    reply = declined(north, other)
    assert reply.refused and "which the run was charged for: a rewind" in reply.reason
    assert isinstance(north.ask(start), Started)
    assert "answered for another request" in declined(north, other).reason
    assert isinstance(north.ask(task_of(run)), Answer)


def test_before_it_is_charged_a_start_binds_to_nothing(north: Institution) -> None:
    consent = north.resident.ask(offer_of(RUN))
    killed_at(north, FakeWork, "consent", False, start_of(RUN, {"north": consent, **OTHERS}))
    assert north.ledger.spent("people").epsilon == 0
    assert isinstance(north.ask(start_of(RUN, {"north": consent, "x": b"1", "y": b"2"})), Started)


def test_consents_that_never_start_fill_no_disk(north: Institution) -> None:
    """Each may be offered with a projection of 64 MB."""
    first = north.resident.ask(offer_of(RUN))
    for number in range(3 * MOST):
        assert isinstance(north.ask(offer_of(replace(RUN, run=f"free {number}"))), Consent)
    kept = [path for path in north.folder.offers.iterdir() if path.is_dir()]
    assert len(kept) == MOST and not north.folder.runs.exists()
    assert not list(north.folder.under("outbox").rglob("*.reply"))
    assert "gave way" in declined(north, start_of(RUN, {"north": first, **OTHERS})).reason


def test_new_runs_a_day_are_counted(north: Institution, monkeypatch: pytest.MonkeyPatch) -> None:
    north.set_policy(north.folder.policy.read_text() + "offers = 3\n")
    for number in range(3):
        assert isinstance(north.ask(offer_of(replace(RUN, run=f"{number}"))), Consent)
    north.ledger.close()
    north.restart()
    reply = declined(north, offer_of(replace(RUN, run="3")))
    assert "expected at most 3 a day" in reply.reason and not reply.refused
    again = [north.ask(offer_of(replace(RUN, run=f"{number}"))) for number in range(3)]
    assert all(isinstance(each, Consent) for each in again), "the same runs are no new ones"

    class Tomorrow:
        @staticmethod
        def now(zone: object) -> datetime:
            return datetime.fromtimestamp(now() + 86_400, UTC)

    monkeypatch.setattr(offers, "datetime", Tomorrow)
    assert isinstance(north.ask(offer_of(replace(RUN, run="3"))), Consent)


def bisected(steps: int, spent: float) -> tuple[float, float]:
    """Between what a coordinator knows of what is left, after 22 offers."""
    limits = f"[limits]\nbudget_steps = {steps}\n"
    policy = parse_policy(POLICY.format(base=BASE, folder="base").replace("[limits]\n", limits))
    low, high, noise = 0.0, 2.0, [0.6, 40.0]
    for _ in range(22):
        middle = sum(noise) / 2
        run = manifest_of(replace(PHASE, noise_multiplier=middle), epsilon=2.0)
        cost = guarantee_of(run).charge().epsilon
        fits = all(each.allowed for each in judge(run, policy, "f", {"people": [Spend(spent, 0)]}))
        noise[fits] = middle
        low, high = (max(low, cost), high) if fits else (low, min(high, cost))
    return low, high


def test_what_a_budget_has_left_is_not_bisected_finer_than_its_steps() -> None:
    one, other = (bisected(60, spent) for spent in (1.501, 1.532))
    print("22 offers against 60 steps:", one, "and against", bisected(1_000_000, 1.501))
    assert one == other, "two rests of one step are told apart"
    low, high = bisected(1_000_000, 1.501)
    assert high - low < 0.001 and low < 2.0 - 1.501 < high + 1e-5, "the attack works without steps"


def located(others: list[Spend], steps: int) -> tuple[float, float]:
    """Between what a coordinator that starts cheap runs knows of what others left of 2.0.

    It finds the step in which the rest lies, then moves the rest over the grid by a sixteenth of a
    step at a time, each a started run, until a run that fitted does not.
    """
    budget, step, cheap = Budget("people", 2.0, 1.0), 2.0 / steps, Spend(2.0 / steps / 16, 1e-9)
    charges = list(others)

    def fits(count: int) -> bool:
        cost = Spend(count * step * (1 - 1e-9), 1e-9)
        return not promise._beyond(budget, charges, cost, steps)

    most = max(count for count in range(steps) if fits(count))
    while fits(most):
        charges.append(cheap)
    paid = (len(charges) - len(others)) * cheap.epsilon
    return most * step + paid - cheap.epsilon, most * step + paid


def test_cheap_runs_do_not_move_the_rest_over_the_steps() -> None:
    """Before, 16 started runs and 22 offers told what is left to a sixteenth of a step."""
    spends = (1.501, 1.506, 1.513, 1.520, 1.531)
    assert len({located([Spend(spent, 1e-9)], 60) for spent in spends}) == 1


@given(
    st.lists(st.floats(1e-6, 0.5), max_size=8),
    st.lists(st.floats(1e-6, 0.5), max_size=8),
    st.floats(1e-6, 2.0),
    st.integers(1, 200),
)
def test_others_decide_by_their_number_of_steps_and_no_cap_is_passed(
    others: list[float], own: list[float], asked: float, steps: int
) -> None:
    budget, step = Budget("people", 2.0, 1.0), exact(2.0) / steps
    taken = sum(math.ceil(exact(each) / step) for each in others)
    same = [Spend(2.0 / steps * (1 - 1e-9), 0.0)] * taken  # as many steps, of another total
    answers = {
        promise._beyond(budget, [*each, *(Spend(e, 0.0) for e in own)], Spend(asked, 0.0), steps)
        == ""
        for each in ([Spend(e, 0.0) for e in others], same)
    }
    assert len(answers) == 1
    if answers == {True}:
        assert sum(map(exact, (*others, *own, asked))) <= 2


def test_an_earlier_runs_folder_without_a_manifest_is_no_obstacle(north: Institution) -> None:
    """A kill of the version before, between the projection's file and the manifest's."""
    north.folder.run(RUN.digest).mkdir(parents=True)
    (north.folder.run(RUN.digest) / "projection.safetensors").write_bytes(b"")
    north.begin(RUN)
    assert isinstance(north.ask(task_of(RUN)), Answer)


def test_a_run_that_was_consented_to_before_there_were_starts_goes_on(north: Institution) -> None:
    """Charged at its consent: its tasks are answered, and a start charges nothing more."""
    north.begin(RUN)
    run = north.folder.run(RUN.digest)
    for name in (offers.ADDRESS, offers.CONSENT, offers.NAMED, offers.CHECKED):
        (run / name).unlink()
    (started,) = north.folder.under("outbox").rglob("*.started")
    started.unlink()
    shutil.rmtree(north.folder.offers)
    assert isinstance(north.ask(task_of(RUN)), Answer)
    entries = [entry.hash for entry in north.ledger.entries()]
    north.begin(RUN)
    assert [entry.hash for entry in north.ledger.entries()] == entries
    assert isinstance(north.ask(task_of(RUN, attempt=2)), Answer)
