"""Records with shared noise: a sum has the noise that is claimed, whatever who cheats; an audit.

The state machines, encoding and noise are the real ones; a trainer adds up clipped units.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import pytest
from scipy.stats import beta

from fedlora.client.node.policy import Limits, Policy
from fedlora.common.errors import BadInput, Refused
from fedlora.common.manifest.manifest import RunManifest, SecureTerms, SkellamTerms
from fedlora.common.manifest.plan import Delta, RoundPlan
from fedlora.common.model.state import AdapterSpec
from fedlora.common.privacy.figures import shown_epsilon
from fedlora.common.privacy.modes import guarantee_of
from fedlora.common.privacy.randomness import OsRandom, bernoulli
from fedlora.common.privacy.shared_record_level import SharedRecordLevel
from fedlora.common.privacy.skellam import Ints, skellam
from fedlora.common.privacy.unit_release import ROOM, UnitRelease
from fedlora.common.secagg.cohort import threshold
from fedlora.common.secagg.ring import Encoding
from tests.client.secagg.test_shared_noise import (
    SMALL,
    SPEC,
    Federation,
    asked_for_input,
    policy_with,
    reasons,
)
from tests.server.fakes import manifest_of

CLIP, SIGMA, RATE, EXPECTED, STEP = 0.5, 3.0, 0.25, 16.0, 0.2
LEVELS = 1 << 24
BOUND = 2 * STEP * CLIP


def manifest(
    spec: AdapterSpec = SMALL, minimum: int = 3, colluders: int = 1, largest: int = 9
) -> RunManifest:
    """A head phase and an adapter phase of two rounds each, and a spare attempt."""
    made = manifest_of(
        2,
        2,
        spare=1,
        mode="shared-record",
        spec=spec,
        noise_multiplier=SIGMA,
        clip=CLIP,
        sampling_rate=RATE,
        expected_units=EXPECTED,
        learning_rate=STEP,
    )
    coordinates = (int(spec.head_mask().sum()), spec.size)
    return replace(
        made,
        minimum_cohort=minimum,
        largest_cohort=largest,
        epsilon=60.0,
        secure=SecureTerms("2n/3+1", colluders, 2, 32, LEVELS, (BOUND, BOUND)),
        skellam=SkellamTerms(coordinates, threshold(minimum) - colluders),
    )


@dataclass
class Summing:
    """A trainer whose units are clipped as they should be; the same at each call."""

    number: int
    run: RunManifest
    units: int = 40
    absent: bool = False
    calls: int = field(default=0, init=False)

    def delta(self, plan: RoundPlan, spec: AdapterSpec) -> npt.NDArray[np.float64]:
        phase = self.run.phases[plan.phase]
        rows = np.random.default_rng([self.number, plan.round]).normal(size=(self.units, spec.size))
        rows[:, ~spec.moved_by(phase.name)] = 0
        rows *= phase.clip / np.linalg.norm(rows, axis=1, keepdims=True)
        summed: npt.NDArray[np.float64] = rows.sum(axis=0)
        return summed * (-phase.learning_rate / phase.expected_units)

    def train(self, plan: RoundPlan, spec: AdapterSpec) -> Delta:
        if self.absent:
            raise Refused("gone")
        self.calls += 1
        return self.delta(plan, spec)


class Silent(SharedRecordLevel):
    """The guarantee of an institution that keeps its part of the noise to itself."""

    def noised(self, levels: Ints, plan: RoundPlan, spec: AdapterSpec, members: int) -> Ints:
        return levels


class Records(Federation):
    """The same state machines, with sums of units in place of clipped updates."""

    def __init__(
        self, count: int, run: RunManifest, spec: AdapterSpec, minimum: int = 3, colluders: int = 1
    ) -> None:
        super().__init__(count, run, spec, minimum, colluders)
        self.summing = {name: Summing(place, run) for place, name in enumerate(self.names)}
        self.trainers = self.summing  # type: ignore[assignment]

    def silence(self, names: list[str]) -> None:
        for name in names:
            self.nodes[name]._guarantee = Silent(self.run)

    def measured(self, number: int, attempts: range, gone: int = 0) -> float:
        """Deviation of what unmasked sums hold beside the units, over what is claimed."""
        found = []
        for attempt in attempts:
            total = self.round(number, attempt)
            assert total.replies == len(self.names) - gone and len(total.failures) == gone
            plan = RoundPlan("", self.run.phase_of(number), number, 1, "")
            here = [self.summing[name] for name in self.names[gone:]]
            plain = sum(each.delta(plan, self.state.spec) for each in here)
            found.append((total.total - plain) * (LEVELS / BOUND))
        noise = np.concatenate(found)
        assert abs(noise.mean()) < 6 * noise.std() / math.sqrt(noise.size)
        claimed = SharedRecordLevel(self.run).releases()[self.run.phase_of(number)].variance
        return float(noise.std() / math.sqrt(claimed))


# --- the noise in the sum -------------------------------------------------------------------------


def test_the_noise_of_unmasked_sums_is_what_is_claimed() -> None:
    """All five stay: five parts of a third each. Within 1 %, over 200,000 draws."""
    federation = Records(5, manifest(SPEC), SPEC)
    claimed = SharedRecordLevel(federation.run).releases()[1].variance
    clip = LEVELS / (2 * EXPECTED)
    assert claimed == (SIGMA * (clip * (1 + ROOM) + math.sqrt(SPEC.size))) ** 2
    assert federation.measured(3, range(3, 5)) == pytest.approx(math.sqrt(5 / 3), rel=0.01)


@pytest.mark.parametrize(("count", "colluders", "minimum"), [(5, 1, 3), (7, 2, 5)])
def test_it_is_the_whole_where_some_drop_out_and_c_add_none(
    count: int, colluders: int, minimum: int
) -> None:
    """t inputs, of which c are without noise: the honest ones carry what ε was computed for."""
    federation = Records(count, manifest(SPEC, minimum, colluders), SPEC, colluders=colluders)
    gone = count - threshold(count)
    for name in federation.names[:gone]:
        federation.summing[name].absent = True
    federation.silence(federation.names[-colluders:])
    assert federation.measured(3, range(3, 5), gone) == pytest.approx(1, rel=0.01)


def test_one_that_cheats_more_than_was_assumed_is_seen_in_the_figures() -> None:
    """What the tests above would show if parts were too small: they can fail."""
    federation = Records(5, manifest(SPEC), SPEC)
    federation.silence(federation.names[-3:])
    assert federation.measured(3, range(3, 4)) == pytest.approx(math.sqrt(2 / 3), rel=0.01)


def test_a_head_phase_noises_the_head_alone_and_each_attempt_anew() -> None:
    federation = Records(5, manifest(SPEC), SPEC)
    one, two = (federation.round(1, attempt) for attempt in (1, 2))
    head = SPEC.head_mask()
    assert not one.total[~head].any() and (one.total[head] != two.total[head]).all()


# --- what a node refuses --------------------------------------------------------------------------


def never_trained(federation: Records) -> bool:
    return all(each.calls == 0 for each in federation.summing.values())


def test_a_cohort_too_small_or_too_large_for_the_parts() -> None:
    federation = Records(5, manifest(minimum=9), SMALL)
    with pytest.raises(Refused, match="5 members leave 3 to carry the noise, expected at least 6"):
        asked_for_input(federation)
    many = Records(7, manifest(largest=5), SMALL)
    with pytest.raises(Refused, match="7 members, of whose noise each adds less"):
        asked_for_input(many)
    assert never_trained(federation) and never_trained(many)


def test_an_honest_coordinator_leaves_out_who_is_too_many() -> None:
    federation = Records(7, manifest(largest=5), SMALL)
    found = federation.round(1, 1)
    assert found.replies == 5
    assert [each.reason for each in found.failures] == [
        "left out: the manifest has cohorts of 5 at most"
    ] * 2


def test_a_node_that_expects_more_colluders() -> None:
    with pytest.raises(Refused, match="expected at least this node's 2"):
        Records(7, manifest(minimum=5), SMALL, 3, 2)


@pytest.mark.parametrize("coordinates", [(1, 5), (2, 4), (2, 6)])
def test_another_number_of_coordinates_than_a_phase_moves(coordinates: tuple[int, int]) -> None:
    run = manifest()
    guarantee_of(run).check_network(SMALL)
    run = replace(run, skellam=SkellamTerms(coordinates, 2))
    with pytest.raises(BadInput, match="that it moves"):  # before anything is charged, too
        guarantee_of(run).check_network(SMALL)
    federation = Records(3, run, SMALL)
    number = 1 if coordinates[0] != 2 else 3
    found = federation.round(number, number)
    assert found.replies == 0 and any("that it moves" in each.reason for each in found.failures)
    assert never_trained(federation)


def test_an_update_where_the_phase_moves_nothing() -> None:
    federation = Records(3, manifest(), SMALL)
    careless = federation.summing[federation.names[0]]
    careless.delta = lambda plan, spec: np.full(spec.size, 0.01)  # type: ignore[method-assign]
    found = federation.round(1, 1)
    assert found.replies == 0 and any("moves nothing" in each.reason for each in found.failures)


def changed_phase(**values: object) -> Callable[[RunManifest], RunManifest]:
    return lambda run: replace(run, phases=(replace(run.phases[0], **values), run.phases[1]))  # type: ignore[arg-type]


def changed_secure(**values: object) -> Callable[[RunManifest], RunManifest]:
    def change(run: RunManifest) -> RunManifest:
        assert run.secure is not None
        return replace(run, secure=replace(run.secure, **values))  # type: ignore[arg-type]

    return change


FAULTS: dict[str, tuple[Callable[[RunManifest], RunManifest], str]] = {
    "no-terms": (lambda run: replace(run, skellam=None), "mode"),
    "in-clear": (lambda run: replace(run, secure=None), "mode"),
    "more-carriers": (lambda run: replace(run, skellam=SkellamTerms((2, 5), 3)), "carriers"),
    "one-carrier": (
        lambda run: replace(changed_secure(max_colluders=2)(run), skellam=SkellamTerms((2, 5), 1)),
        "carriers",
    ),
    "a-phase-less": (lambda run: replace(run, skellam=SkellamTerms((5,), 2)), "coordinates"),
    "another-minimum": (lambda run: replace(run, minimum_cohort=9), "carriers"),
    "no-largest": (lambda run: replace(run, largest_cohort=2), "largest_cohort"),
    "two-steps": (changed_phase(steps=2), "steps: found 2, expected 1"),
    "adamw": (changed_phase(optimizer="adamw"), "optimizer: found 'adamw', expected sgd"),
    "two-clips": (changed_phase(head_clip=0.1), "head_clip"),
    "finer-levels-of-a-clip": (changed_secure(update_bounds=(BOUND, BOUND / 2)), "update_bounds"),
    "coarser-levels-of-a-clip": (changed_phase(learning_rate=2 * STEP), "update_bounds"),
    "coarse": (changed_secure(levels=64), "rounding"),
    "hidden-head": (
        lambda run: replace(run, network=replace(run.network, head_hidden=8)),
        "head_hidden: found 8, expected 0",
    ),
    "no-units": (changed_phase(expected_units=0.0), "expected_units"),
    "hardly-a-unit": (changed_phase(expected_units=1e-320), "expected_units"),
    "loud": (changed_phase(noise_multiplier=1e300), "noise_multiplier"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_terms_that_do_not_fit_each_other(name: str) -> None:
    change, said = FAULTS[name]
    changed = change(manifest())
    with pytest.raises(BadInput, match=said):
        SharedRecordLevel(changed).releases()
    with pytest.raises(BadInput):
        guarantee_of(changed).charge()
    assert reasons(changed, policy())["skellam"]


def test_a_manifest_says_what_it_said_and_an_old_one_has_no_largest_cohort() -> None:
    run = manifest()
    assert RunManifest.from_bytes(run.to_bytes()) == run
    assert b"largest_cohort" not in replace(run, largest_cohort=0).to_bytes()
    with pytest.raises(BadInput, match="manifest largest_cohort"):
        RunManifest.from_bytes(run.to_bytes().replace(b'cohort":9', b'cohort":-9'))


# --- what it costs, and who says so ---------------------------------------------------------------


def policy(shared_noise: bool = True, honest_peers: int = 1, least: float = 0.5) -> Policy:
    return policy_with(
        Limits(
            shared_noise=shared_noise,
            honest_peers=honest_peers,
            noise_multiplier=least,
            minimum_cohort=3,
        )
    )


def test_a_policy_opts_in_with_its_own_number_of_honest_peers() -> None:
    run = manifest(minimum=5)
    assert reasons(run, policy()) == {} == reasons(run, policy(honest_peers=2))
    assert "shared_noise is false" in reasons(run, policy(shared_noise=False))["mode"]
    assert (
        reasons(run, policy(honest_peers=3))["skellam"]
        == "expected at least 3 honest peers in any sum; found 2"
    )
    assert "expected at least 4" in reasons(run, policy(least=4.0))["phases[0].noise_multiplier"]
    assert "its schedule costs" in reasons(replace(run, epsilon=0.5), policy())["epsilon"]
    left = 100.0 - guarantee_of(run).charged_epsilon()
    assert "budget does not suffice" in reasons(run, policy(), people=left + 1e-6)["epsilon"]
    silent = replace(run, phases=(replace(run.phases[0], noise_multiplier=0.0), run.phases[1]))
    assert "no bound" in reasons(silent, policy(least=0.0))["epsilon"]
    own = replace(run, mode="record")
    assert "expected none" in reasons(own, policy())["skellam"]
    assert "expected none" in reasons(replace(own, skellam=None), policy())["skellam"]


def test_what_is_charged_is_what_is_stated_and_what_is_left_alone_is_said() -> None:
    run = manifest()
    guarantee = guarantee_of(run)
    stated, alone = guarantee.stated_epsilon(), guarantee.epsilon_alone()
    assert stated == guarantee.charge().epsilon == guarantee.epsilon_of([3, 3])
    assert guarantee.epsilon_of([3, 2]) < stated
    # of nine, six carry: a part has the deviation over √6
    quieter = tuple(replace(each, noise_multiplier=SIGMA / math.sqrt(6)) for each in run.phases)
    assert alone == pytest.approx(guarantee_of(replace(run, phases=quieter)).stated_epsilon())
    text = " ".join(guarantee.statement(stated))
    for part in (
        f"({shown_epsilon(stated)}, 1e-05)",
        "adding or removing one unit at one institution",
        "3 sums of 2 coordinates at rate 0.25",
        "c = 1",
        "t = ⌊2n/3⌋ + 1",
        "at least 2, carry all",
        f"ε = {shown_epsilon(alone)} at δ = 1e-05, in a cohort of 9",
    ):
        assert part in text
    assert "packed batches" in " ".join(
        guarantee_of(replace(run, batches="packed")).statement(stated)
    )


def test_bounds_of_the_sum_and_its_ring() -> None:
    guarantee = SharedRecordLevel(manifest(SPEC))
    noise, size = guarantee.member_noise(1), SPEC.size
    longest = BOUND * noise * math.sqrt(size) / LEVELS
    assert longest < guarantee.update_bound(1, size) < 1.2 * longest + 100 * CLIP * STEP
    encoding = Encoding(size, 32, BOUND, LEVELS, noise)
    assert encoding.fits(9) and not encoding.fits(150)


# --- an audit -------------------------------------------------------------------------------------


def audited(release: UnitRelease, parts: int, carriers: int, trials: int) -> float:
    """A lower bound, at 99.9 % confidence, of ε at δ = 1e-3 of one release of one coordinate.

    The same units with and without one whose gradient is all clip, drawn, encoded, and noised by
    `parts` institutions as the code does; whoever sees the sum guesses by a threshold.
    """
    source, delta = OsRandom(), 1e-3
    encoding = Encoding(trials, 32, 2 * EXPECTED, round(release.levels * 2 * EXPECTED))
    others = np.full(trials, 1.37)

    def sums(with_it: bool) -> Ints:
        drawn = bernoulli(source, trials, release.sampling_rate) & with_it
        made = encoding.encode(others + drawn)
        for _ in range(parts):
            made = made + skellam(source, trials, release.share(carriers))
        return made

    without, held = sums(False), sums(True)
    best, places = 0.0, (0.3, 0.5, 0.7, 0.9, 1.1, 1.5, 1.9)  # of the way that the unit moves
    for cut in (release.levels * (1.37 + place) for place in places):
        hits, misses = int((held > cut).sum()), int((without > cut).sum())
        sure = 5e-4 / len(places)
        true = float(beta.ppf(sure, hits, trials - hits + 1))
        false = float(beta.ppf(1 - sure, misses + 1, trials - misses))
        best = max(best, math.log(max(true - delta, 1e-12) / false))
    return best


@pytest.mark.parametrize(("rate", "noise_multiplier"), [(1.0, 1.0), (0.5, 0.8), (0.1, 0.5)])
def test_an_audit_finds_no_more_than_is_claimed_and_finds_what_is_missing(
    rate: float, noise_multiplier: float
) -> None:
    """t = 4 of 5, one of them without noise: three parts of a third. With one part it is found."""
    release = UnitRelease(noise_multiplier, 1 << 16, 1, 1, rate)
    claimed = min(
        release.renyi(order) + math.log1p(-1 / order) - math.log(1e-3 * order) / (order - 1)
        for order in range(2, 200)
    )
    honest, careless = (audited(release, parts, 3, 200_000) for parts in (3, 1))
    assert 0.3 * claimed < honest <= claimed < careless
