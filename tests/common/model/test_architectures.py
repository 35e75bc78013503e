"""The matrix of bases: each family trains right, by the whole way from its files to PEFT's, or is
refused in one line.

`make models` tries all of them; `make test` those of `FAST`, which between them have each way of
attention, each layout of a batch, each kind of dropout and each reason to be refused.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedlora.common.config.schema import LoraConfig, ModelConfig
from fedlora.common.errors import BadInput
from fedlora.common.model.behaviour import check_still
from fedlora.common.model.network import AdapterModel, build_model
from fedlora.common.model.pooling import PooledClassifier
from fedlora.common.tasks.causal_lm import CausalLanguageModel
from fedlora.common.tasks.classification import SequenceClassification
from fedlora.simulations.benchmarks.families import FAMILIES
from fedlora.simulations.benchmarks.models import (
    CLASSIFIER,
    LABELS,
    LANGUAGE,
    OWN,
    Use,
    examine,
    uses,
)
from fedlora.simulations.benchmarks.random_base import Family
from tests.oracles import clipped_sum_by_ones

FAST = {
    ("BERT", CLASSIFIER),  # fused attention
    ("DeBERTa-v3", CLASSIFIER),  # eager; layers that see positions as well as records
    ("Longformer", CLASSIFIER),  # words before records
    ("XLNet", CLASSIFIER),  # no linear layer in its attention
    ("XLNet", OWN),  # a head that nothing trains
    ("GPT-2", OWN),  # Conv1D, fused qkv, no word for padding
    ("OPT", LANGUAGE),  # numeric dropout, skipped layers, words of all records in one row
    ("Mixtral", LANGUAGE),  # experts, noise on the router
    ("Mamba", LANGUAGE),  # no attention
    ("T5", CLASSIFIER),  # an encoder-decoder
    ("ModernBERT", OWN),  # its head has a LayerNorm without a bias
}
REFUSED = {
    (
        "XLNet",
        OWN,
    ): "with padding or with other texts",  # it reads a text's last place, padded or not
    ("VaultGemma", OWN): "found vaultgemma, which has no classifier of its own",
    ("Granite", OWN): "found granite, which has no classifier of its own",
    ("XGLM", OWN): "found xglm, which has no classifier of its own",
    ("Mamba", OWN): "found mamba, which has no classifier of its own",
    ("T5", CLASSIFIER): "found an encoder-decoder",
    ("T5", OWN): "found an encoder-decoder",
    ("BART", CLASSIFIER): "found an encoder-decoder",
    ("BART", OWN): "found an encoder-decoder",
    ("T5's encoder", OWN): "found t5, which has no classifier of its own",
}
# A layer that is used on positions too, or products that words of several records share.
NO_BIAS = ("ModernBERT", OWN)  # Opacus' rule for LayerNorm asks for one
ONE_BY_ONE = {"DeBERTa-v3", "Mixtral", "Qwen2-MoE", "gpt-oss"}


def matrix(refused: bool = True) -> list[Any]:
    """Each family in each use of it; `refused`: those too that can't be."""
    return [
        pytest.param(
            family,
            use,
            marks=() if (family.name, use) in FAST else (pytest.mark.models,),
            id=f"{family.name}-{use.name}",
        )
        for family in FAMILIES
        for use in uses(family)
        if refused or (family.name, use) not in REFUSED
    ]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Families by name, as far as they were asked for."""
    return {"": tmp_path_factory.mktemp("families")}


def base_of(family: Family, bases: dict[str, Path]) -> Path:
    if family.name not in bases:
        bases[family.name] = family.save(bases[""] / family.name)
    return bases[family.name]


def built(base: Path, use: Use) -> AdapterModel:
    causal = use.task == "causal-lm"
    return build_model(
        ModelConfig(base=str(base), task=use.task, pooling=use.pooling, max_length=24),
        LoraConfig(rank=2, targets=use.targets),
        CausalLanguageModel() if causal else SequenceClassification(LABELS),
        5,
    )


@pytest.mark.parametrize(("family", "use"), matrix())
def test_a_family_trains_right_or_is_refused(
    family: Family, use: Use, bases: dict[str, Path], tmp_path: Path
) -> None:
    base = base_of(family, bases)
    if (family.name, use) in REFUSED:
        with pytest.raises(BadInput, match=REFUSED[family.name, use]) as caught:
            built(base, use)
        assert len(str(caught.value).splitlines()) == 1
        return
    found = examine(base, use, tmp_path / "auto", clipped_sum_by_ones)
    assert not found.faults
    assert found.one_by_one == (family.name in ONE_BY_ONE or (family.name, use) == NO_BIAS)
    linear = examine(
        base, replace(use, targets=("all-linear",)), tmp_path / "linear", clipped_sum_by_ones
    )
    assert not linear.faults


@pytest.mark.parametrize(("family", "use"), matrix(refused=False))
def test_targets_by_expression_and_by_name_are_those_of_auto(
    family: Family, use: Use, bases: dict[str, Path]
) -> None:
    base = base_of(family, bases)
    by_rule = built(base, use)
    names = by_rule.lora.targets
    by_name = built(base, replace(use, targets=names))
    expression = "|".join(rf"(.*\.)?{re.escape(name)}" for name in names)
    by_expression = built(base, replace(use, targets=(f"re:{expression}",)))
    assert by_name.lora.targets == by_expression.lora.targets == names
    assert by_rule.spec == by_name.spec == by_expression.spec


@pytest.mark.parametrize(("family", "use"), matrix(refused=False))
def test_nothing_is_drawn_even_in_training_mode(
    family: Family, use: Use, bases: dict[str, Path]
) -> None:
    """Which no step uses: but what is off is off, and not only asleep."""
    model = built(base_of(family, bases), use)
    assert not any(module.training for module in model.network.modules())
    network = model.network.train()
    forward = network.pooled if isinstance(network, PooledClassifier) else network
    with model.probed():
        check_still(forward, *model.inputs.tried(torch.device("cpu")))
