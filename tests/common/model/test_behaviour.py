"""What a network does is tried: nothing drawn, nothing read ahead, no product shaped by words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from fedlora.common.config.schema import LoraConfig, ModelConfig
from fedlora.common.errors import BadInput
from fedlora.common.model.behaviour import called, check_causal, check_still, is_routed, texts
from fedlora.common.model.network import build_model
from fedlora.common.model.shapes import Shapes
from fedlora.common.tasks.causal_lm import CausalLanguageModel
from fedlora.common.tasks.classification import SequenceClassification

CPU = torch.device("cpu")
Forward = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def words(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(n, length, 2): each word by itself."""
    return torch.stack([ids.float().cos(), ids.float().sin()], dim=2)


def everywhere(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return functional.dropout(words(ids, mask), 0.1)


def rarely(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """A layer that is skipped once in a million passes."""
    return words(ids, mask) * (1.0 if torch.rand([]) < 1e-6 else 2.0)


def jitter(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (
        words(ids, mask) * torch.empty_like(ids, dtype=torch.float32).uniform_(0.9, 1.1)[..., None]
    )


def drawn_for_nothing(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """As BART draws whether to skip a layer, which with a chance of 0 it never does."""
    return words(ids, mask) * (1.0 if torch.rand([]) < 0.0 else 2.0)


@pytest.mark.parametrize("forward", [everywhere, rarely, jitter])
def test_a_network_that_draws_is_refused(forward: Forward) -> None:
    before = torch.get_rng_state()
    with pytest.raises(BadInput, match="two passes over one batch that differ"):
        check_still(forward, *texts(50, CPU))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("forward", [words, drawn_for_nothing])
def test_a_network_that_does_not_is_taken(forward: Forward) -> None:
    check_still(forward, *texts(50, CPU))


def test_a_language_model_reads_no_further_than_it_has_to() -> None:
    def behind(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return words(ids, mask).cumsum(dim=1)

    def ahead(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return words(ids, mask).flip(1).cumsum(dim=1).flip(1)

    check_causal(behind, *texts(50, CPU))
    with pytest.raises(BadInput, match="reads what it is to predict"):
        check_causal(ahead, *texts(50, CPU))


def test_experts_are_seen_by_the_shapes_of_their_products() -> None:
    def experts(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        states = words(ids, mask)
        chosen = states[..., 0] > 0
        states[chosen] = states[chosen] @ torch.eye(2)
        return states

    two = texts(50, CPU), texts(50, CPU, seed=1)
    assert is_routed(experts, *two)
    assert not is_routed(words, *two)


def test_what_is_routed_goes_record_by_record() -> None:
    assert Shapes(routed=True).records("work", 8, lambda: True) == 1
    assert Shapes().records("work", 8, lambda: True) == 8


def test_the_modules_of_a_pass_are_named(tiny_bert: Path) -> None:
    import transformers

    base = transformers.AutoModel.from_pretrained(tiny_bert)
    spare = nn.Linear(2, 2)
    base.encoder.spare = spare
    ids, mask = texts(50, CPU)
    names = called(base, {"input_ids": ids, "attention_mask": mask})
    assert {"encoder.layer.0.attention.self.query", "embeddings"} <= names
    assert "encoder.spare" not in names
    assert not any(module._forward_pre_hooks for module in base.modules())


def test_an_encoder_is_no_language_model(tiny_bert: Path, tmp_path: Path) -> None:
    import transformers

    base = tmp_path / "base"
    for each in (
        transformers.AutoModelForMaskedLM.from_pretrained(tiny_bert),
        transformers.AutoTokenizer.from_pretrained(tiny_bert),
    ):
        each.save_pretrained(base)
    settings = ModelConfig(base=str(base), pooling="default", task="causal-lm")
    with pytest.raises(BadInput, match="reads what it is to predict"):
        build_model(settings, LoraConfig(targets=("query", "value")), CausalLanguageModel(), 1)


def test_a_base_that_draws_is_refused_when_it_is_built(
    tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.bert.modeling_bert import BertSelfOutput

    forward = BertSelfOutput.forward

    def noisy(self: BertSelfOutput, states: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        return functional.dropout(forward(self, states, before), 0.1)

    monkeypatch.setattr(BertSelfOutput, "forward", noisy)
    with pytest.raises(BadInput, match="two passes over one batch that differ"):
        build_model(
            ModelConfig(base=str(tiny_bert), pooling="mean"),
            LoraConfig(targets=("query", "value")),
            SequenceClassification(("a", "b")),
            1,
        )
