"""A coordinator whose adapter magnifies how a base's activations round: by place, it would be seen.

Kernels of SiLU, GELU and others cut a tensor among threads and take what is left over of a piece
through code that rounds otherwise. Which record stands there depends on the draw; a try with one
record of nobody's missed it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from fedlora.client.training import step
from fedlora.client.training.company import Company
from fedlora.client.training.sampling import MicroBatch
from fedlora.client.training.step import PerSampleGradients
from fedlora.common.config.schema import LoraConfig, ModelConfig
from fedlora.common.model.behaviour import mixes_records
from fedlora.common.model.elementwise import APART, Watch, by_record
from fedlora.common.model.network import build_model
from fedlora.common.model.shapes import Shape
from fedlora.common.model.state import AdapterState
from fedlora.common.tasks.causal_lm import CausalLanguageModel
from fedlora.common.tasks.classification import SequenceClassification
from fedlora.simulations.benchmarks.families import FAMILIES
from fedlora.simulations.benchmarks.random_base import Family

Function = Callable[[torch.Tensor], torch.Tensor]
CPU = torch.device("cpu")
# whose arguments are more than a tensor, or must be in a range
OWN: dict[str, Function] = {
    "pow": lambda x: torch.pow(x * x + 0.1, 2.5),
    "rms_norm": lambda x: functional.rms_norm(x, x.shape[-1:]),
    "gelu": lambda x: functional.gelu(x, approximate="tanh"),
    "log": lambda x: torch.log(x * x + 0.1),
    "log1p": lambda x: torch.log1p(x * x),
    "log2": lambda x: torch.log2(x * x + 0.1),
    "rsqrt": lambda x: torch.rsqrt(x * x + 0.1),
}
OTHERS: dict[str, Function] = {
    "add with a factor": lambda x: torch.add(x, x * x, alpha=1.3),
    "addcmul": lambda x: torch.addcmul(x, x, x, value=0.7),
    "lerp": lambda x: torch.lerp(x, x * x, 0.3),
    "glu": lambda x: functional.glu(x, -1),
    "turned": lambda x: functional.silu(x.transpose(1, 2)).transpose(1, 2),
    "huber": lambda x: functional.huber_loss(x, x * x, reduction="none"),
    "yes or no": lambda x: functional.binary_cross_entropy_with_logits(
        x, torch.full_like(x, 0.3), reduction="none"
    ),
    "exact": lambda x: functional.relu(x) / (x.abs() + 1) - x.clamp(-1, 1) * (x * x).sqrt(),
    "rows": lambda x: functional.softmax(functional.layer_norm(x, x.shape[-1:]), -1),
}


def named(name: str) -> Function:
    found = OWN.get(name) or getattr(torch, name, None) or getattr(functional, name)
    assert callable(found)
    return found


@pytest.fixture(params=[3, 8])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def differs(function: Function, records: int, tokens: int, dtype: torch.dtype) -> bool:
    """Whether one record's value or gradient is another in another place."""
    rng = np.random.default_rng(tokens)
    one = torch.tensor(rng.normal(0, 2, (1, tokens, 1000)), dtype=dtype)
    given = one.repeat(records, 1, 1).requires_grad_()
    found = function(given)
    towards = torch.tensor(rng.normal(0, 1, (1, *found.shape[1:])), dtype=dtype)
    (gradient,) = torch.autograd.grad(found, given, towards.expand_as(found).contiguous())
    return bool((found != found[:1]).any()) or bool((gradient != gradient[:1]).any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", sorted(APART - {"log_sigmoid"}))
def test_a_function_gives_the_same_bits_in_every_place(
    name: str, dtype: torch.dtype, threads: None
) -> None:
    function = named(name)
    for records, tokens in ((4, 24), (8, 40), (16, 8)):
        with Watch(records) as watch, by_record(records, CPU):
            assert not differs(function, records, tokens, dtype)
        assert not watch.beside


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [*sorted(APART - {"log_sigmoid"}), *OTHERS])
def test_what_differs_by_place_is_watched(name: str, dtype: torch.dtype, threads: None) -> None:
    """Whatever is not handed over by the record; and what is exact or goes by rows is not."""
    function = OTHERS.get(name) or named(name)
    for records, tokens in ((4, 24), (8, 40)):
        with Watch(records) as watch:
            found = differs(function, records, tokens, dtype)
        assert watch.beside == (name not in ("exact", "rows"))
        assert watch.beside or not found


def test_a_function_by_records_is_the_function() -> None:
    values = torch.tensor(np.random.default_rng(0).normal(0, 2, (8, 3, 10)))
    powers, together = torch.arange(1.0, 9.0), []
    for context in (nullcontext(), by_record(4, CPU)):
        with context:
            together.append(
                [
                    values.sigmoid(),
                    torch.pow(torch.tensor(2.0), powers),
                    torch.pow(values.abs()[:, 0, :8], powers),
                    functional.silu(values.clone(), inplace=True),
                    torch.tanh(values[:3]),
                    torch.exp(values.sum()),
                ]
            )
    for one, other in zip(*together, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_heads_product_does_not_tell_how_many_records_there_are(dtype: torch.dtype) -> None:
    """One row is no matrix, and two have a kernel of their own: other bits."""
    rng = np.random.default_rng(3)
    weight, bias = (torch.tensor(rng.normal(0, 1, n), dtype=dtype) for n in ((7, 384), (7,)))
    row = torch.tensor(rng.normal(0, 1, (1, 384)), dtype=dtype)

    found = set()
    for records in range(1, 17):
        rows = row.repeat(records, 1).requires_grad_()
        with by_record(records, CPU):
            scores = functional.linear(rows, weight, bias)
            (back,) = torch.autograd.grad(scores, rows, scores.detach())
        assert scores.shape == (records, 7) and back.shape == rows.shape
        found |= {each.double().numpy().tobytes() for each in (*scores.detach(), *back)}
    assert len(found) == 2, "scores, and the way back"


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> PerSampleGradients:
    """A Llama so wide inside that its activations are cut among threads."""
    sizes = {"hidden_size": 32, "intermediate_size": 1100, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    family = Family("wide", "LlamaConfig", "decoder", {**sizes, **heads})
    base = str(family.save(tmp_path_factory.mktemp("wide")))
    settings = ModelConfig(base, task="causal-lm", max_length=48)
    return PerSampleGradients(build_model(settings, LoraConfig(rank=2), CausalLanguageModel(), 5))


def different_places(gradients: PerSampleGradients, shape: Shape) -> int:
    """At how many of twenty adapters a record's gradient depends on its place."""
    model = gradients.model
    rng, places, found = np.random.default_rng(2), np.zeros(shape.records, dtype=np.int64), 0
    one = model.inputs.nobodys(model.task, np.array([shape.tokens - 1]), rng)
    batch = MicroBatch(places, np.arange(shape.records), False, (shape.records, shape.tokens))
    for _ in range(20):
        values = rng.normal(0, 0.5, model.spec.size).astype(np.float32)
        model.load(AdapterState(model.spec, values))
        found += any(bool((each != each[:1]).any()) for each in gradients._samples(one, batch))
    return found


def test_a_gradient_has_the_same_bits_in_every_place(
    wide: PerSampleGradients, threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = Shape(4, 40, False)
    if wide.company.records(shape) == shape.records:  # else this machine's products go by place
        assert different_places(wide, shape) == 0

    monkeypatch.setattr(step, "by_record", lambda records, device: nullcontext())
    again = Company(wide.model, wide._rows)
    assert again.records(shape) == 1


LLAMA4 = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 1001,
    "intermediate_size_mlp": 64,
    "num_local_experts": 2,
    "num_experts_per_tok": 2,
}


@pytest.mark.parametrize("experts", [2, 3, 4])
def test_records_that_go_through_all_experts_are_alone(tmp_path: Path, experts: int) -> None:
    """Dense experts get all records' words, one expert after the other: no row is a record's."""
    sizes = {**LLAMA4, "num_local_experts": experts}
    base = str(Family("experts", "Llama4TextConfig", "decoder", sizes).save(tmp_path))
    settings = ModelConfig(base, task="causal-lm", max_length=48)
    model = build_model(settings, LoraConfig(rank=2), CausalLanguageModel(), 5)
    assert model.shapes.mixed
    assert PerSampleGradients(model).company.records(Shape(4, 40, False)) == 1


def test_what_stands_elsewhere_than_in_its_records_rows_is_seen() -> None:
    """By turns, one expert after the other, or in a sum of all; alone in its rows it is not."""
    values = torch.tensor(np.random.default_rng(0).normal(0, 1, (3, 7, 4)))
    mask = torch.ones(3, 7)

    def flat(x: torch.Tensor) -> torch.Tensor:
        return functional.silu(x.flatten(0, 1))

    cases: list[tuple[Function, bool]] = [
        (functional.silu, False),
        (flat, False),
        (lambda x: flat(x.transpose(0, 1)), True),
        (lambda x: functional.silu(x.transpose(0, 1)), True),
        (lambda x: flat(torch.stack([x, x]).flatten(0, 1)), True),
        (lambda x: functional.silu(x[None]), True),
        (lambda x: torch.sigmoid(x.sum()), True),
        (lambda x: x.transpose(0, 1) * 2, False),
    ]
    for function, seen in cases:
        assert mixes_records(lambda ids, _, f=function: f(ids), values, mask) == seen  # type: ignore[misc]


def test_records_whose_words_go_by_turns_are_alone(tmp_path: Path) -> None:
    """There a row holds a word of each."""
    xlnet = next(family for family in FAMILIES if family.name == "XLNet")
    model = build_model(
        ModelConfig(str(xlnet.save(tmp_path)), max_length=24, pooling="mean"),
        LoraConfig(rank=2),
        SequenceClassification(("a", "b")),
        5,
    )
    assert model.shapes.mixed
    assert PerSampleGradients(model).company.records(Shape(4, 16, False)) == 1
