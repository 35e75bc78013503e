"""Each fault of a base is seen on public text: one check a fault, each seen red here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fedlora.common.config.schema import LoraConfig, ModelConfig
from fedlora.common.errors import BadInput
from fedlora.common.model import network
from fedlora.common.model.inputs import Inputs, TextInputs
from fedlora.common.model.network import build_model
from fedlora.common.model.probe import LONGEST, SENTENCES, Forward, probe
from fedlora.common.model.tokenizer import load_tokenizer
from fedlora.common.tasks.causal_lm import CausalLanguageModel
from fedlora.common.tasks.classification import SequenceClassification
from fedlora.common.tasks.task import Task

Answer = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
CPU = torch.device("cpu")
TASKS: list[Task] = [SequenceClassification(("a", "b")), CausalLanguageModel()]


@dataclass
class Model:
    """A network of one's own: `answer` gives a number to each word."""

    tokenizer: Any
    answer: Answer
    task: Task = TASKS[0]
    longest: int = 40
    network: nn.Module = field(default_factory=nn.Module)
    device: torch.device = CPU
    pad: int = 0

    def __post_init__(self) -> None:
        self.inputs: Inputs = TextInputs(self.tokenizer, len(self.tokenizer))

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        words = self.answer(ids, mask)
        if self.task.name == "causal-lm":
            return words[:, :, None] * torch.ones(3)
        mean = (words * mask).sum(dim=1) / mask.sum(dim=1)
        return torch.stack([mean, -mean], dim=1)

    def probed(self) -> float:
        return probe(self, self.forward)


def good(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return ids.float().cos() * mask


def not_finite(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return good(ids, mask) / (ids.shape[0] - len(SENTENCES))


def random(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return nn.functional.dropout(good(ids, mask), 0.1)


def reads_padding(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return good(ids, mask) + 0.1 * (mask == 0).sum(dim=1, keepdim=True)


def reads_neighbours(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return good(ids, mask) + 0.1 * ids.shape[0]


def too_short(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return good(ids, mask) + torch.ones(39)[torch.arange(ids.shape[1])]


def overflows(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return good(ids, mask) * (float("nan") if ids.shape[1] == 40 else 1.0)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: str(task.name))
@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (good, ""),
        (not_finite, "values that are not finite on public text"),
        (random, "two passes over one batch that differ"),
        (reads_padding, "with padding or with other texts"),
        (reads_neighbours, "with padding or with other texts"),
        (too_short, "max_length = 40: found no way to read a text of 40 tokens"),
        (overflows, "max_length = 40: found values that are not finite"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_each_fault_is_seen(tiny_bert: Path, task: Task, answer: Answer, said: str) -> None:
    model = Model(load_tokenizer(tiny_bert), answer, task)
    if not said:
        assert model.probed() > 0
        return
    with pytest.raises(BadInput, match=said):
        model.probed()


def test_a_text_as_long_as_records_may_be_is_read(tiny_bert: Path) -> None:
    lengths: set[int] = set()

    def watch(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        lengths.add(int(mask.sum(dim=1).max()))
        return good(ids, mask)

    for longest in (8, 40, LONGEST, LONGEST + 500):
        lengths.clear()
        Model(load_tokenizer(tiny_bert), watch, longest=longest).probed()
        assert max(lengths) == min(longest, LONGEST)


def test_a_position_that_an_embedding_has_not_is_found_before_the_kernel_is(
    tiny_bert: Path,
) -> None:
    """On a GPU the kernel's own assertion would end the process's use of it."""
    asked: list[int] = []

    class Table(nn.Embedding):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            asked.append(int(input.max()))
            rows: torch.Tensor = super().forward(input)
            return rows

    table = Table(30, 1)

    def places(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        shifted: torch.Tensor = good(ids, mask) + table(torch.arange(ids.shape[1]))[:, 0]
        return shifted

    model = Model(load_tokenizer(tiny_bert), places, network=table)
    with pytest.raises(BadInput, match="row 39 of an embedding of 30"):
        model.probed()
    assert max(asked) < 30


@pytest.mark.parametrize("first", [0, 2], ids=["from-0", "from-2"])
def test_positions_are_counted_beyond_the_text_that_is_tried(tiny_bert: Path, first: int) -> None:
    """A record longer than they reach would fail the attempt, which tells that there is one."""
    longest = LONGEST + 500
    table = nn.Embedding(longest, 1)  # RoBERTa's begin at 2, and its tables say 4098 for 4096

    def places(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = good(ids, mask) + table(first + torch.arange(ids.shape[1]))[:, 0]
        return found

    model = Model(load_tokenizer(tiny_bert), places, longest=longest, network=table)
    if not first:
        assert model.probed() > 0
        return
    with pytest.raises(BadInput, match=f"an embedding of {longest} positions.* row {longest + 1},"):
        model.probed()


@pytest.mark.parametrize("pooling", ["mean", "default"])
def test_a_network_is_probed_as_it_is_built(
    tiny_bert: Path, pooling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under values of our own, which are gone afterwards: an adapter of zeros hides its layers."""
    seen: list[bool] = []
    real: Callable[..., float] = network.__dict__["probe"]

    def watch(model: network.AdapterModel, forward: Forward) -> float:
        seen.append(any(p.any() for n, p in model.parameters.items() if ".lora_B." in n))
        return real(model, forward)

    monkeypatch.setattr(network, "probe", watch)
    settings = ModelConfig(base=str(tiny_bert), pooling=pooling)
    model = build_model(settings, LoraConfig(rank=2), SequenceClassification(("a", "b")), 1)
    assert seen == [True] and model.probe_seconds > 0
    assert not any(p.any() for n, p in model.parameters.items() if ".lora_B." in n)
