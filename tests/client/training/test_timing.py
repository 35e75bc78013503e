"""How many tokens go in at once is found once, on texts that anybody may read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedlora.client.training import timing
from fedlora.client.training.step import PerSampleGradients
from fedlora.client.training.timing import (
    SMALLEST,
    Steps,
    best_tokens,
    nobodys_texts,
    record_seconds,
    tokens_of_run,
)
from fedlora.common.config.schema import LoraConfig, ModelConfig
from fedlora.common.errors import BadInput
from fedlora.common.model.compute import COMPUTE
from fedlora.common.model.network import build_model
from fedlora.common.tasks.batch import Encoded
from fedlora.common.tasks.classification import SequenceClassification

PACKED = Steps(drawn=400.0, packed=True, private=True)


@pytest.fixture(scope="module")
def gradients(tiny_bert: Path) -> PerSampleGradients:
    settings = ModelConfig(base=str(tiny_bert), max_length=32, pooling="mean")
    lora = LoraConfig(rank=2, targets=("query",))
    return PerSampleGradients(build_model(settings, lora, SequenceClassification(("a", "b")), 0))


@pytest.fixture(scope="module")
def texts(gradients: PerSampleGradients) -> Encoded:
    return nobodys_texts(gradients.model)


def slower_from(size: int, seen: list[int]) -> object:
    """A machine on which twice the tokens are twice as fast a record, up to `size`."""

    def seconds(gradients: object, texts: object, steps: object, tokens: int) -> float:
        seen.append(tokens)
        return 1.0 / min(tokens, size)

    return seconds


def test_the_size_beyond_which_nothing_is_gained_is_found(
    gradients: PerSampleGradients, texts: Encoded, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    monkeypatch.setattr(timing, "record_seconds", slower_from(2048, seen))
    assert best_tokens(gradients, texts, PACKED) == 2048
    assert seen == [512, 1024, 2048, 4096]
    few = Steps(drawn=8.0, packed=True, private=True)
    assert best_tokens(gradients, texts, few) == SMALLEST  # one batch holds them all
    fixed = Steps(drawn=400.0, packed=False, private=True)  # of 16 records on a CPU
    assert best_tokens(gradients, texts, fixed) == 1024
    assert seen == [512, 1024, 2048, 4096, 512, 1024]


def test_no_size_is_tried_that_does_not_fit(
    gradients: PerSampleGradients, texts: Encoded, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    monkeypatch.setattr(timing, "record_seconds", slower_from(1 << 20, seen))
    monkeypatch.setattr(timing, "available", lambda device: 1)
    assert best_tokens(gradients, texts, PACKED) == SMALLEST and seen == [SMALLEST]


def test_what_was_found_is_kept_for_the_run(
    gradients: PerSampleGradients, texts: Encoded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a resumed run and every process of it, however fast the machine is then."""
    (tmp_path / COMPUTE).write_text(json.dumps({"cpu": {"attention": "eager"}}))
    monkeypatch.setattr(timing, "record_seconds", slower_from(1024, []))
    assert tokens_of_run(-1, gradients, texts, PACKED, tmp_path) == 1024
    monkeypatch.setattr(timing, "record_seconds", slower_from(4096, []))
    assert tokens_of_run(-1, gradients, texts, PACKED, tmp_path) == 1024
    assert tokens_of_run(300, gradients, texts, PACKED, tmp_path) == 300  # as it was asked for
    kept = json.loads((tmp_path / COMPUTE).read_bytes())
    assert kept == {"cpu": {"attention": "eager", "micro_batch_tokens": 1024}}
    (tmp_path / COMPUTE).write_text(json.dumps({"cpu": {"micro_batch_tokens": "many"}}))
    with pytest.raises(BadInput, match="micro_batch_tokens: found 'many', expected a whole number"):
        tokens_of_run(-1, gradients, texts, PACKED, tmp_path)


@pytest.mark.parametrize("packed", [True, False])
def test_the_step_that_is_timed_is_the_step_that_is_made(
    gradients: PerSampleGradients, texts: Encoded, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packed where the run packs; as many units as a draw is expected to have."""
    made: list[tuple[int, bool]] = []
    true_sum = gradients.clipped_sum

    def noted(data: object, units: object, drawn: object, *rest: object) -> object:
        made.append((len(drawn), bool(rest[-1])))  # type: ignore[arg-type]
        return true_sum(data, units, drawn, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(gradients, "clipped_sum", noted)
    steps = Steps(drawn=13.0, packed=packed, private=True)
    assert record_seconds(gradients, texts, steps, 256) > 0
    assert set(made) == {(13, packed)}
    made.clear()
    plain = Steps(drawn=13.0, packed=True, private=False)
    assert record_seconds(gradients, texts, plain, 256) > 0 and not made
