"""The policy's bad inputs by name, and 10,000 manifests that never train past what it allows."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedlora.client.consent.judge import judge
from fedlora.client.consent.verdict import Denied, allow
from fedlora.client.node.policy import load_policy, parse_policy, policy_template
from fedlora.common.errors import BadInput, Refused
from fedlora.common.manifest.manifest import Phase, RunManifest
from fedlora.common.privacy.accountant import Spend
from fedlora.common.privacy.modes import guarantee_of
from fedlora.common.protocol.messages import Answer, Started
from tests.client.institution import BASE, PHASE, POLICY, Institution, manifest_of, task_of

TEXT = POLICY.format(base=BASE, folder="base")
RUN = manifest_of()


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        pytest.param(
            "minimum_cohort = 3", "minimum_cohort = 2", "at least 3", id="policy-min-cohort-below-3"
        ),
        pytest.param("epsilon = 2.0", "epsilon = nan", "epsilon = nan", id="cfg-epsilon-nan"),
        pytest.param("epsilon = 2.0", "epsilon = 0", "epsilon = 0", id="cfg-epsilon-zero"),
        pytest.param("epsilon = 2.0", "epsilon = -1", "epsilon = -1", id="cfg-epsilon-negative"),
        pytest.param("epsilon = 2.0", "epsilon = inf", "epsilon = inf", id="cfg-epsilon-inf"),
        pytest.param("epsilon = 2.0", "epsilon = true", "epsilon = true", id="cfg-bool-as-int"),
        pytest.param("epsilon = 2.0\n", "", "missing, expected a cap", id="no-cap"),
        pytest.param("delta = 1e-4", 'delta = "1e-4"', "delta = ", id="cfg-delta-string"),
        pytest.param("rounds = 10", "round = 10", 'did you mean "rounds"', id="cfg-unknown-key"),
        pytest.param("rounds = 10", "rounds = 1.5", "an integer", id="cfg-wrong-type"),
        pytest.param(
            'budget = "people"', 'budget = "them"', "expected one of people", id="unknown-budget"
        ),
        pytest.param(
            "[limits]",
            '[limits]\nmetrics = ["texts"]',
            "one of right, classes",
            id="no-other-metrics-leave",
        ),
        pytest.param(
            BASE,
            "",
            r"\[bases\] \"\": expected .sha256:. and 64 hexadecimal digits$",
            id="no-digest",
        ),
        pytest.param(BASE, "sha256:12", "64 hexadecimal", id="short-digest"),
        pytest.param(
            "[limits]", '[ledger]\npath = "ledger.key"\n[limits]', "NAME.sqlite", id="ledger-path"
        ),
        pytest.param("north", "North Pole", "lower-case", id="institution-name"),
    ],
)
def test_bad_policies_are_named(old: str, new: str, match: str) -> None:
    parse_policy(TEXT)
    with pytest.raises(BadInput, match=match) as caught:
        parse_policy(TEXT.replace(old, new, 1))
    assert all("node.toml" in fault for fault in caught.value.faults)


def test_several_faults_are_named_at_once() -> None:  # cfg-several-faults
    with pytest.raises(BadInput) as caught:
        parse_policy(
            TEXT.replace("epsilon = 2.0", "epsilon = -1").replace("rounds = 10", "rounds = 0")
        )
    assert len(caught.value.faults) == 2
    with pytest.raises(BadInput) as caught:
        parse_policy(
            TEXT.replace("minimum_cohort = 3", "minimum_cohort = 2").replace(
                "delta = 1e-4", "delta = 1"
            )
        )
    assert len(caught.value.faults) == 3 and "minimum_cohort" in str(caught.value)
    assert len(TEXT.split("delta = 1e-4")) == 3


def test_a_budget_counts_one_kind_of_unit() -> None:
    more = (
        '[data.more]\npath = "x.csv"\nbudget = "people"\nlabels = ["a", "b"]\nunit = "patient_id"\n'
    )
    with pytest.raises(
        BadInput, match=r'data.more\] unit: found "patient_id", but \[data.notes\].*"record"'
    ):
        parse_policy(TEXT + more)
    other = "[budgets.others]\nepsilon = 1.0\ndelta = 1e-5\n"
    elsewhere = more.replace('budget = "people"', 'budget = "others"')
    parse_policy(TEXT + other + elsewhere)
    # what a ledger calls records: two policies of one ledger could count both in one budget
    with pytest.raises(BadInput, match=r"data.more\] unit: expected a column of another name"):
        parse_policy(TEXT + other + elsewhere.replace("patient_id", "record"))


def test_the_cohort_is_five_where_nothing_is_said() -> None:
    assert parse_policy(TEXT.replace("minimum_cohort = 3\n", "")).limits.minimum_cohort == 5
    assert "\nminimum_cohort = 5 " in policy_template("north")


def test_a_policy_of_another_institution_is_named(tmp_path: Path) -> None:
    north = Institution(tmp_path / "n")
    north.set_policy(TEXT.replace('"north"', '"south"'))
    with pytest.raises(BadInput, match="institution: found south, expected north as in"):
        north.folder.load_policy()


def test_two_data_sets_that_serve_the_same_runs_are_refused() -> None:
    again = TEXT + '[data.more]\npath = "x.csv"\nbudget = "people"\nlabels = ["a", "b"]\n'
    with pytest.raises(BadInput, match="serves the same runs"):
        parse_policy(again)


@pytest.mark.parametrize(
    "field",
    ["data.notes.path", "ledger.marks", "ledger.anchor", "trainer.head", "trainer.outbox"]
    + [f"trainer.tls_{name}" for name in ("certificate", "key", "clients")],
)
@pytest.mark.parametrize("value", ["", " ", "x "])
def test_a_path_is_not_empty_and_has_no_white_space_at_its_ends(field: str, value: str) -> None:
    if not value and field.startswith(("ledger", "trainer.tls")):
        return  # there is none
    section, _, key = field.rpartition(".")
    with pytest.raises(BadInput) as caught:
        parse_policy(f'{field} = "{value}"\n')
    place = f'node.toml [{section}] {key} = "{value}": expected a path without white space'
    assert [each for each in caught.value.faults if each.startswith(place)], caught.value.faults


@pytest.mark.parametrize("mode", [0o666, 0o620, 0o602])
def test_a_policy_that_others_can_write_is_refused(
    tmp_path: Path, mode: int
) -> None:  # policy-world-writable
    path = tmp_path / "node.toml"
    path.write_text(TEXT)
    path.chmod(mode)
    with pytest.raises(Refused, match="others can write"):
        load_policy(path)
    path.chmod(0o600)
    tmp_path.chmod(0o777)
    with pytest.raises(Refused, match="folder that others can write"):
        load_policy(path)
    tmp_path.chmod(0o700)
    assert load_policy(path).institution == "north"


def test_a_policy_is_at_most_1_mib(tmp_path: Path) -> None:  # cfg-file-over-1MiB
    path = tmp_path / "node.toml"
    path.write_text("#" * (1 << 20) + "\n" + TEXT)
    path.chmod(0o600)
    with pytest.raises(BadInput, match="1 MiB"):
        load_policy(path)


def test_the_template_allows_nothing_before_it_is_filled_in() -> None:
    with pytest.raises(BadInput, match="found none, expected at least one"):
        parse_policy(policy_template("north"))


def test_too_little_noise_says_how_many_rounds_would_fit() -> None:  # cfg-noise-below-policy
    run = manifest_of(replace(PHASE, noise_multiplier=0.5))
    with pytest.raises(Denied, match=r"noise_multiplier = 0.5: expected at least 0.6;") as caught:
        allow(judge(run, parse_policy(TEXT), "f", {}))
    # a budget's cap is the operator's alone
    assert "attempts of this phase fit" not in str(caught.value)
    (fit,) = map(
        int, re.findall(r"with 0.6, (\d+) attempts of this phase fit 2 of ε", caught.value.detail)
    )
    for rounds, fits in ((fit, True), (fit + 1, False)):
        enough = manifest_of(replace(PHASE, noise_multiplier=0.6, attempts=rounds))
        assert (guarantee_of(enough).charge().epsilon <= 2.0) is fits


def test_what_is_denied_says_where_the_policy_allows_it() -> None:
    asked = replace(RUN, base_digest="sha256:0", unit="person", task="other")
    for field, verdict in {
        each.field: each for each in judge(asked, parse_policy(TEXT), "f", {})
    }.items():
        if field in ("base_digest", "unit", "task"):
            assert "node.toml" in verdict.reason, verdict


def test_every_field_of_a_manifest_has_a_verdict() -> None:
    fields = {
        verdict.field.split("[")[0].split(".")[0]
        for verdict in judge(RUN, parse_policy(TEXT), "f", {})
    }
    assert set(RunManifest.__dataclass_fields__) <= fields
    phase = {
        v.field.split(".")[1]
        for v in judge(RUN, parse_policy(TEXT), "f", {})
        if v.field.startswith("phases[")
    }
    assert set(Phase.__dataclass_fields__) - {"attempts", "carry_optimizer"} <= phase


def test_the_cap_holds_to_the_last_decimal() -> None:
    cost = guarantee_of(RUN).charge()
    policy = parse_policy(TEXT.replace("epsilon = 2.0", f"epsilon = {cost.epsilon!r}"))
    allow(judge(RUN, policy, "f", {}))
    with pytest.raises(Denied, match="budget does not suffice") as caught:
        allow(judge(RUN, policy, "f", {"people": [Spend(1e-12, 0.0)]}))
    assert f"past its cap of {cost.epsilon:.6g}" in caught.value.detail


def test_runs_that_cost_a_third_of_a_budget_fit_three_times() -> None:
    cost = guarantee_of(RUN).charge()
    for count in (1, 2, 3, 4, 5, 6):
        cap = f"epsilon = {cost.epsilon * count * (1 + 1e-9)!r}"
        policy = parse_policy(TEXT.replace("epsilon = 2.0", cap))
        allow(judge(RUN, policy, "f", {"people": [Spend(cost.epsilon, 0.0)] * (count - 1)}))


@pytest.mark.parametrize("cheap", [Spend(1e-9, 0.0), Spend(0.0, 1e-12)], ids=["epsilon", "delta"])
def test_a_budget_takes_as_many_runs_as_it_has_steps_however_cheap(cheap: Spend) -> None:
    policy = parse_policy(TEXT)
    allow(judge(RUN, policy, "f", {"people": [cheap] * (60 - 6)}))  # a tenth of either takes six
    with pytest.raises(Denied, match="budget does not suffice"):
        allow(judge(RUN, policy, "f", {"people": [cheap] * (60 - 5)}))


def test_who_is_denied_learns_no_budget_and_nothing_of_other_runs() -> None:
    policy = parse_policy(TEXT.replace("epsilon = 2.0", "epsilon = 1.9753"))
    for run in (RUN, replace(RUN, epsilon=0.01), manifest_of(replace(PHASE, noise_multiplier=0.5))):
        with pytest.raises(Denied) as caught:
            allow(judge(run, policy, "f", {"people": [Spend(1.8642, 0.0)]}))
        for figure in ("people", "1.975", "1.864"):
            assert figure not in str(caught.value), caught.value


@given(st.text(), st.text())
def test_what_a_coordinator_wrote_is_one_printable_line(text: str, other: str) -> None:
    run = manifest_of(
        replace(PHASE, name=text, optimizer=text),
        run=text, federation=other, task=text, unit=other, mode=text, strategy=other,
        base_digest=text,
    )  # fmt: skip
    for each in judge(run, parse_policy(TEXT), "f", {}):
        assert (each.found + each.reason + each.note).isprintable(), each


phases = st.builds(
    replace,
    st.just(PHASE),
    name=st.sampled_from(["adapter", "adapter", "head", "other"]),
    rounds=st.sampled_from([1, 3, 9, 11, -1]),
    attempts=st.sampled_from([3, 25, -4]),
    steps=st.sampled_from([1, 4, 0, 50]),
    sampling_rate=st.sampled_from([0.01, 0.1, 1.0, 0.0, 2.0]),
    noise_multiplier=st.sampled_from([0.0, 0.55, 0.7, 1.5, 4.0, -1.0]),
    clip=st.sampled_from([1.0, 0.0]),
)
usual = st.builds(
    replace,
    st.just(PHASE),
    rounds=st.sampled_from([1, 3]),
    attempts=st.sampled_from([3]),
    sampling_rate=st.sampled_from([0.01, 0.1]),
    noise_multiplier=st.sampled_from([0.7, 1.5, 4.0]),
)
manifests = st.builds(
    manifest_of,
    st.one_of(usual, usual, usual, phases),
    run=st.text("0123456789abcdef", min_size=8, max_size=8),
    federation=st.sampled_from(["f", "f", "f", "f", "g"]),
    base_digest=st.sampled_from([BASE, BASE, BASE, "sha256:0", ""]),
    minimum_cohort=st.sampled_from([3, 5, 100, 2, 0, -1]),
    epsilon=st.sampled_from([0.1, 1.0, 50.0, 50.0]),
    delta=st.sampled_from([1e-5, 1e-5, 1e-2, 0.0, -1.0]),
    mode=st.sampled_from(["record", "record", "record", "none", "client"]),
)


class Rig:
    """One institution over all examples; what must never pass is counted apart from the ledger."""

    def __init__(self, root: Path) -> None:
        self.north = Institution(root)
        self.answered: Counter[str] = Counter()
        self.runs: dict[str, RunManifest] = {}

    def allowed(self, run: RunManifest) -> bool:
        (phase,) = run.phases
        return (
            run.mode == "record"
            and run.base_digest == BASE
            and run.minimum_cohort >= 3
            and 1 <= phase.rounds <= 10
            and phase.attempts <= 20
            and phase.noise_multiplier >= 0.6
            and run.federation == "f"
        )

    def offer(self, run: RunManifest) -> None:
        if run.digest in self.runs:
            return
        if isinstance(self.north.offered(run), Started):
            assert self.allowed(run), run
            self.runs[run.digest] = run
        total = sum(guarantee_of(each).charge().epsilon for each in self.runs.values())
        assert total <= 2.0, "consented past the cap"

    def train(self, run: RunManifest, attempt: int) -> None:
        if isinstance(self.north.ask(task_of(run, 1, attempt, phase=0)), Answer):
            self.answered[run.digest] += 1
            assert run.digest in self.runs and self.answered[run.digest] <= run.phases[0].attempts


@pytest.fixture(scope="module")
def rig_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def walk(folder: Path, runs: list[RunManifest], moves: list[int]) -> None:
    """Offers and tasks of several runs in turn, with restarts and older ledgers put back."""
    root = folder / "node"
    shutil.rmtree(root, ignore_errors=True)
    rig = Rig(root)
    shutil.copy(root / "ledger.sqlite", folder / "old.sqlite")
    for run in runs:
        rig.offer(run)
    for number, move in enumerate(moves, start=1):
        if move == 0:
            rig.north.ledger.close()
            rig.north.restart()
        elif move == 1 and rig.runs:
            _restore(rig, folder / "old.sqlite")
        else:
            rig.train(runs[move % len(runs)], number)


def _restore(rig: Rig, old: Path) -> None:
    """An older copy of the ledger: nothing trains, nothing is consented to.

    The right one serves again.
    """
    north = rig.north
    north.ledger.close()
    ledger = north.root / "ledger.sqlite"
    aside = old.with_name("aside.sqlite")
    for name in ("-wal", "-shm"):
        ledger.with_name(ledger.name + name).unlink(missing_ok=True)
    shutil.copy(ledger, aside)
    shutil.copy(old, ledger)
    with pytest.raises(Refused, match=r"truncated or restored|entries"):
        north.restart()
    for name in ("-wal", "-shm"):
        ledger.with_name(ledger.name + name).unlink(missing_ok=True)
    shutil.copy(aside, ledger)
    north.restart()


case = given(st.lists(manifests, min_size=1, max_size=4), st.lists(st.integers(0, 9), max_size=4))


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@case
def test_no_manifest_trains_past_the_policy(
    rig_folder: Path, runs: list[RunManifest], moves: list[int]
) -> None:
    walk(rig_folder, runs, moves)


@pytest.mark.chaos
@settings(max_examples=4_000, deadline=None, suppress_health_check=list(HealthCheck))
@case
def test_ten_thousand_manifests(
    rig_folder: Path, runs: list[RunManifest], moves: list[int]
) -> None:
    # 4,000 walks of one to four manifests each
    walk(rig_folder, runs, moves)


@settings(max_examples=500, deadline=None)
@given(manifests)
def test_verdicts_alone_never_let_a_forbidden_manifest_in(run: RunManifest) -> None:
    policy = parse_policy(TEXT)
    if all(verdict.allowed for verdict in judge(run, policy, "f", {})):
        assert Rig.allowed(None, run)  # type: ignore[arg-type]
        assert (
            guarantee_of(run).charge().epsilon <= min(2.0, run.epsilon * (1 + 1e-6))
            and 0 < run.delta <= 1e-4
        )


PAIRS = """
[data.pairs]
path = "pairs.csv"
budget = "people"
task = "regression"
text = ["a", "b"]
label = "score"
scale = [0, 5]
"""


def test_a_scale_is_a_regressions_label_set() -> None:
    policy = parse_policy(TEXT + PAIRS)
    assert policy.data["pairs"].text == ("a", "b")
    assert policy.data_for("regression", ("0.0", "5.0"), "") == "pairs"
    assert policy.data_for("regression", ("0.0", "4.0"), "") == ""


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ("scale = [0, 5]", "", r"\[data.pairs\] scale: expected its public ends"),
        ('"regression"', '"multi-label"', r"\[data.pairs\] labels: expected the public label set"),
        ('["a", "b"]', '["a", "b", "c"]', "text: expected one column, or the two of a pair"),
        ('"regression"', '"regresion"', 'did you mean "regression"'),
    ],
)
def test_a_task_asks_for_what_it_needs(old: str, new: str, match: str) -> None:
    with pytest.raises(BadInput, match=match):
        parse_policy(TEXT + PAIRS.replace(old, new))
