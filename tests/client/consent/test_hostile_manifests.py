"""A coordinator's choices must not undo the clip, nor ask the data a question for free."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from fedlora.client.consent.judge import judge
from fedlora.client.report.report import report_body
from fedlora.client.training.head import head_clipped_sum
from fedlora.client.training.local import ClientData, LocalTraining
from fedlora.client.training.step import ClipGroups, PerSampleGradients
from fedlora.common.config.schema import LoraConfig, ModelConfig
from fedlora.common.data.records import Records, unit_groups
from fedlora.common.errors import BadInput
from fedlora.common.manifest.manifest import RunManifest
from fedlora.common.model import features, pooling
from fedlora.common.model.features import FeatureCache, pooled_features
from fedlora.common.model.network import AdapterModel, build_model
from fedlora.common.model.projection import Projection
from fedlora.common.model.state import AdapterState
from fedlora.common.tasks.batch import Batch, Encoded
from fedlora.common.tasks.classification import SequenceClassification
from tests.client.institution import PHASE, Institution, manifest_of

SHORT, LONG = "w1 w2 w3 w4 w5", "w1 w2 w3 w4 w5 w6"


@pytest.mark.parametrize(
    ("field", "values"),
    [
        # squares of what it should bound are 0 in float32
        ("clip", (1e-40, 9e-7, 0.0, float("nan"))),
        ("head_clip", (1e-40, -1.0)),
        ("expected_units", (1e-40, 0.0)),
        ("learning_rate", (1e-40, 1e4)),
        ("sampling_rate", (0.0, 1.5)),
    ],
)
def test_what_would_undo_the_clip_is_not_allowed(
    tmp_path: Path, field: str, values: tuple[float, ...]
) -> None:
    policy = Institution(tmp_path / "n").folder.load_policy()
    for value in values:
        run = manifest_of(replace(PHASE, **{field: value}))  # type: ignore[arg-type]
        (verdict,) = [
            each for each in judge(run, policy, "f", {}, None) if each.field.endswith(f".{field}")
        ]
        assert not verdict.allowed, value


def test_what_would_ask_the_data_is_not_allowed(tmp_path: Path) -> None:
    """A length below any record's would be consented to or declined by the shortest record."""
    policy = Institution(tmp_path / "n").folder.load_policy()
    for changes in ({"max_length": -9}, {"max_length": 3}, {"seed": -1}):
        verdicts = judge(manifest_of(**changes), policy, "f", {}, None)
        (field,) = changes
        assert not next(each for each in verdicts if each.field == field).allowed
    network = replace(manifest_of().network, alpha=1e6)
    verdicts = judge(manifest_of(network=network), policy, "f", {}, None)
    assert not next(each for each in verdicts if each.field == "network.alpha").allowed


@pytest.mark.parametrize(("name", "allowed"), [("head", False), ("lora", True)])
def test_a_private_head_phase_has_no_hidden_layer(tmp_path: Path, name: str, allowed: bool) -> None:
    """What lies between its layers is rounded by a row's place: 3 clips were made of it."""
    policy = Institution(tmp_path / "n").folder.load_policy()
    network = replace(manifest_of().network, head_hidden=5)
    run = replace(manifest_of(replace(PHASE, name=name)), network=network)
    verdicts = judge(run, policy, "f", {}, None)
    found = next(each for each in verdicts if each.field == "network.head_hidden")
    assert found.allowed == allowed


@pytest.mark.parametrize("text", ['"seed":%s' % (10**400), '"run":"\\ud800"'])
def test_numbers_and_texts_that_nothing_can_hold_are_bad_input(text: str) -> None:
    table = json.loads(manifest_of().to_bytes())
    name = text.split(":")[0].strip('"')
    del table[name]
    data = json.dumps(table)[:-1] + "," + text + "}"
    with pytest.raises(BadInput, match=name):
        RunManifest.from_bytes(data.encode())


def test_a_clip_below_what_float32_can_measure_is_refused(tiny_bert: Path) -> None:
    spec = model_of(tiny_bert).spec
    with pytest.raises(BadInput, match="clip: found 1e-07"):
        ClipGroups.flat(spec, 1e-7)
    with pytest.raises(BadInput, match="clip: found 1e-07"):
        ClipGroups.split(spec, 1.0, 1e-7)


@pytest.mark.parametrize("clip", [1e-3, 1e-6])
def test_huge_features_with_tiny_errors_are_clipped(clip: float) -> None:
    """|b|² is 0 in float32 where b aᵀ is far above the clip."""
    head = torch.nn.Linear(4, 2)
    with torch.no_grad():
        head.weight.zero_()
        head.bias.zero_()
        head.weight[0, 0] = 52.7 / 0.9e19
    features = torch.full((1, 4), 0.9e19)
    found = head_clipped_sum(
        head, lambda out, to: functional.cross_entropy(out, to, reduction="none"), features,
        torch.tensor([0]), np.array([0]), clip,
    )  # fmt: skip
    assert float(np.linalg.norm(found.vector.astype(np.float64))) <= clip * (1 + 1e-5)


def model_of(base: Path) -> AdapterModel:
    lora = LoraConfig(rank=1, targets=("query", "key"), layers=(0,), alpha=1.0)
    return build_model(
        ModelConfig(base=str(base), pooling="mean"), lora, SequenceClassification(("a", "b")), 5
    )


def hostile(
    model: AdapterModel, short: str = SHORT, long: str = LONG, near: int = 0
) -> AdapterState:
    """Attention whose score of a padded place, from `near` on, is +inf, and of every other one 0.

    Known from the public base.
    """
    embeddings: Any = model.network.backbone.base_model.model.embeddings  # type: ignore[union-attr]
    ids = model.tokenizer([short, long], padding=True, return_tensors="pt")
    with torch.no_grad():
        seen = embeddings(ids["input_ids"])
    mask = ids["attention_mask"].bool()
    if near:  # nearer padding the short one has in its own shape
        seen, mask = seen[:1], mask[:1] | (torch.arange(mask.shape[1]) < near)
    real, pad = seen[mask].double().numpy(), seen[~mask].double().numpy()
    pad = pad[:1] if near else pad  # one is enough, and leaves room to be exact elsewhere
    both = np.concatenate([real, pad])
    query = np.linalg.lstsq(both, np.ones(len(both)), rcond=None)[0]
    key = np.linalg.lstsq(both, np.r_[np.zeros(len(real)), np.ones(len(pad))], rcond=None)[0]
    vector = model.state().vector.copy()
    for tensor, place in model.spec.slices():
        for part, values in (("query.lora_A", query), ("key.lora_A", key)):
            if part in tensor.name:
                vector[place] = values
        for part, value in (("query.lora_B", 1e19), ("key.lora_B", 1e20)):
            if part in tensor.name:
                vector[place] = value
    return AdapterState(model.spec, vector)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_record_that_pads_the_others_moves_the_sum_by_one_clip(
    tiny_bert: Path, attention: str
) -> None:
    model = model_of(tiny_bert)
    gradients = PerSampleGradients(model)
    model.load(hostile(model))
    model.set_attention(attention)

    def encoded(texts: list[str]) -> Encoded:
        records = Records(texts, None, np.zeros(len(texts), dtype=np.int64), None, {}, "x")
        return model.task.encode(records, model.tokenizer, 16)

    sums, features = [], []
    for texts in ([SHORT] * 40, [SHORT] * 40 + [LONG]):
        data, units = encoded(texts), unit_groups(None, len(texts))
        groups = ClipGroups.flat(model.spec, 1.0)
        sums.append(gradients.clipped_sum(data, units, np.arange(len(texts)), groups, 4096))
        features.append(pooled_features(model, data, np.arange(40)).numpy())
    assert np.linalg.norm(sums[0].vector - sums[1].vector) <= 1
    assert 0 <= sums[1].nonfinite - sums[0].nonfinite <= 1  # by its own padding, and nobody else's
    together = pooled_features(model, encoded([SHORT] * 4 + [LONG]), np.arange(5)).numpy()
    assert np.array_equal(together[:4], features[0][:4], equal_nan=True)


def test_no_longer_record_brings_padding_that_an_adapter_reads(tiny_bert: Path) -> None:
    """Before, records of several widths went together where a try on values of nobody's allowed it;
    an adapter to which padding behind the shorter ones is no number made all of theirs 0.
    """
    model = model_of(tiny_bert)
    gradients, short, long = PerSampleGradients(model), "w1 " * 10, "w5 " * 29
    model.load(hostile(model, short, long, 16))
    sums = []
    for texts in ([short] * 16, [short] * 16 + [long]):
        records = Records(texts, None, np.zeros(len(texts), dtype=np.int64), None, {}, "x")
        data, units = model.task.encode(records, model.tokenizer, 40), unit_groups(None, len(texts))
        drawn, groups = np.arange(len(texts), dtype=np.int64), ClipGroups.flat(model.spec, 1.0)
        for _ in range(24):  # until larger batches were tried
            found = gradients.clipped_sum(data, units, drawn, groups, 4096)
        sums.append(found)
    assert sums[0].nonfinite == 0 and sums[1].nonfinite <= 1
    assert np.linalg.norm(sums[0].vector - sums[1].vector) <= 1


def amplifier(base: Path, projected: bool) -> AdapterModel:
    """Attention as a function of rounding errors, by an adapter within every checked bound.

    Query and key project what comes out of a LayerNorm on the direction in which it is 0.
    """
    lora = LoraConfig(rank=1, targets=("query", "key"), alpha=64.0)
    task = SequenceClassification(("a", "b"))
    settings = ModelConfig(base=str(base), pooling="mean", projection=8 if projected else 0)
    model = build_model(settings, lora, task, 5)
    values = np.random.default_rng(0).normal(0, 1.0, model.spec.size).astype(np.float32)
    for tensor, place in model.spec.slices():
        if "lora_" in tensor.name:
            values[place] = 1.0 if ".lora_A." in tensor.name else 1e3
    if projected:
        rows = np.random.default_rng(1).normal(0, 1.0, (40, 32)).astype(np.float32)
        model.projection = Projection.fit(rows, 8, 0.1)
    model.load(AdapterState(model.spec, values))
    return model


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["records", "units", "head"])
def test_rounding_that_an_adapter_amplifies_depends_on_no_other_unit(
    tiny_bert: Path, attention: str, kind: str
) -> None:
    """60 units with and without one more, which is longer.

    What the 60 add to the sum has the same bits.
    """
    model = amplifier(tiny_bert, projected=kind == "head")
    model.set_attention(attention)
    gradients, state = PerSampleGradients(model), model.state()
    rng = np.random.default_rng(2)
    texts = [" ".join(f"w{k}" for k in rng.integers(0, 60, rng.integers(3, 9))) for _ in range(60)]
    names = [str(place // 2 if kind == "units" else place) for place in range(60)] + ["last"]
    sums = []
    for count in (60, 61):
        labels = np.zeros(count, dtype=np.int64)
        records = Records([*texts, " ".join(["w5"] * 30)][:count], None, labels, None, {}, "x")
        data, units = model.task.encode(records, model.tokenizer, 40), unit_groups(names[:count])
        drawn, groups = np.arange(len(units), dtype=np.int64), ClipGroups.flat(model.spec, 1e-3)
        if kind == "head":
            training = LocalTraining(gradients, FeatureCache(model), 4096)
            sums.append(training._head_sum(ClientData("me", data, units), drawn, state, groups))
        else:
            for _ in range(12):  # until larger batches were tried
                found = gradients.clipped_sum(data, units, drawn, groups, 4096)
            sums.append(found)
    assert sums[0].nonfinite == sums[1].nonfinite == 0 and np.linalg.norm(sums[0].vector) > 1e-3
    assert np.linalg.norm(sums[1].vector - sums[0].vector) <= 1e-3 * (1 + 1e-9)


def by_place(logits: torch.Tensor) -> torch.Tensor:
    """A product that rounds otherwise in its last rows."""
    return logits * (1 + 1e-6 * torch.arange(len(logits)))[:, None]


def by_company(logits: torch.Tensor) -> torch.Tensor:
    """Rows that mix, as in a layer that normalises over its batch."""
    return logits + 1e-6 * logits.mean(dim=0)


@pytest.mark.parametrize("fault", [by_place, by_company])
def test_records_go_alone_where_their_place_or_company_would_matter(
    tiny_bert: Path, monkeypatch: pytest.MonkeyPatch, fault: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    model = model_of(tiny_bert)
    gradients, logits, pooled = PerSampleGradients(model), model.logits, model.pooled
    sizes = []

    def watched(batch: Batch) -> torch.Tensor:
        sizes.append(len(batch.ids))
        return fault(logits(batch))

    monkeypatch.setattr(model, "logits", watched)
    monkeypatch.setattr(model, "pooled", lambda batch: fault(pooled(batch)))
    records = Records([SHORT] * 9, None, np.zeros(9, dtype=np.int64), None, {}, "x")
    data, units = model.task.encode(records, model.tokenizer, 16), unit_groups(None, 9)
    gradients.clipped_sum(data, units, np.arange(9), ClipGroups.flat(model.spec, 1.0), 4096)
    # two probes, of gradients and of what a head gives, and each record by itself
    assert sizes == [4, 4, 4, 4, *[1] * 9]
    features = pooled_features(model, data, np.arange(9))
    assert (features == features[:1]).all()


def test_who_has_no_padding_depends_on_nobody_who_has(
    tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no row of a batch is padded, attention may go through other code.

    A shorter record must not decide that.
    """
    model = model_of(tiny_bert)
    gradients, logits = PerSampleGradients(model), model.logits
    monkeypatch.setattr(
        model, "logits", lambda batch: logits(batch) * (2.0 if batch.mask.all() else 1.0)
    )
    # and two of BERT's own: 16 is a bucket
    texts = [" ".join(["w1"] * words) for words in (10, *[14] * 8)]
    records = Records(texts, None, np.zeros(9, dtype=np.int64), None, {}, "x")
    data, units = model.task.encode(records, model.tokenizer, 16), unit_groups(None, 9)
    groups = ClipGroups.flat(model.spec, 1e3)
    alone, without, beside = (
        gradients.clipped_sum(data, units, drawn, groups, 4096).vector
        for drawn in (np.arange(1), np.arange(1, 9), np.arange(9))
    )
    assert np.linalg.norm(without) > 1e-3
    assert np.linalg.norm(beside - without - alone) <= 1e-9


def test_a_projection_is_tried_with_values_of_our_own(
    tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A coordinator's could hide that a row's place matters: here positive rows do."""
    model = amplifier(tiny_bert, projected=True)
    theirs, real = model.projection, pooling._projected

    calls = []

    def fault(rows: torch.Tensor, projection: Projection) -> torch.Tensor:
        calls.append(len(rows))
        hidden = bool((rows > 0).all()) or projection is theirs
        return real(rows, projection) * (
            1.0 if hidden else 1 + 1e-6 * torch.arange(len(rows))[:, None]
        )

    monkeypatch.setattr(pooling, "_projected", fault)
    pooled = np.random.default_rng(3).normal(0, 1, (70, 32)).astype(np.float32)
    features._projected(model, torch.from_numpy(pooled))
    assert calls == [64, 64, *[1] * 70]  # two probes, and each by itself


def test_a_pass_that_was_cut_off_spoils_no_later_one(
    tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where memory is short: the next attempt is as if there had been none."""
    model = model_of(tiny_bert)
    gradients, logits = PerSampleGradients(model), model.logits
    records = Records([SHORT] * 9, None, np.zeros(9, dtype=np.int64), None, {}, "x")
    data, units = model.task.encode(records, model.tokenizer, 16), unit_groups(None, 9)

    def total() -> Any:
        return gradients.clipped_sum(
            data, units, np.arange(9), ClipGroups.flat(model.spec, 1.0), 4096
        ).vector

    def cut(batch: Batch) -> torch.Tensor:
        logits(batch)
        raise torch.OutOfMemoryError

    before = total()
    monkeypatch.setattr(model, "logits", cut)
    with pytest.raises(torch.OutOfMemoryError):
        total()
    monkeypatch.setattr(model, "logits", logits)
    assert np.array_equal(total(), before)


def test_a_report_quotes_no_record_and_tells_no_two_guesses_apart(tmp_path: Path) -> None:
    node = Institution(tmp_path / "n")
    line = {
        "time": "t",
        "manifest": "",
        "round": 0,
        "attempt": 0,
        "reason": "private",
        "detail": "HIV positive",
    }
    node.folder.refusals.write_text(json.dumps(line) + "\n")
    body = report_body(node.folder, node.folder.load_policy(), node.identity, node.ledger)
    assert "HIV" not in json.dumps(body) and body["refusals"][0]["reason"] == "private"
