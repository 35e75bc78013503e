"""Mode "client": noise shared under masks is never less than what ε was computed for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
import pytest

from fedlora.client.consent.judge import judge
from fedlora.client.node.outbox import MemoryOutbox
from fedlora.client.node.policy import DataPolicy, Limits, Policy, TrainerPolicy
from fedlora.client.secagg.masked_run import MaskedRun
from fedlora.client.secagg.node import SecureNode
from fedlora.common.config.load import parse_config
from fedlora.common.config.parts import Terms
from fedlora.common.errors import BadInput, Refused
from fedlora.common.ledger.ledger import Budget
from fedlora.common.manifest.manifest import RunManifest, SecureTerms, SkellamTerms
from fedlora.common.manifest.plan import RoundPlan
from fedlora.common.model.state import AdapterSpec, AdapterState, TensorSpec, Vector
from fedlora.common.privacy.accountant import Spend
from fedlora.common.privacy.calibration import LEVELS as MOST_LEVELS
from fedlora.common.privacy.figures import shown_epsilon
from fedlora.common.privacy.institution_level import InstitutionLevel
from fedlora.common.privacy.modes import guarantee_of
from fedlora.common.privacy.randomness import OsRandom
from fedlora.common.privacy.skellam import clipped, noised
from fedlora.common.protocol import stages
from fedlora.common.protocol.stages import Stage
from fedlora.common.secagg.cohort import CohortPolicy, threshold
from fedlora.common.secagg.wire import Epoch
from fedlora.common.trust.identity import PublicIdentity
from fedlora.server.defaults.decide import decided
from fedlora.server.defaults.public_facts import PublicFacts
from fedlora.server.rounds.cohort import CohortSum, Failure
from fedlora.server.runs.schedule import make_manifest
from fedlora.server.secagg.epoch import ServerEpoch
from fedlora.server.secagg.sums import SecureCohort
from tests.secure_world import IDENTITIES, node_name, peers_of
from tests.server.fakes import facts_of, manifest_of

HEAD, LORA = 100, 104_000
SPEC = AdapterSpec((TensorSpec("lora.a", (LORA,)), TensorSpec("head.weight", (HEAD,))))
SMALL = AdapterSpec((TensorSpec("lora.a", (3,)), TensorSpec("head.weight", (2,))))
LEVELS = 1 << 18
CLIP, SIGMA = 0.5, 3.0


def manifest(
    spec: AdapterSpec = SMALL, minimum: int = 3, colluders: int = 1, **changes: object
) -> RunManifest:
    """A head phase and an adapter phase of two rounds each, and a spare attempt."""
    made = manifest_of(2, 2, spare=1, mode="client", spec=spec, noise_multiplier=SIGMA, clip=CLIP)
    coordinates = (int(spec.head_mask().sum()), spec.size)
    return replace(
        made,
        minimum_cohort=minimum,
        epsilon=60.0,
        secure=SecureTerms("2n/3+1", colluders, 2, 32, LEVELS, (CLIP, CLIP)),
        skellam=SkellamTerms(coordinates, threshold(minimum) - colluders),
        **changes,  # type: ignore[arg-type]
    )


class Clipping:
    """A trainer that clips as it should; `calls` counts how often data was touched."""

    def __init__(
        self, number: int, run: RunManifest, length: float = 10.0, absent: bool = False
    ) -> None:
        self.number, self.run, self.length, self.absent, self.calls = number, run, length, absent, 0

    def delta(
        self, plan: RoundPlan, spec: AdapterSpec
    ) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
        phase = self.run.phases[plan.phase]
        drawn = np.random.default_rng([self.number, plan.round]).normal(size=spec.size)
        drawn[~spec.moved_by(phase.name)] = 0
        return clipped((self.length * drawn / np.linalg.norm(drawn)).astype(np.float32), phase.clip)

    def train(self, plan: RoundPlan, spec: AdapterSpec) -> Vector:
        if self.absent:
            raise Refused("gone")
        self.calls += 1
        return self.delta(plan, spec)


class Federation:
    """`count` institutions and an honest coordinator, in one process and without a model."""

    def __init__(
        self, count: int, run: RunManifest, spec: AdapterSpec, minimum: int = 3, colluders: int = 1
    ) -> None:
        self.run, self.state = run, AdapterState.zeros(spec)
        self.names = [node_name(number) for number in range(count)]
        self.trainers: dict[str, Clipping | Careless] = {}
        self.nodes: dict[str, MaskedRun] = {}
        for number, name in enumerate(self.names):
            policy = CohortPolicy(name, peers_of(count), minimum, colluders)
            node = SecureNode(
                IDENTITIES[number], policy, run.federation, run.digest, MemoryOutbox()
            )
            self.nodes[name] = MaskedRun(node, run)
            self.trainers[name] = Clipping(number, run)
        self.identities = {name: peer.identity for name, peer in peers_of(count).items()}
        self.cohort = SecureCohort(run, self)

    def gather(self) -> Mapping[str, PublicIdentity]:
        return self.identities

    def asked(
        self, members: Mapping[str, PublicIdentity], plan: RoundPlan
    ) -> tuple[list[str], list[Failure]]:
        return self.names, []

    def needed(self, of: int) -> int:
        return 1

    def ask(
        self, stage: str, messages: Mapping[str, bytes], plan: RoundPlan, state: AdapterState
    ) -> Iterator[tuple[str, bytes | Failure]]:
        for name, message in sorted(messages.items()):
            try:
                answer: bytes | Failure = self._answer(name, stage, message, plan)
            except (BadInput, Refused) as error:
                answer = Failure(name, str(error), isinstance(error, Refused))
            yield name, answer

    def _answer(self, name: str, stage: str, message: bytes, plan: RoundPlan) -> bytes:
        if stage != Stage.INPUT:
            return self.nodes[name].answer(stage, message, plan)
        spec = self.state.spec
        return self.nodes[name].input(
            message, plan, spec, lambda: self.trainers[name].train(plan, spec)
        )

    def round(self, number: int, attempt: int) -> CohortSum:
        phase = self.run.phase_of(number)
        plan = RoundPlan(self.run.digest, phase, number, attempt, self.state.digest)
        return self.cohort.total(plan, self.state)

    def noise(
        self, found: CohortSum, number: int, names: list[str]
    ) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        """What the sum holds beside the clipped updates, in levels."""
        plan = RoundPlan("", self.run.phase_of(number), number, 1, "")
        plain = np.zeros(self.state.spec.size)
        for name in names:
            trainer = self.trainers[name]
            assert isinstance(trainer, Clipping)
            plain += trainer.delta(plan, self.state.spec)
        return (found.total - plain) * (LEVELS / CLIP)


# --- the noise in the sum -------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "colluders", "gone"), [(5, 1, 1), (7, 2, 2), (5, 1, 0)])
def test_the_noise_of_an_unmasked_sum_is_at_least_what_is_claimed(
    count: int, colluders: int, gone: int
) -> None:
    """t of n stay. Without c colluders' shares, the rest is the claimed variance."""
    minimum = 3 if colluders == 1 else 5
    federation = Federation(count, manifest(SPEC, minimum, colluders), SPEC, colluders=colluders)
    run = federation.run
    for name in federation.names[:gone]:
        trainer = federation.trainers[name]
        assert isinstance(trainer, Clipping)
        trainer.absent = True
    found = federation.round(3, 3)
    t = threshold(count)
    assert found.replies == count - gone and (gone == 0 or found.replies == t)
    noise = federation.noise(found, 3, federation.names[gone:])
    claimed = InstitutionLevel(run).releases()[1].variance
    assert claimed == pytest.approx((SIGMA * (LEVELS + math.sqrt(SPEC.size) / 2)) ** 2)
    measured = float(np.var(noise))
    assert measured == pytest.approx(found.replies * claimed / (t - colluders), rel=0.02)
    assert measured * (t - colluders) / found.replies >= 0.98 * claimed
    assert measured > claimed and abs(noise.mean()) < 6 * math.sqrt(measured / SPEC.size)
    last = federation.trainers[federation.names[-1]]
    assert isinstance(last, Clipping)
    update = last.delta(RoundPlan("", 1, 3, 1, ""), SPEC)
    assert abs(np.corrcoef(noise, update)[0, 1]) < 6 / math.sqrt(SPEC.size)


def test_in_a_head_phase_the_head_alone_is_noised() -> None:
    federation = Federation(5, manifest(SPEC), SPEC)
    found = federation.round(1, 1)
    noise, head = federation.noise(found, 1, federation.names), SPEC.head_mask()
    assert np.abs(noise[~head]).max() < 1e-6
    # of a hundred numbers a million long one may be short: once in 12,000 times
    assert (np.abs(noise[head]) > 1).mean() > 0.97
    claimed = InstitutionLevel(federation.run).releases()[0].variance * 5 / 3  # t - c = 3
    assert np.var(noise[head]) == pytest.approx(claimed, rel=0.7)


def test_every_attempt_has_noise_of_its_own() -> None:
    federation = Federation(3, manifest(), SMALL)
    one, two = (federation.round(3, attempt) for attempt in (3, 4))
    assert one.replies == two.replies == 3 and not np.array_equal(one.total, two.total)


# --- what a node refuses --------------------------------------------------------------------------


def test_a_node_that_expects_more_colluders_than_the_others_share_for() -> None:
    """They would add the variance over t - 1: two who leave theirs out are below the claim."""
    with pytest.raises(Refused, match="expected at least this node's 2"):
        Federation(7, manifest(minimum=5), SMALL, 3, 2)
    assert Federation(7, manifest(minimum=5, colluders=2), SMALL, 3, 1).round(1, 1).replies == 7


def test_a_cohort_that_leaves_fewer_to_carry_the_noise_than_promised() -> None:
    """The manifest promises cohorts of 9, this node would take 5. Nothing trains."""
    federation = Federation(5, manifest(minimum=9), SMALL)
    with pytest.raises(Refused, match="5 members leave 3 to carry the noise, expected at least 6"):
        asked_for_input(federation)


def asked_for_input(federation: Federation) -> None:
    """By a coordinator that keeps no bound of its manifest."""
    run = federation.run
    epoch = Epoch(run.federation, run.digest, 1, 1, 2)
    identities = {name: peer.identity for name, peer in peers_of(len(federation.names)).items()}
    server = ServerEpoch(epoch, identities, 3)
    plan = RoundPlan(run.digest, 0, 1, 1, federation.state.digest)
    offer = epoch.to_bytes()

    def ask(stage: str, message: bytes) -> list[bytes]:
        return [node.answer(stage, message, plan) for node in federation.nodes.values()]

    for answer in ask("offer", offer):
        server.add_offer(answer)
    for answer in ask("deal", server.close_offers()):
        server.add_deal(answer)
    server.close_deals()
    name = federation.names[0]
    federation.nodes[name].input(server.delivery(name), plan, federation.state.spec, never)


def never() -> Vector:
    raise AssertionError("data was touched")


def test_more_colluders_than_the_cohort_bears() -> None:
    """c is the manifest's where it is the larger: nine with c = 5 would allow two lists."""
    run = manifest(minimum=9, colluders=5)
    with pytest.raises(Refused, match="allow two lists"):
        asked_for_input(Federation(9, run, SMALL, 3, 1))
    federation = Federation(9, run, SMALL, 3, 1)
    found = federation.round(1, 1)
    assert found.replies == 0 and any(
        "that bears 5 colluders" in each.reason for each in found.failures
    )
    assert all(
        each.calls == 0 for each in federation.trainers.values() if isinstance(each, Clipping)
    )


@pytest.mark.parametrize("coordinates", [(1, 5), (2, 4), (2, 6)])
def test_another_number_of_coordinates_than_a_phase_moves(coordinates: tuple[int, int]) -> None:
    run = manifest()
    assert run.skellam is not None
    federation = Federation(
        3, replace(run, skellam=replace(run.skellam, coordinates=coordinates)), SMALL
    )
    number = 1 if coordinates[0] != 2 else 3
    found = federation.round(number, number)
    assert found.replies == 0 and any("that it moves" in each.reason for each in found.failures)
    assert all(
        each.calls == 0 for each in federation.trainers.values() if isinstance(each, Clipping)
    )


class Careless:
    """Hands out an update that is longer than the clip, or that moves what its phase does not."""

    def __init__(self, *values: float) -> None:
        self.values = np.array(values, dtype=np.float32)

    def train(self, plan: RoundPlan, spec: AdapterSpec) -> Vector:
        return self.values


@pytest.mark.parametrize(
    ("values", "number", "said"),
    [
        ((0.4, 0.4, 0.0, 0.0, 0.0), 3, "expected at most"),
        ((0.1, 0.0, 0.0, 0.1, 0.1), 1, "moves nothing"),
    ],
)
def test_what_was_not_clipped_does_not_leave(
    values: tuple[float, ...], number: int, said: str
) -> None:
    federation = Federation(3, manifest(), SMALL)
    federation.trainers[federation.names[0]] = Careless(*values)
    found = federation.round(number, number)
    assert found.replies == 0 and any(said in each.reason for each in found.failures)


def test_terms_that_do_not_fit_each_other() -> None:
    run = manifest()
    assert run.secure is not None and run.skellam is not None
    for changed, said in (
        (replace(run, skellam=None), "mode"),
        (replace(run, secure=None), "mode"),
        (replace(run, skellam=replace(run.skellam, carriers=3)), "carriers"),
        (
            replace(
                run, skellam=SkellamTerms((2, 5), 1), secure=replace(run.secure, max_colluders=2)
            ),
            "carriers",
        ),
        (replace(run, skellam=replace(run.skellam, coordinates=(5,))), "coordinates"),
        (replace(run, secure=replace(run.secure, update_bounds=(CLIP, 2 * CLIP))), "update_bounds"),
        (
            replace(run, phases=(replace(run.phases[0], head_clip=0.1), run.phases[1])),
            "update_bounds",
        ),
        (replace(run, minimum_cohort=9), "carriers"),
    ):
        with pytest.raises(BadInput, match=said):
            InstitutionLevel(changed).releases()
        with pytest.raises(BadInput):
            guarantee_of(changed).charge()
        reasons = [v.reason for v in judge(changed, policy(), "test", {}) if v.field == "skellam"]
        assert reasons and all(reasons)


def test_terms_in_a_manifest_from_outside() -> None:
    run = manifest()
    assert RunManifest.from_bytes(run.to_bytes()) == run
    good = run.to_bytes().decode()
    for before, after in (
        ('"coordinates":[2,5]', '"coordinates":[0,5]'),
        ('"coordinates":[2,5]', '"coordinates":2'),
        ('"coordinates":[2,5]', '"coordinates":[true,5]'),
        ('"carriers":2', '"carriers":2.5'),
        ('"carriers":2,', ""),
    ):
        assert before in good
        with pytest.raises(BadInput, match="manifest skellam"):
            RunManifest.from_bytes(good.replace(before, after).encode())


# --- noise that can be drawn ----------------------------------------------------------------------


def asked(epsilon: float, rounds: int, coordinates: int = 1540) -> RunManifest:
    """The manifest of a run of mode "client" with `rounds` rounds of the adapter."""
    text = f"""
        [model]
        base = "minilm"
        [federation]
        rounds = {rounds}
        [privacy]
        mode = "client"
        epsilon = {epsilon}
        clip = 1.0
        [training]
        head_rounds = 0
        [aggregation]
        secure = true
    """
    settings = decided(parse_config(text), PublicFacts(20_000, 2))
    return make_manifest(Terms.of(settings), facts_of(settings, {"adapter": coordinates}))


@pytest.mark.parametrize(
    ("epsilon", "rounds"), [(3.0, 20), (1.0, 60), (0.5, 20), (2.0, 100), (0.05, 200)]
)
def test_whatever_starts_can_draw_its_noise(epsilon: float, rounds: int) -> None:
    """Few levels where there is much noise: what a node would charge for, it can release.

    Rounding is paid for.
    """
    run = asked(epsilon, rounds)
    assert run.secure is not None and run.skellam is not None
    (release,) = InstitutionLevel(run).releases()
    assert noised(
        OsRandom(), np.zeros(1540, np.int64), np.ones(1540, bool), release, run.skellam.carriers
    ).any()
    assert 0.995 * epsilon < guarantee_of(run).stated_epsilon() <= epsilon
    assert release.sensitivity < 1.01 * release.levels == 1.01 * run.secure.levels
    finer = replace(run, secure=replace(run.secure, levels=2 * run.secure.levels))
    if run.secure.levels < MOST_LEVELS:  # as many as fit
        with pytest.raises(BadInput, match="found a Poisson rate of"):
            InstitutionLevel(finer).releases()


def test_noise_that_cannot_be_drawn_is_refused_at_the_start() -> None:
    with pytest.raises(BadInput, match=r"\[privacy\] epsilon = 0.002: needs noise"):
        asked(0.002, 200, 10**8)


@pytest.mark.parametrize("sigma", [50.0, 1e60, 1e80, 1e160, 1e300])
def test_nodes_refuse_noise_that_cannot_be_drawn_before_they_consent(sigma: float) -> None:
    """σ Δ2 of 5 · 10⁸ for two carriers; and what overflows is a typed error like any other."""
    run = manifest()
    assert run.secure is not None
    fine = replace(run.secure, levels=1 << 24)
    loud = replace(
        run, secure=fine, phases=tuple(replace(p, noise_multiplier=sigma) for p in run.phases)
    )
    with pytest.raises(BadInput, match=r"noise_multiplier|Poisson rate"):
        InstitutionLevel(loud).releases()
    said = reasons(loud, policy())
    assert said["skellam"] and "projected" in said["epsilon"]
    record = replace(loud, mode="record", secure=None, skellam=None)
    assert ("phases[0].noise_multiplier" in reasons(record, policy())) == (sigma > 1e6)


# --- what it costs, and who says so ---------------------------------------------------------------


def policy(client_level: bool = True, least: float = 0.5) -> Policy:
    return policy_with(Limits(client_level=client_level, noise_multiplier=least, minimum_cohort=3))


def policy_with(limits: Limits) -> Policy:
    return Policy(
        institution="north",
        limits=limits,
        trainer=TrainerPolicy(),
        budgets={"people": Budget("people", 100.0, 1e-3)},
        data={"notes": DataPolicy("notes.jsonl", "people", labels=("a", "b"))},
        bases={"sha256:base": "x"},
        digest="",
    )


def reasons(run: RunManifest, asked: Policy, **spent: float) -> dict[str, str]:
    used = {name: [Spend(epsilon, 0.0)] for name, epsilon in spent.items()}
    return {each.field: each.reason for each in judge(run, asked, "test", used) if each.reason}


def test_a_policy_opts_in_and_projects_what_it_costs() -> None:
    run = manifest()
    assert reasons(run, policy()) == {}
    assert "client_level is false" in reasons(run, policy(client_level=False))["mode"]
    assert "expected at least 4" in reasons(run, policy(least=4.0))["phases[0].noise_multiplier"]
    assert "its schedule costs" in reasons(replace(run, epsilon=0.5), policy())["epsilon"]
    left = 100.0 - guarantee_of(run).charged_epsilon()
    step = 100.0 / 60  # what is left counts down to a step of the budget
    assert not reasons(run, policy(), people=left - step)
    assert "budget does not suffice" in reasons(run, policy(), people=left + 1e-6)["epsilon"]
    silent = replace(run, phases=(replace(run.phases[0], noise_multiplier=0.0), run.phases[1]))
    assert "no bound" in reasons(silent, policy(least=0.0))["epsilon"]
    assert "expected none" in reasons(replace(run, mode="record"), policy())["skellam"]


def test_a_budget_of_records_is_charged_for_an_update_that_becomes_any_other() -> None:
    """Zero-out is half as far as a record may move an update: its ε would be too little."""
    run = manifest()
    louder = replace(
        run, phases=tuple(replace(each, noise_multiplier=SIGMA / 2) for each in run.phases)
    )
    assert guarantee_of(run).charged_epsilon() == pytest.approx(
        guarantee_of(louder).stated_epsilon(), rel=1e-3
    )
    assert (
        guarantee_of(run).charge().epsilon
        == guarantee_of(run).charged_epsilon()
        > 1.5 * guarantee_of(run).stated_epsilon()
    )
    assert (
        guarantee_of(run).epsilon_of([3, 3])
        == guarantee_of(run).stated_epsilon()
        > guarantee_of(run).epsilon_of([3, 2])
    )


def test_the_statement_says_whose_noise_it_is() -> None:
    run = manifest()
    text = " ".join(guarantee_of(run).statement(guarantee_of(run).charged_epsilon()))
    for part in (
        f"({shown_epsilon(guarantee_of(run).stated_epsilon())}, 1e-05)",
        f"({shown_epsilon(guarantee_of(run).charged_epsilon())}, 1e-05)",
        "The unit is an institution",
        "Skellam",
        "c = 1",
        "t = ⌊2n/3⌋ + 1",
        "at least 2",
        "3 sums of 2 coordinates",
    ):
        assert part in text


def test_bounds_of_the_sum() -> None:
    run = manifest(SPEC)
    assert InstitutionLevel.coordinate_bound(run.phases[0]) == CLIP
    noise = guarantee_of(run).member_noise(1)
    assert noise == pytest.approx(
        SIGMA * (LEVELS + math.sqrt(SPEC.size) / 2) / math.sqrt(2), rel=1e-9
    )
    bound = guarantee_of(run).update_bound(1, SPEC.size)
    assert (
        CLIP * noise * math.sqrt(SPEC.size) / LEVELS
        < bound
        < 1.2 * CLIP * noise * math.sqrt(SPEC.size) / LEVELS
    )
    assert run.secure is not None
    encoding = stages.encoding_of(run.secure, 1, SPEC.size, noise)
    assert encoding.reach(5) == 5 * LEVELS + 10 * noise * math.sqrt(5)
    assert not replace(encoding, levels=1 << 22, noise=noise * 512).fits(5)
    with pytest.raises(BadInput, match="noise"):
        replace(encoding, noise=math.nan)
