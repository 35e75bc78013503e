"""A head that tags words, trained by itself on what the frozen base makes of each word."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from fedlora.client.training.head import head_clipped_sum
from fedlora.client.training.local import ClientData, LocalTraining
from fedlora.client.training.step import ClipGroups, GradientSum, PerSampleGradients
from fedlora.common.config.schema import LoraConfig, ModelConfig
from fedlora.common.data.records import Records, UnitIndex
from fedlora.common.data.tagged import TAGS as PART
from fedlora.common.data.tagged import WORDS
from fedlora.common.errors import BadInput
from fedlora.common.model.features import FeatureCache, PooledTexts, pooled_features
from fedlora.common.model.network import AdapterModel, build_model
from fedlora.common.model.pooling import build_head
from fedlora.common.model.state import AdapterState
from fedlora.common.tasks.batch import Batch, in_rows
from fedlora.common.tasks.token_classification import TokenClassification
from fedlora.server.rounds.evaluation import Evaluator
from tests.oracles import clipped_sum_by_ones, head_clipped_sum_by_ones

TAGS = ("O", "B-place", "I-place")
SIZES = (3, 1, 5, 9, 2, 7, 1, 4, 6, 3)  # words of each record
UNITS = UnitIndex(np.array([0, 3, 4, 8, 9, 10]), np.array([7, 0, 3, 9, 1, 2, 8, 4, 5, 6]))
EVERY = np.arange(len(UNITS))


@dataclass(frozen=True)
class Case:
    """A model whose head stands anywhere, one without hooks, and records."""

    model: AdapterModel
    reference: AdapterModel
    training: LocalTraining
    data: ClientData

    def sum(self, drawn: np.ndarray[tuple[int], np.dtype[np.int64]], clip: float) -> GradientSum:
        """Of the units `drawn`, by the head phase."""
        groups = ClipGroups.flat(self.model.spec, clip, "head")
        return self.training._head_sum(self.data, drawn, self.reference.state(), groups)


@pytest.fixture(scope="module")
def case(tiny_bert: Path) -> Case:
    rng = np.random.default_rng(4)
    settings = ModelConfig(base=str(tiny_bert), pooling="words", pooled_layers=(1, 2))
    task, lora = TokenClassification(TAGS), LoraConfig(rank=2, targets=("query",))
    model, reference = (build_model(settings, lora, task, 5) for _ in range(2))
    values = rng.normal(0, 0.3, model.spec.size).astype(np.float32)
    for each in (model, reference):
        each.load(AdapterState(each.spec, values))
    words = [[f"w{k}" for k in rng.integers(0, 50, size)] for size in SIZES]
    parts = {WORDS: words, PART: [rng.integers(0, 3, size).tolist() for size in SIZES]}
    texts = [" ".join(each) for each in words]
    encoded = task.encode(
        Records(texts, None, None, None, {}, "test", parts=parts), model.tokenizer, 8
    )
    training = LocalTraining(PerSampleGradients(model), FeatureCache(model), 200)
    return Case(model, reference, training, ClientData("here", encoded, UNITS))


@pytest.mark.parametrize("clip", [0.05, 1.0, 1e4])
@pytest.mark.parametrize("drawn", [EVERY, np.array([2]), np.array([0, 3])], ids=str)
def test_a_units_gradient_is_the_heads_part_of_the_general_steps(
    case: Case, clip: float, drawn: np.ndarray[tuple[int], np.dtype[np.int64]]
) -> None:
    """Of units of several records of several words, some of them cut: by hooks, and one by one."""
    groups = ClipGroups.flat(case.model.spec, clip, "head")
    found = case.sum(drawn, clip)
    case.model.load(case.reference.state())
    general = case.training.gradients.clipped_sum(case.data.encoded, UNITS, drawn, groups, 200)
    ones = clipped_sum_by_ones(case.reference, case.data.encoded, UNITS, drawn, groups)
    for expected in (general.vector, ones):
        assert np.linalg.norm(found.vector - expected) <= 1e-5 * np.linalg.norm(expected)
    assert (found.units, found.nonfinite) == (len(drawn), 0)
    assert 0 < np.linalg.norm(found.vector) <= clip * len(drawn) * (1 + 1e-12)


def test_one_unit_more_moves_the_sum_by_its_own_clipped_gradient(case: Case) -> None:
    """To float64's rounding, whoever else is there."""
    clip = 0.05
    every = case.sum(EVERY, clip).vector
    for unit in EVERY:
        without, alone = (
            case.sum(np.flatnonzero(unit != EVERY), clip).vector,
            case.sum(np.array([unit]), clip).vector,
        )
        assert np.linalg.norm(every - without - alone) <= 1e-13
        assert np.linalg.norm(alone) <= clip * (1 + 1e-12)


def test_a_unit_without_a_row_makes_no_unit_of_anothers_rows() -> None:
    """Three rows of two units, the last of which is the third: they are no three units."""
    torch.manual_seed(3)
    head, owners = build_head(7, 0, 3), np.array([0, 2, 2])
    features, targets = torch.randn(3, 7), torch.tensor([0, 1, 1])

    def losses(logits: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(logits, truth, reduction="none")

    found = head_clipped_sum(head, losses, features, targets, owners, 0.01).vector
    expected = head_clipped_sum_by_ones(head, losses, features, targets, owners, 0.01)
    assert np.linalg.norm(found - expected) <= 1e-6 * np.linalg.norm(expected)


def test_a_long_record_makes_no_room_for_its_length_beside_short_ones(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of 64 words and 63 of one: what is filled up is at most twice the words."""
    rng, filled = np.random.default_rng(2), []
    records = torch.tensor([0] * 64 + [3 + 2 * k for k in range(63)])  # two records have no word
    logits = torch.from_numpy(rng.normal(0, 1, (len(records), 3)))
    tags = torch.from_numpy(rng.integers(0, 3, len(records)))
    whole = case.model.task.losses(*in_rows(logits, tags, records, 128))
    losses = TokenClassification.losses

    def watched(task: TokenClassification, outputs: torch.Tensor, batch: Batch) -> torch.Tensor:
        filled.append(outputs.shape[0] * outputs.shape[1])
        return losses(task, outputs, batch)

    monkeypatch.setattr(TokenClassification, "losses", watched)
    found = case.training._losses(logits, torch.stack([tags, records], dim=1))
    assert 0 < sum(filled) <= 2 * len(records)
    assert found.sum() == pytest.approx(float(whole.sum()), rel=1e-12)


def test_more_features_than_a_machine_has_room_for_are_refused(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, encoded = np.arange(len(SIZES)), case.data.encoded
    size = pooled_features(case.reference, encoded, rows).numel() * 4
    monkeypatch.setattr("fedlora.common.model.features.available", lambda device: size - 1)
    with pytest.raises(
        BadInput, match=r"head_rounds: 37 rows of 64 features take .* pooled_layers"
    ):
        pooled_features(case.reference, encoded, rows)


def test_a_head_on_kept_words_scores_as_the_whole_network_does(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedlora.server.rounds.evaluation.EVALUATION_RECORDS", 3)
    rows = np.array([4, 0, 9, 3, 2, 8, 7])
    features = FeatureCache(case.reference)
    scores = Evaluator("test", case.reference, case.data.encoded, rows, features)
    state = case.reference.state()
    whole, head = (scores.evaluate(state, head_only=each) for each in (False, True))
    assert head == pytest.approx(whole, rel=1e-5)


def test_shared_texts_are_told_apart_by_which_tokens_are_words(case: Case) -> None:
    """The same tokens as one word of two pieces and as two words."""
    task, model, texts = TokenClassification(TAGS), case.reference, PooledTexts()
    tokens, offsets = np.array([5, 6], dtype=np.int32), np.array([0, 2])
    two = task.unlabelled(tokens, offsets)
    one = task.unlabelled(tokens, offsets)
    one.targets[1] = -100
    row = np.array([0])
    for _ in range(2):
        found = [pooled_features(model, each, row, texts=texts) for each in (two, one)]
        assert [len(each) for each in found] == [2, 1]
        assert torch.equal(found[0][:1], found[1])
