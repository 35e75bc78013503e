"""Evaluation at the institutions, by its most hostile reader.

Counts leave noised, once, within the ledger's reservation and the node's policy; who is held out is
trained on by nobody; what is asked again is answered by the same bytes.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedlora.client.consent.judge import judge
from fedlora.client.node.policy import parse_policy
from fedlora.client.service.answer import Resident
from fedlora.client.service.loaded_run import LoadedRun
from fedlora.client.training.hold_out import noisy_counts
from fedlora.client.training.local import ClientData, LocalResult, LocalTraining
from fedlora.common.config.load import parse_config
from fedlora.common.config.schema import EvaluationConfig, ModelConfig, PrivacyConfig
from fedlora.common.errors import BadInput
from fedlora.common.manifest.counts import Cells
from fedlora.common.manifest.manifest import EvaluationTerms, Groups, Network, RunManifest
from fedlora.common.model.base import base_digest
from fedlora.common.model.network import AdapterModel
from fedlora.common.model.state import AdapterState
from fedlora.common.privacy.calibration import Asked, with_gaussian_noise
from fedlora.common.privacy.modes import guarantee_of
from fedlora.common.protocol.messages import Answer, Decline
from fedlora.common.protocol.vectors import vector_from_bytes, vector_to_bytes
from tests.client.institution import (
    LORA,
    PHASE,
    POLICY,
    Institution,
    declined,
    manifest_of,
    offer_of,
    task_of,
)
from tests.client.secagg.test_shared_records import manifest as shared_manifest
from tests.client.service.test_loaded_run import node_with_data

TERMS = EvaluationTerms(0.5, 1, 20.0, 6.0, ("right", "loss"))
ALLOWED = 'metrics = ["right", "loss"]\n'


def gaussian_delta(epsilon: float, sigma: float) -> float:
    """δ of one release of sensitivity 1, in closed form (Balle and Wang 2018, theorem 8)."""

    def below(z: float) -> float:
        return 0.5 * math.erfc(-z / math.sqrt(2))

    apart = below(1 / (2 * sigma) - epsilon * sigma)
    return apart - math.exp(epsilon) * below(-1 / (2 * sigma) - epsilon * sigma)


def exact_epsilon(sigma: float, delta: float) -> float:
    low, high = 0.0, 100.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if gaussian_delta(middle, sigma) > delta else (low, middle)
    return high


# --- what it costs


@pytest.mark.parametrize("attempts", [1, 3])
@pytest.mark.parametrize("sigma", [1.5, 6.0, 40.0])
def test_it_costs_what_so_many_gaussian_releases_cost(sigma: float, attempts: int) -> None:
    """k releases at σ are one at σ / √k, whose δ is a closed form; no draw amplifies any of it."""
    terms = replace(TERMS, noise_multiplier=sigma, attempts=attempts)
    run = manifest_of(evaluation=terms)
    exact = exact_epsilon(sigma / math.sqrt(attempts), run.delta)
    found = guarantee_of(run).evaluation_epsilon()
    assert found is not None and exact <= found <= exact * 1.004 + 1e-4
    whole, alone = (guarantee_of(each).stated_epsilon() for each in (run, manifest_of()))
    assert max(alone, exact) < whole < alone + found


def test_training_takes_what_the_composition_leaves() -> None:
    privacy, asked = PrivacyConfig(epsilon=3.0), EvaluationConfig(hold_out=0.2, attempts=2)
    phase = replace(PHASE, noise_multiplier=0.0)
    plain = with_gaussian_noise((phase,), Asked(privacy, parse_config("").aggregation, {}))
    schedule = with_gaussian_noise(
        (phase,), Asked(privacy, parse_config("").aggregation, {}, evaluation=asked)
    )
    assert plain.evaluation_noise == 0
    assert schedule.phases[0].noise_multiplier > plain.phases[0].noise_multiplier
    terms = EvaluationTerms(0.2, 2, 20.0, schedule.evaluation_noise, ("right",))
    run = manifest_of(*schedule.phases, evaluation=terms, epsilon=3.0)
    assert 0.995 * 3.0 <= guarantee_of(run).stated_epsilon() <= 3.0
    assert guarantee_of(run).evaluation_epsilon() == pytest.approx(0.6, rel=0.005)


def test_a_manifest_without_one_is_what_it_was_before(tmp_path: Path) -> None:
    data = manifest_of().to_bytes()
    assert b"evaluation" not in data and RunManifest.from_bytes(data) == manifest_of()
    run = manifest_of(evaluation=TERMS)
    assert RunManifest.from_bytes(run.to_bytes()) == run and run.digest != manifest_of().digest
    assert (run.phase_of(3), run.phase_of(4), run.rounds) == (0, 1, 3)
    by_turns = replace(run, network=replace(run.network, variant="rolora"))
    assert (by_turns.recipe_of(3).name, by_turns.recipe_of(4).name) == ("adapter.B", "evaluation")
    assert by_turns.leaving(Cells.of(run).spec, 4).tolist() == [True] * 10
    with pytest.raises(BadInput, match="round: found 4, expected 1 to 3"):
        manifest_of().phase_of(4)


@pytest.mark.parametrize(
    "changes",
    [
        {"hold_out": 0.0}, {"hold_out": 0.6}, {"attempts": 0}, {"expected_units": 0.0},
        {"noise_multiplier": -1.0}, {"counts": ()}, {"counts": ("right", "right")},
        {"counts": ("records",)},
    ],
    ids=str,
)  # fmt: skip
def test_no_other_terms_are_read(changes: dict[str, object]) -> None:
    run = manifest_of(evaluation=replace(TERMS, **changes))  # type: ignore[arg-type]
    with pytest.raises(BadInput, match=f"manifest evaluation {next(iter(changes))}"):
        RunManifest.from_bytes(run.to_bytes())


# --- what a policy says


def verdicts(run: RunManifest, more: str = "") -> dict[str, str]:
    policy = parse_policy(POLICY.format(base="sha256:" + "b" * 64, folder="base") + more)
    return {each.field: each.reason for each in judge(run, policy, "f", {}) if each.reason}


def test_a_node_that_says_nothing_evaluates_nothing() -> None:
    run = manifest_of(evaluation=TERMS)
    assert "[limits] metrics has: none" in verdicts(run)["evaluation"]
    assert "has: right" in verdicts(run, 'metrics = ["right"]')["evaluation"]
    assert not verdicts(run, ALLOWED) and not verdicts(manifest_of())
    little = manifest_of(evaluation=replace(TERMS, noise_multiplier=0.5))
    assert "evaluation.noise_multiplier" in verdicts(little, ALLOWED)
    often = manifest_of(evaluation=replace(TERMS, attempts=30))
    assert "at most 20" in verdicts(often, ALLOWED)["attempts"]
    dear = verdicts(manifest_of(evaluation=replace(TERMS, noise_multiplier=0.7)), ALLOWED)
    assert "its schedule costs" in dear["epsilon"]


def test_groups_are_of_the_column_that_the_owner_of_the_data_named() -> None:
    terms = replace(TERMS, counts=("right", "groups"))
    run = manifest_of(evaluation=terms, groups=Groups("ward", ("a", "b")))
    more = 'metrics = ["right", "groups"]\n'
    assert "has as group" in verdicts(run, more)["groups"]
    policy = POLICY.replace('path = "notes.jsonl"', 'path = "notes.jsonl"\ngroup = "ward"')
    assert RunManifest.from_bytes(run.to_bytes()) == run

    def judged(run: RunManifest) -> list[str]:
        read = parse_policy(policy.format(base="sha256:" + "b" * 64, folder="base") + more)
        return [each.field for each in judge(run, read, "f", {}) if each.reason]

    assert not judged(run)
    assert "groups" in judged(replace(run, groups=Groups("diagnosis", ("a",))))
    assert "groups" in judged(replace(run, evaluation=None))


def test_a_phase_that_calls_itself_an_evaluation_is_none() -> None:
    named = manifest_of(replace(PHASE, name="evaluation"))
    assert "expected one of head, lora, adapter" in verdicts(named, ALLOWED)["phases[0].name"]


def test_it_has_no_place_where_institutions_share_noise() -> None:
    run = replace(shared_manifest(), evaluation=TERMS)
    with pytest.raises(BadInput, match="evaluation: expected none where institutions share"):
        guarantee_of(run).stated_epsilon()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('[privacy]\nnoise = "shared"\n[aggregation]\nsecure = true', "own noise"),
        ('[privacy]\nmode = "client"\n[aggregation]\nsecure = true', "own noise"),
        ('[model]\ntask = "causal-lm"', 'counts = ["right"]: expected ["loss"]'),
        ('group = "ward"\ngroups = ["a"]', "expected group, groups and"),
    ],
)
def test_what_it_can_not_be_combined_with_is_one_line(text: str, reason: str) -> None:
    with pytest.raises(BadInput) as caught:
        parse_config(f'[evaluation]\nhold_out = 0.1\ncounts = ["right"]\n{text}')
    assert any(reason in fault for fault in caught.value.faults)


# --- at a node, with a model


def evaluating(
    root: Path, base: Path, **changes: object
) -> tuple[Institution, RunManifest, AdapterState]:
    """A node that allows counts, and a run of one round and an evaluation that was started."""
    north = node_with_data(root, base)
    north.set_policy(POLICY.format(base=base_digest(base), folder=base) + ALLOWED)
    north.restart()
    loaded = LoadedRun(north.folder, north.folder.load_policy(), north.ledger)
    network = Network.of(ModelConfig(pooling="mean"), LORA)
    phases = (replace(PHASE, rounds=1, attempts=1),)
    terms = replace(TERMS, **changes)  # type: ignore[arg-type]
    run = manifest_of(*phases, base_digest=base_digest(base), network=network, evaluation=terms)
    spec = loaded.spec(replace(run, evaluation=None), root / "none")
    run = replace(run, spec_digest=spec.digest)
    north.resident = Resident(
        north.folder, north.folder.load_policy(), north.identity, north.ledger, loaded
    )
    north.begin(run)
    return north, run, AdapterState(spec, np.zeros(spec.size, np.float32))


def note_hold_outs(monkeypatch: pytest.MonkeyPatch, seen: list[ClientData]) -> None:
    def noted(model: AdapterModel, held: ClientData, *given: Any) -> Any:
        seen.append(held)
        return noisy_counts(model, held, *given)

    monkeypatch.setattr("fedlora.client.training.trainer.noisy_counts", noted)


def counts_task(run: RunManifest, state: AdapterState, attempt: int = 2) -> bytes:
    vector = vector_to_bytes(state.vector)
    return task_of(run, 2, attempt, state.digest, vector=vector, phase=1)


def test_counts_are_reserved_noised_and_answered_once(
    tmp_path: Path, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    north, run, state = evaluating(tmp_path / "n", tiny_bert)
    drawn: list[ClientData] = []
    note_hold_outs(monkeypatch, drawn)
    first = north.resident.ask(counts_task(run, state))
    answer = north.read(first)
    assert isinstance(answer, Answer), answer
    counts = vector_from_bytes(answer.vector, 2 + 8, "answer")
    held = len(drawn[0].units)
    assert 0 < held < 40 and abs(counts[:2].sum() * 20 - held / math.sqrt(2)) < 6 * 6 * math.sqrt(2)
    assert len(np.unique(counts)) == 10  # no cell left without noise
    again = north.resident.ask(counts_task(run, state))
    north.restart(LoadedRun(north.folder, north.folder.load_policy(), north.ledger))
    assert again == first == north.resident.ask(counts_task(run, state)) and len(drawn) == 1
    kinds = [entry.body["kind"] for entry in north.ledger.entries()]
    assert kinds == ["open", "consent", "reserve", "commit"]
    consent = north.ledger.entries()[1].body
    assert consent["attempts"] == [1, 1]
    assert consent["epsilon"] == guarantee_of(run).stated_epsilon()
    # another attempt, another adapter, and a rewind to training: each is refused, uncharged
    other = AdapterState(state.spec, state.vector + 1)
    assert "expected at most 2" in declined(north, counts_task(run, state, 3)).reason
    assert "another request: a rewind" in declined(north, counts_task(run, other)).reason
    back = task_of(run, 1, 1, state.digest, vector=vector_to_bytes(state.vector))
    assert "a rewind" in declined(north, back).reason
    assert len(north.ledger.entries()) == 4


def test_who_is_held_out_is_not_trained_on(
    tmp_path: Path, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    north, run, state = evaluating(tmp_path / "n", tiny_bert)
    trained, drawn = list[ClientData](), list[ClientData]()
    note_hold_outs(monkeypatch, drawn)
    update = LocalTraining.update

    def noted(self: LocalTraining, data: ClientData, *given: Any) -> LocalResult:
        trained.append(data)
        return update(self, data, *given)

    monkeypatch.setattr(LocalTraining, "update", noted)
    task = task_of(run, 1, 1, state.digest, vector=vector_to_bytes(state.vector))
    assert isinstance(north.ask(task), Answer)
    assert isinstance(north.ask(counts_task(run, state)), Answer)
    used, held = (set(each[0].units.records.tolist()) for each in (trained, drawn))
    assert not used & held and used | held == set(range(40))


def test_a_policy_that_takes_it_back_is_kept_to(tmp_path: Path, tiny_bert: Path) -> None:
    north, run, state = evaluating(tmp_path / "n", tiny_bert)
    north.set_policy(north.folder.policy.read_text().replace(ALLOWED, ""))
    reply = north.ask(counts_task(run, state))
    assert isinstance(reply, Decline) and "metrics has: none" in reply.reason
    assert isinstance(north.ask(offer_of(replace(run, run="2"))), Decline)
