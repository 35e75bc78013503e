"""Features: computed once for a text, and again as soon as anything below the head has moved."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

from fedlora.common.config.schema import LoraConfig, ModelConfig
from fedlora.common.data.records import Records
from fedlora.common.model.features import FeatureCache, PooledTexts, length_batches, pooled_features
from fedlora.common.model.network import AdapterModel, build_model
from fedlora.common.model.projection import Projection
from fedlora.common.model.state import AdapterState
from fedlora.common.tasks.batch import Encoded
from fedlora.common.tasks.classification import SequenceClassification

TEXTS = ("w1 w2 w3", "w4", "w5 w6", "w1 w2 w3", "w7 w8 w9 w10 w11")
ALL = np.arange(len(TEXTS))


@dataclass
class Count:
    """How many texts went through the transformer."""

    seen: list[int] = field(default_factory=list)

    def __call__(self, done: int) -> None:
        self.seen.append(done)

    @property
    def total(self) -> int:
        return sum(self.seen)


@pytest.fixture
def model(tiny_bert: Path) -> AdapterModel:
    settings = ModelConfig(base=str(tiny_bert), pooling="layers")
    return build_model(settings, LoraConfig(rank=2), SequenceClassification(("a", "b")), seed=3)


def encoded(model: AdapterModel) -> Encoded:
    records = Records(TEXTS, None, np.zeros(len(TEXTS), dtype=np.int64), None, {}, "test.jsonl")
    return model.task.encode(records, model.tokenizer, 16)


def moved(model: AdapterModel, part: str) -> AdapterState:
    named = {name: value.copy() for name, value in model.state().named().items()}
    for name in named:
        if part in name:
            named[name] += 0.5
    return AdapterState.from_named(model.spec, named)


def test_runs_of_one_process_share_what_the_transformer_made(model: AdapterModel) -> None:
    texts, first, second = PooledTexts(), Count(), Count()
    plain = pooled_features(model, encoded(model), ALL)
    one = pooled_features(model, encoded(model), ALL[:3], first, texts)
    other = pooled_features(model, encoded(model), ALL[::-1].copy(), second, texts)
    assert torch.allclose(one, plain[:3], atol=1e-5)
    assert torch.allclose(other, plain.flip(0), atol=1e-5)
    assert (first.total, second.total) == (3, 1)  # row 3 is the text of row 0


def test_what_is_shared_lies_below_the_projection(model: AdapterModel) -> None:
    texts = PooledTexts()
    means = pooled_features(model, encoded(model), ALL, texts=texts)
    model.projection = Projection.fit(means.numpy(), 2, 0.1)
    count = Count()
    found = pooled_features(model, encoded(model), ALL, count, texts)
    assert found.shape == (len(TEXTS), 2)
    assert torch.allclose(found, pooled_features(model, encoded(model), ALL), atol=1e-5)
    assert count.total == 0


@pytest.mark.parametrize(("part", "again"), [(".lora_B.", 5), (".lora_A.", 0), ("head", 0)])
def test_features_are_computed_again_where_they_changed(
    model: AdapterModel, part: str, again: int
) -> None:
    """A alone changes nothing while B is 0, and the head lies above."""
    count = Count()
    cache = FeatureCache(model, progress=count)
    before = cache.get("client", encoded(model), ALL, model.state())
    assert count.total == 5
    after = cache.get("client", encoded(model), ALL, moved(model, part))
    assert count.total == 5 + again
    assert torch.equal(before, after) == (again == 0)


def test_least_recently_used_owners_go_first(model: AdapterModel) -> None:
    count = Count()
    data, state = encoded(model), model.state()
    size = pooled_features(model, data, ALL).nbytes
    cache = FeatureCache(model, limit_bytes=2 * size, progress=count)
    for owner in ("a", "b", "a", "c", "a", "b"):
        cache.get(owner, data, ALL, state)
    assert count.total == 4 * len(TEXTS)  # a, b, c, and b again


def test_batches_hold_at_most_their_tokens() -> None:
    lengths = np.array([5, 1, 1, 9, 2, 2])
    batches = length_batches(lengths, 6)
    assert sorted(np.concatenate(batches).tolist()) == list(range(6))
    assert all(len(batch) == 1 or lengths[batch].max() * len(batch) <= 6 for batch in batches)
