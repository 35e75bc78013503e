"""What is stated is what was accounted, and never less; a new way to promise is one class."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest

from fedlora.client.consent.judge import judge
from fedlora.client.node.policy import DataPolicy, Limits, Policy, TrainerPolicy
from fedlora.client.training.trainer import charge
from fedlora.common.config.schema import LoraConfig, ModelConfig, PrivacyConfig
from fedlora.common.errors import BadInput, Refused
from fedlora.common.ledger.ledger import Budget
from fedlora.common.manifest.manifest import Network, Phase, RunManifest
from fedlora.common.manifest.plan import RoundPlan, Update
from fedlora.common.privacy.figures import shown_epsilon
from fedlora.common.privacy.guarantee import Guarantee, Permits
from fedlora.common.privacy.modes import GUARANTEES, guarantee_asked, guarantee_named, guarantee_of
from fedlora.common.privacy.record_level import RecordLevel
from fedlora.server.release.card import model_card

PHASE = Phase("adapter", 3, 4, 2, 0.25, 4.0, 3.0, 1.0, 0.0, "sgd", 0.01, True, 0.0)
NETWORK = Network.of(ModelConfig(pooling="default"), LoraConfig(targets=("query", "value")))
MANIFEST = RunManifest(
    "f",
    "1",
    "t",
    ("a",),
    "b",
    "s",
    "",
    16,
    "record",
    "",
    3.0,
    1e-5,
    "fedavg",
    1.0,
    1,
    5,
    NETWORK,
    (PHASE,),
)
POLICY = Policy(
    institution="north",
    limits=Limits(noise_multiplier=0.5, minimum_cohort=1),
    trainer=TrainerPolicy(),
    budgets={"people": Budget("people", 100.0, 1e-3)},
    data={"notes": DataPolicy("notes.jsonl", "people", task="t", labels=("a",))},
    bases={"b": "x"},
    digest="",
)


def test_a_manifest_of_fixed_batches_is_what_it_was_before_they_had_a_name() -> None:
    data = MANIFEST.to_bytes()
    assert b"batches" not in data and RunManifest.from_bytes(data).batches == "fixed"
    packed = replace(MANIFEST, batches="packed")
    assert RunManifest.from_bytes(packed.to_bytes()) == packed and packed.digest != MANIFEST.digest
    for named in ("fixed", "loose"):
        with pytest.raises(BadInput, match="manifest"):
            RunManifest.from_bytes(packed.to_bytes().replace(b"packed", named.encode()))


def test_a_statement_says_where_batches_were_packed() -> None:
    said = [
        "packed batches" in " ".join(guarantee_of(replace(MANIFEST, batches=each)).statement(2.0))
        for each in ("packed", "fixed")
    ]
    assert said == [True, False]


def test_a_manifest_and_its_statement_say_what_updates_are_rounded_to() -> None:
    """A manifest without the word is one of before: it keeps its digest, its card every byte."""
    assert b"wire" not in MANIFEST.to_bytes()
    half = replace(MANIFEST, wire="bfloat16")
    assert RunManifest.from_bytes(half.to_bytes()) == half and half.digest != MANIFEST.digest
    with pytest.raises(BadInput, match="manifest"):
        RunManifest.from_bytes(half.to_bytes().replace(b"bfloat16", b"int8"))
    plain, said = (guarantee_of(each).statement(2.0) for each in (MANIFEST, half))
    assert said == [
        *plain,
        "An update leaves its institution rounded to bfloat16, after its noise was added: that"
        " costs no privacy.",
    ]
    open_run = guarantee_of(replace(half, mode="none")).statement(None)
    assert open_run[-1] == "An update leaves its institution rounded to bfloat16."


def test_a_statement_names_unit_neighbours_schedule_noise_and_assumptions() -> None:
    text = " ".join(guarantee_of(MANIFEST).statement(2.0041))
    for part in (
        "(2.005, 1e-05)",
        "a single record",
        "adding or removing one unit",
        "8 steps at rate 0.25",
    ):
        assert part in text
    assert "last bits of floating point numbers are not covered" in text
    assert RecordLevel.noise in text and "Poisson" in text and "one institution only" in text
    assert 'column "patient"' in " ".join(
        guarantee_of(replace(MANIFEST, unit="patient")).statement(2.0)
    )


def test_a_statement_rounds_delta_up() -> None:
    assert (
        "1.00001e-05)-differentially"
        in guarantee_of(replace(MANIFEST, delta=1.0000001e-5)).statement(1.0)[0]
    )


def test_a_run_without_privacy_says_so_and_others_are_not_guessed() -> None:
    assert (
        "nothing is guaranteed" in guarantee_of(replace(MANIFEST, mode="none")).statement(None)[0]
    )
    for mode in ("client", "shared-record"):
        with pytest.raises(ValueError, match=mode):
            guarantee_of(replace(MANIFEST, mode=mode)).statement(1.0)
    with pytest.raises(ValueError, match="record"):
        guarantee_of(MANIFEST).statement(None)


def test_every_mode_of_a_configuration_is_a_guarantee_and_no_other() -> None:
    rules = {each.name: each.metadata["rule"] for each in fields(PrivacyConfig)}
    asked = [
        guarantee_asked(PrivacyConfig(mode=mode, noise=noise)).name
        for mode in rules["mode"].known
        for noise in rules["noise"].known
    ]
    assert set(asked) == {*GUARANTEES} and asked[:2] == ["record", "shared-record"]
    facts = [name for name in Guarantee.__annotations__ if name not in ("manifest",)]
    for name, each in GUARANTEES.items():
        assert each.name == name and all(hasattr(each, fact) for fact in facts)
        assert not each.__abstractmethods__


@pytest.mark.parametrize("mode", ["other", "", "Record", "record "])
def test_a_mode_that_is_none_is_refused_and_never_taken_for_another(mode: str) -> None:
    with pytest.raises(BadInput, match="expected record, shared-record, client or none"):
        guarantee_named(mode)
    with pytest.raises(BadInput, match="expected record, shared-record, client or none"):
        guarantee_of(replace(MANIFEST, mode=mode))
    (verdict,) = [
        each
        for each in judge(replace(MANIFEST, mode=mode), POLICY, "f", {})
        if each.field == "mode"
    ]
    assert verdict.reason == "expected record, shared-record, client or none"


@pytest.mark.parametrize(
    ("mode", "alike"),
    [("record", False), ("shared-record", True), ("client", True), ("none", True)],
)
def test_what_a_ledger_keeps_of_an_update_that_has_no_noise_says_nothing_of_it(
    mode: str, alike: bool
) -> None:
    guarantee, plan = guarantee_of(replace(MANIFEST, mode=mode)), RoundPlan("m", 0, 1, 1, "a")
    one, two = (
        guarantee.committed(plan, Update("c", "m", 1, 1, np.full(3, value, np.float32)))
        for value in (1.0, 2.0)
    )
    assert (one == two) is alike


class Doubled(RecordLevel):
    """A toy: a budget pays twice, and only policies that share noise let it in."""

    name = "doubled"
    mechanism = "as for records, twice"

    @staticmethod
    def refusal(permits: Permits) -> str:
        return "" if permits.client_level else "client_level is false"

    def charged_epsilon(self) -> float:
        return 2 * self.stated_epsilon()

    def _promise(self, epsilon: float | None) -> list[str]:
        return [f"Twice, for one {self.unit}."]


def test_a_new_guarantee_is_one_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GUARANTEES, "doubled", Doubled)
    run = replace(MANIFEST, mode="doubled")
    guarantee = guarantee_of(run)
    cost = guarantee_of(MANIFEST).stated_epsilon()
    assert charge(guarantee).epsilon == 2 * cost > cost == guarantee.stated_epsilon()
    with pytest.raises(Refused, match="its schedule costs"):
        charge(guarantee_of(replace(run, epsilon=cost / 2)))
    open_to = replace(POLICY, limits=replace(POLICY.limits, client_level=True))
    for policy, allowed in ((POLICY, False), (open_to, True)):
        verdicts = {each.field: each for each in judge(run, policy, "f", {})}
        assert verdicts["mode"].allowed is allowed
        assert verdicts["epsilon"].allowed is allowed  # nothing is projected of what is refused
    (note,) = [each.note for each in judge(run, open_to, "f", {}) if each.field == "epsilon"]
    assert note.startswith(f"costs {shown_epsilon(2 * cost)}; of 100 in people")
    assert "- Twice, for one record." in model_card(run, {}, {}, {})
