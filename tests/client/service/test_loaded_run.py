"""A loaded run trains behind a resident, and keeps a model only once it is the manifest's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedlora.client.report.report import report_body
from fedlora.client.service.answer import Resident
from fedlora.client.service.loaded_run import LoadedRun, try_base
from fedlora.client.training import memory
from fedlora.client.training.moments import UnnoisedMoments
from fedlora.client.training.ranks import Ranks
from fedlora.common.config.schema import LoraConfig, ModelConfig
from fedlora.common.data.data_file import file_digest
from fedlora.common.errors import BadInput, Refused
from fedlora.common.manifest.manifest import Network
from fedlora.common.manifest.plan import RoundPlan
from fedlora.common.model.base import base_digest
from fedlora.common.model.compute import COMPUTE
from fedlora.common.model.network import AdapterModel
from fedlora.common.model.projection import Affine, Projection
from fedlora.common.model.state import AdapterState
from fedlora.common.protocol.messages import Answer, Decline, Started
from fedlora.common.protocol.vectors import vector_from_bytes, vector_to_bytes
from tests.client.institution import PHASE, POLICY, Institution, manifest_of, task_of

LORA = LoraConfig(rank=2, targets=("query", "value"))


def node_with_data(root: Path, base: Path) -> Institution:
    north = Institution(root)
    north.set_policy(POLICY.format(base=base_digest(base), folder=base))
    rows = [json.dumps({"text": f"w{k} good", "label": "ab"[k % 2]}) for k in range(40)]
    (root / "notes.jsonl").write_text("\n".join(rows))
    north.restart()
    return north


@pytest.mark.parametrize(
    ("wire", "variant"), [("float32", "lora"), ("bfloat16", "lora"), ("float32", "rolora")]
)
def test_consent_training_and_answer_with_a_real_model(
    tmp_path: Path, tiny_bert: Path, wire: str, variant: str
) -> None:
    north = node_with_data(tmp_path / "n", tiny_bert)
    loaded = LoadedRun(north.folder, north.folder.load_policy(), north.ledger)
    network = Network.of(ModelConfig(pooling="mean"), replace(LORA, variant=variant))
    run = manifest_of(base_digest=base_digest(tiny_bert), network=network)
    spec = loaded.spec(run, tmp_path / "none")
    leaving = spec.size if variant == "lora" else int(spec.moved_by("adapter.B").sum())
    run = replace(run, spec_digest=spec.digest, wire=wire)
    north.resident = Resident(
        north.folder, north.folder.load_policy(), north.identity, north.ledger, loaded
    )
    north.begin(run)
    state = AdapterState(spec, np.zeros(spec.size, np.float32))
    task = task_of(run, adapter=state.digest, vector=vector_to_bytes(state.vector))
    first = north.resident.ask(task)
    answer = north.read(first)
    assert isinstance(answer, Answer) and north.resident.ask(task) == first
    assert len(answer.vector) == {"float32": 4, "bfloat16": 2}[wire] * leaving
    update = vector_from_bytes(answer.vector, leaving, "answer", wire)
    assert np.isfinite(update).all() and update.any()
    assert update.all() or variant == "lora"  # noise on all that leaves
    kinds = [entry.body["kind"] for entry in north.ledger.entries()]
    assert kinds == ["open", "consent", "reserve", "commit"]
    consent = north.ledger.entries()[1].body
    assert (consent["unit"], consent["federation"]) == ("record", "f")
    assert consent["path"] == str((north.root / "notes.jsonl").resolve())
    assert consent["data"].startswith("keyed:")
    noted = [
        json.loads(line) for line in north.folder.data_log(run.digest).read_text().splitlines()
    ]
    assert [line["data"] for line in noted] == [file_digest(north.root / "notes.jsonl")] * 2


def test_a_forged_projection_spoils_no_later_one(tmp_path: Path, tiny_bert: Path) -> None:
    width = json.loads((tiny_bert / "config.json").read_text())["hidden_size"]
    forged, right = (
        Projection(Affine(np.full((width, 2), value, np.float32), np.zeros(2, np.float32)))
        for value in (1, 2)
    )
    forged.write(tmp_path / "forged")
    right.write(tmp_path / "right")
    north = node_with_data(tmp_path / "n", tiny_bert)
    network = Network.of(replace(ModelConfig(pooling="mean"), projection=2), LORA)
    run = manifest_of(
        base_digest=base_digest(tiny_bert), projection_digest=right.digest, network=network
    )
    loaded = LoadedRun(north.folder, north.folder.load_policy(), north.ledger)
    for _ in range(2):
        with pytest.raises(BadInput, match="projection_digest"):
            loaded.prepare(run, tmp_path / "forged")
    model = loaded.prepare(run, tmp_path / "right").training.gradients.model
    assert model.projection is not None and model.projection.digest == right.digest


def test_a_step_that_does_not_fit_is_refused_before_data_are_read(
    tmp_path: Path,
    tiny_bert: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The log says what to change; a coordinator reads no figure of the machine's."""
    north = node_with_data(tmp_path / "n", tiny_bert)
    run = manifest_of(
        base_digest=base_digest(tiny_bert), network=Network.of(ModelConfig(pooling="mean"), LORA)
    )
    loaded = LoadedRun(north.folder, north.folder.load_policy(), north.ledger)
    budget = north.folder.load_policy().budgets["people"]
    (north.root / "notes.jsonl").unlink()
    monkeypatch.setattr(memory, "available", lambda device: 1)
    with pytest.raises(Refused, match=r"^memory: a step of this run needs more than is free here"):
        loaded.check(run, tmp_path / "none", budget)
    assert "node.toml [trainer] micro_batch_tokens = 512: a step needs about" in caplog.text
    assert "checkpointing = true" in caplog.text
    head = replace(run, phases=tuple(replace(each, name="head") for each in run.phases))
    with pytest.raises(BadInput, match="notes"):  # a head's steps take next to none
        loaded.check(head, tmp_path / "none", budget)


def test_data_are_read_only_for_what_can_be_charged(tmp_path: Path, tiny_bert: Path) -> None:
    """Before, a task with another adapter than its plan's had them read, and so had a masked stage
    that was no next step: as often as it was sent, and no ledger counted it.
    """
    north = node_with_data(tmp_path / "n", tiny_bert)
    policy = north.folder.load_policy()
    loaded = LoadedRun(north.folder, policy, north.ledger)
    run = manifest_of(
        base_digest=base_digest(tiny_bert), network=Network.of(ModelConfig(pooling="mean"), LORA)
    )
    (north.root / "notes.jsonl").unlink()
    spec = loaded.spec(run, tmp_path / "none")
    values = np.zeros(spec.size, np.float32)
    state, budget = AdapterState(spec, values), policy.budgets["people"]
    far = AdapterState(spec, values + np.float32(2e3))
    for adapter, vector, found in (
        (state.digest, values[1:], "task vector"),
        (state.digest, far.vector, "plan adapter"),
        (far.digest, far.vector, "plan adapter: found a value of size 2000"),
        (state.digest, values, "notes.jsonl"),
    ):
        plan = RoundPlan(run.digest, 0, 1, 1, adapter)
        with pytest.raises(BadInput, match=found):
            loaded.train(run, tmp_path / "none", budget, plan, vector_to_bytes(vector))


def test_a_run_that_the_network_can_not_serve_is_declined_before_it_is_charged(
    tmp_path: Path, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a head phase of words was at nodes of an earlier version, which failed in its first
    round.
    """
    north = node_with_data(tmp_path / "n", tiny_bert)
    loaded = LoadedRun(north.folder, north.folder.load_policy(), north.ledger)
    run = manifest_of(
        replace(PHASE, name="head"),
        base_digest=base_digest(tiny_bert),
        network=Network.of(ModelConfig(pooling="mean"), LORA),
    )
    run = replace(run, spec_digest=loaded.spec(run, tmp_path / "none").digest)

    def none(model: AdapterModel) -> None:
        raise BadInput("[training] head_rounds: found a head that scores every word")

    with monkeypatch.context() as earlier:
        earlier.setattr(AdapterModel, "head", property(none))
        north.restart(loaded)
        assert isinstance(north.offered(run), Decline)
        assert [entry.body["kind"] for entry in north.ledger.entries()] == ["open"]
    north.restart(LoadedRun(north.folder, north.folder.load_policy(), north.ledger))
    assert isinstance(north.offered(run), Started)


def test_a_base_is_tried_with_the_head_of_each_task(tmp_path: Path, tiny_bert: Path) -> None:
    """Words are read by `words`, which no other task is: a check of data said that none serves."""
    north = node_with_data(tmp_path / "n", tiny_bert)
    policy = north.folder.load_policy()
    tags = replace(policy.data["notes"], task="token-classification", labels=("O", "B-a"))
    policy = replace(policy, data={**policy.data, "tags": tags})
    tried = try_base(north.folder, policy, base_digest(tiny_bert))
    assert {name: isinstance(took, float) for name, took in tried.items()} == {
        "sequence-classification": True,
        "token-classification": True,
    }


def test_a_node_keeps_the_size_that_it_found_for_a_run(tmp_path: Path, tiny_bert: Path) -> None:
    north = node_with_data(tmp_path / "n", tiny_bert)
    run = manifest_of(
        base_digest=base_digest(tiny_bert), network=Network.of(ModelConfig(pooling="mean"), LORA)
    )
    loaded = LoadedRun(north.folder, north.folder.load_policy(), north.ledger)
    assert loaded.prepare(run, tmp_path / "none").training.tokens == 512
    kept = json.loads((tmp_path / COMPUTE).read_bytes())
    assert kept["cpu"]["micro_batch_tokens"] == 512
    kept["cpu"]["micro_batch_tokens"] = 1024  # of a time when the machine was quiet
    (tmp_path / COMPUTE).write_text(json.dumps(kept))
    again = LoadedRun(north.folder, north.folder.load_policy(), north.ledger)
    assert again.prepare(run, tmp_path / "none").training.tokens == 1024


def test_a_step_is_divided_among_the_devices_that_the_policy_names(
    tmp_path: Path, tiny_bert: Path
) -> None:
    """Their processes end with the policy."""
    north = node_with_data(tmp_path / "n", tiny_bert)
    run = manifest_of(
        base_digest=base_digest(tiny_bert), network=Network.of(ModelConfig(pooling="mean"), LORA)
    )
    text = north.folder.policy.read_text() + "[trainer]\ndevice = {}\n"
    north.set_policy(text.format('["cpu", "cpu"]'))
    loaded = LoadedRun(north.folder, north.folder.load_policy(), north.ledger)
    gradients = loaded.prepare(run, tmp_path / "none").training.gradients
    assert isinstance(gradients, Ranks)
    ((_, process),) = gradients.started
    assert process.is_alive()
    north.set_policy(text.format('"cpu"'))
    loaded.adopt(north.folder.load_policy())
    assert not process.is_alive()
    assert not isinstance(loaded.prepare(run, tmp_path / "none").training.gradients, Ranks)
    for wrong in ('["auto", "cpu"]', '"cuda:99"'):
        north.set_policy(text.format(wrong))
        loaded.adopt(north.folder.load_policy())
        with pytest.raises(BadInput, match=r"\[trainer\] device: found .* expected what there is"):
            loaded.prepare(run, tmp_path / "none")


def test_a_base_is_kept_as_its_manifest_says(tmp_path: Path, tiny_bert: Path) -> None:
    north = node_with_data(tmp_path / "n", tiny_bert)
    run = manifest_of(
        base_digest=base_digest(tiny_bert), network=Network.of(ModelConfig(pooling="mean"), LORA)
    )
    loaded = LoadedRun(north.folder, north.folder.load_policy(), north.ledger)
    for kind, stored in (("nf4", "nf4"), ("", "float32")):
        kept = replace(run, quantised=kind)
        folder = tmp_path / (kind or "plain") / "none"
        folder.parent.mkdir()
        assert loaded.prepare(kept, folder).training.gradients.model.stored == stored


def test_how_many_units_were_respelled_is_told_to_the_log_alone(
    tmp_path: Path, tiny_bert: Path, caplog: pytest.LogCaptureFixture
) -> None:
    north = node_with_data(tmp_path / "n", tiny_bert)
    names = [f"person {k // 2}" for k in range(40)] + ["PERSON 3", "Person  4"]
    rows = [{"text": "w1 good", "label": "ab"[k % 2], "who": who} for k, who in enumerate(names)]
    (north.root / "notes.jsonl").write_text("\n".join(map(json.dumps, rows)))
    text = north.folder.policy.read_text()
    north.set_policy(text.replace("[bases]", 'unit = "who"\n[bases]'))
    policy = north.folder.load_policy()
    loaded = LoadedRun(north.folder, policy, north.ledger)
    network = Network.of(ModelConfig(pooling="mean"), LORA)
    run = manifest_of(base_digest=base_digest(tiny_bert), network=network, unit="who")
    run = replace(run, spec_digest=loaded.spec(run, tmp_path / "none").digest)
    north.resident = Resident(north.folder, policy, north.identity, north.ledger, loaded)
    north.begin(run)
    assert "notes.jsonl: 2 units were spelled in several ways" in caplog.text
    told = report_body(north.folder, policy, north.identity, north.ledger)
    left = [path.read_bytes() for path in north.folder.under("outbox").rglob("*") if path.is_file()]
    assert left and not any(b"spelled" in each for each in [*left, json.dumps(told).encode()])


@pytest.mark.parametrize("mode", ["none", "record"])
def test_unnoised_moments_are_in_no_file(tmp_path: Path, tiny_bert: Path, mode: str) -> None:
    """Before: an optimiser that nothing noised lay beside the run, and says what the data say."""
    north = node_with_data(tmp_path / "n", tiny_bert)
    text = north.folder.policy.read_text()
    north.set_policy(text.replace("[limits]", "[limits]\nallow_unnoised = true"))
    loaded = LoadedRun(north.folder, north.folder.load_policy(), north.ledger)
    network = Network.of(ModelConfig(pooling="mean"), LORA)
    run = manifest_of(
        replace(PHASE, optimizer="adamw"), base_digest=base_digest(tiny_bert), network=network,
        mode=mode,
    )  # fmt: skip
    spec = loaded.spec(run, tmp_path / "none")
    run = replace(run, spec_digest=spec.digest)
    policy = north.folder.load_policy()
    north.resident = Resident(north.folder, policy, north.identity, north.ledger, loaded)
    left = north.folder.run(run.digest) / "moments"
    north.begin(run)
    left.mkdir()
    (left / "of-an-earlier-version-0-a.safetensors").write_bytes(b"said something")
    state = AdapterState(spec, np.zeros(spec.size, np.float32))
    task = task_of(run, adapter=state.digest, vector=vector_to_bytes(state.vector))
    assert isinstance(north.read(north.resident.ask(task)), Answer)
    assert len(list(left.glob("*"))) == (0 if mode == "none" else 2)
    ours = [path for path in left.glob("*") if "earlier" not in path.name]
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in ours)
    for other in ("client", "shared-record"):
        assert isinstance(loaded._moments(replace(run, mode=other)), UnnoisedMoments)
    moments = loaded._moments(run).read("north", 0, 2)
    assert set(moments) == {"exp_avg", "exp_avg_sq", "step"}


def test_moments_in_memory_are_those_before_the_round() -> None:
    store = UnnoisedMoments()
    for number in (1, 2, 5):
        store.write("c", 0, number, {"step": np.full(1, number, dtype=np.float32)})
    assert store.read("c", 0, 6)["step"][0] == 5 and store.read("c", 0, 5)["step"][0] == 2
    assert store.read("d", 0, 6) == {} and UnnoisedMoments().read("c", 0, 6) == {}
