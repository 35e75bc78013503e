"""One training step on random bases of real sizes: speed, memory, and what the machine could do.

    fixed    this project's private step, batches of fixed shapes, as institutions have them
    packed   the same, batches packed by length, as simulations have them
    plain    the same without clip and noise
    recipe   what people write today without privacy: transformers, PEFT and torch, texts of like
             length together, padded to the batch's longest, the same precision

    python simulations/benchmarks/large_step.py SHAPE [--records 16] [--repeats 5] [--json FILE]
        [--dtype bfloat16|nf4|int8|float32] [--checkpointing] [--ways packed,plain]

The same records for all; repetitions are interleaved in one process, and ratios are of medians.
Peaks are of a process for each way: on a GPU what torch took of it, else the whole process. The
share of the machine is of its own product in the step's shape, for the tokens that are no padding.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from fedlora.client.training.sampling import micro_batches
from fedlora.client.training.step import ClipGroups, PerSampleGradients, private_mean
from fedlora.common.config.schema import LoraConfig, ModelConfig
from fedlora.common.data.records import unit_groups
from fedlora.common.model.compute import choose_compute
from fedlora.common.model.features import length_batches
from fedlora.common.model.network import AdapterModel, build_model
from fedlora.common.privacy.randomness import OsRandom
from fedlora.common.tasks.batch import IGNORED, Encoded, Tokenised, rows_of
from fedlora.common.tasks.causal_lm import LEARNT, CausalLanguageModel
from fedlora.common.tasks.classification import SequenceClassification
from fedlora.server.runs.summary import peak_rss_bytes
from fedlora.simulations.benchmarks.fresh_process import in_a_fresh_process
from fedlora.simulations.benchmarks.products import matmul_rates

WORDS = 200  # that records are drawn from


@dataclass(frozen=True)
class Shape:
    """A base of random weights, and the records that a step has."""

    config: str  # a class of transformers
    sizes: dict[str, int]
    rank: int
    shortest: int  # tokens of a record
    longest: int
    micro_batch: int  # tokens, on a GPU; a CPU takes a sixteenth
    typical: int = 0  # tokens, of lengths that spread as AG News' do; 0: all lengths alike


LLAMA = {"max_position_embeddings": 2048, "num_key_value_heads": 8}
SHAPES = {
    "minilm": Shape(
        "BertConfig",
        {"vocab_size": 30_522, "hidden_size": 384, "intermediate_size": 1536}
        | {"num_hidden_layers": 6, "num_attention_heads": 12},
        *(8, 16, 128, 65_536, 53),
    ),
    "bert-base": Shape("BertConfig", {"vocab_size": 30_522}, 8, 16, 128, 65_536, 53),
    "llama-1b": Shape(
        "LlamaConfig",
        LLAMA
        | {"vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192}
        | {"num_hidden_layers": 16, "num_attention_heads": 32},
        *(16, 512, 512, 16_384),
    ),
    "llama-8b": Shape(
        "LlamaConfig",
        LLAMA
        | {"vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336}
        | {"num_hidden_layers": 32, "num_attention_heads": 32},
        *(16, 1024, 1024, 1024),
    ),
    "tiny": Shape(
        "LlamaConfig",
        {"vocab_size": 1000, "hidden_size": 64, "intermediate_size": 128}
        | {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128},
        *(4, 24, 64, 4096),
    ),
}
Step = Callable[[], None]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def main() -> None:
    """Time the ways alternately, measure each one's memory by itself, and print both."""
    asked = _arguments()
    torch.set_num_threads(asked.threads or torch.get_num_threads())
    shape, ways = SHAPES[asked.shape], asked.ways.split(",")
    if asked.base:
        _once(asked.base, shape, asked, ways[0])
        return
    with tempfile.TemporaryDirectory() as folder:
        base, words = write_base(Path(folder), shape), ["--records", asked.records]
        words += ["--dtype", asked.dtype, *(["--checkpointing"] if asked.checkpointing else [])]
        peaks = {
            way: in_a_fresh_process(__file__, asked.shape, *words, "--ways", way, "--base", base)
            for way in ways
        }
        found = {"shape": asked.shape, **_timed(base, shape, asked, ways), "memory": peaks}
    print(json.dumps(found, indent=2))
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def write_base(folder: Path, shape: Shape) -> Path:
    """A base of that shape as people publish one, in bfloat16; drawn where it is fast."""
    torch.manual_seed(0)
    config = getattr(transformers, shape.config)(**shape.sizes)
    llama = shape.config == "LlamaConfig"
    kind: Any = transformers.AutoModelForCausalLM if llama else transformers.AutoModel
    with torch.device(DEVICE):
        base = kind.from_config(config, dtype=torch.bfloat16)
    base.save_pretrained(folder)
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    count = shape.sizes["vocab_size"] - len(special)
    names = [*special.values(), *(f"w{number}" for number in range(count))]
    words = Tokenizer(models.WordLevel({w: n for n, w in enumerate(names)}, special["unk_token"]))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast: Any = transformers.PreTrainedTokenizerFast
    fast(tokenizer_object=words, **special).save_pretrained(folder)
    return folder


def records_of(shape: Shape, count: int) -> Encoded:
    """Records of nobody's: of a decoder every second half is learnt, else one of four labels."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(shape.shortest, shape.longest + 1, count)
    if shape.typical:
        spread = rng.normal(shape.typical, 0.3 * shape.typical, count).round().astype(np.int64)
        lengths = spread.clip(shape.shortest, shape.longest)
    rows = [rng.integers(4, WORDS, length).tolist() for length in lengths]
    if shape.config != "LlamaConfig":
        return rows_of(rows, rng.integers(0, 4, count), {})
    halves = [np.arange(length) >= length // 2 for length in lengths]
    targets = np.where(np.concatenate(halves), LEARNT, IGNORED)
    return rows_of(rows, targets, {}, by_token=True)


def built(base: Path, shape: Shape, asked: argparse.Namespace, data: Encoded) -> AdapterModel:
    """The network as a run builds it."""
    llama = shape.config == "LlamaConfig"
    task: Any = CausalLanguageModel() if llama else SequenceClassification(("0", "1", "2", "3"))
    pooling = "default" if llama else "mean"
    settings = ModelConfig(str(base), "", task.name, shape.longest, pooling, dtype=asked.dtype)
    lora = LoraConfig(rank=shape.rank, targets=("all-linear",))
    model = build_model(settings, lora, task, 1, DEVICE)
    if asked.checkpointing:
        model.recompute()
    choose_compute(model, data, "auto", "auto")
    return model


def _steps(
    base: Path, shape: Shape, asked: argparse.Namespace, ways: list[str]
) -> tuple[dict[str, Step], AdapterModel | None, Encoded]:
    """A pass over all records, by way; and the network of ours, where one of them has it."""
    data, tokens = records_of(shape, asked.records), shape.micro_batch
    tokens = tokens if DEVICE.type == "cuda" else max(shape.longest, tokens // 16)
    units, every = unit_groups(None, len(data)), np.arange(len(data), dtype=np.int64)
    model = built(base, shape, asked, data) if set(ways) - {"recipe"} else None
    steps: dict[str, Step] = {}
    if model is not None:
        gradients, groups = PerSampleGradients(model), ClipGroups.flat(model.spec, 1.0)

        def private(packed: bool) -> None:
            total = gradients.clipped_sum(data, units, every, groups, tokens, packed)
            private_mean(total, groups, 1.0, float(len(data)), OsRandom())

        def plain() -> None:
            gradients.plain_sum(data, micro_batches(units, every, data.lengths, tokens))

        steps = {"fixed": lambda: private(False), "packed": lambda: private(True), "plain": plain}
    if "recipe" in ways:
        steps["recipe"] = _recipe(base, shape, asked, data, tokens)
    return {way: steps[way] for way in ways}, model, data


def _recipe(
    base: Path, shape: Shape, asked: argparse.Namespace, data: Encoded, tokens: int
) -> Step:
    """Padded to the longest of a batch of like lengths, in the best of the machine's precisions."""
    llama = shape.config == "LlamaConfig"
    kind: Any = (
        transformers.AutoModelForCausalLM
        if llama
        else transformers.AutoModelForSequenceClassification
    )
    dtype = torch.float32 if asked.dtype == "float32" else torch.bfloat16
    more = {} if llama else {"num_labels": 4}
    network: Any = kind.from_pretrained(base, dtype=dtype, **more).to(DEVICE)
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM" if llama else "SEQ_CLS", r=shape.rank, target_modules="all-linear"
    )
    network = peft.get_peft_model(network, settings, autocast_adapter_dtype=True)
    if asked.checkpointing:
        network.gradient_checkpointing_enable()
        network.enable_input_require_grads()
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-4)
    batches = [
        data.batch(rows.astype(np.int64), 0, DEVICE)
        for rows in length_batches(data.lengths, tokens)
    ]
    labels = [
        b.ids.masked_fill(b.targets == IGNORED, IGNORED) if llama else b.targets for b in batches
    ]

    def step() -> None:
        optimizer.zero_grad()
        for batch, aims in zip(batches, labels, strict=True):
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
                found = network(input_ids=batch.ids, attention_mask=batch.mask, labels=aims)
            found.loss.backward()
        optimizer.step()

    return step


def _once(base: Path, shape: Shape, asked: argparse.Namespace, way: str) -> None:
    """Two steps of one way, for their memory."""
    steps, _, _ = _steps(base, shape, asked, [way])
    for _ in range(2):
        steps[way]()
    on_gpu = DEVICE.type == "cuda"
    print(json.dumps(torch.cuda.max_memory_allocated() if on_gpu else peak_rss_bytes()))


def _timed(base: Path, shape: Shape, asked: argparse.Namespace, ways: list[str]) -> dict[str, Any]:
    steps, model, data = _steps(base, shape, asked, ways)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for repeat in range(asked.repeats + 1):
        for way, step in steps.items():
            started = time.perf_counter()
            step()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            if repeat:  # the first one warms up
                seconds[way].append(time.perf_counter() - started)
    median = {way: statistics.median(times) for way, times in seconds.items()}
    tokens, rates = int(data.lengths.sum()), _rates(shape)
    flop = 0.0 if model is None else _flop(model, data)
    return {
        "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "precision": None if model is None else str(model.precision),
        "attention": None if model is None else model.attention,
        "dtype": asked.dtype,
        "checkpointing": asked.checkpointing,
        "records": len(data),
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": {way: tokens / time_ for way, time_ in median.items()},
        "records_per_second": {way: len(data) / time_ for way, time_ in median.items()},
        "ratios": {
            f"{way}/{to}": median[to] / median[way]
            for to in ("plain", "recipe")
            for way in ("fixed", "packed")
            if way in median and to in median
        },
        "matmul_flop_per_second": rates,
        "share_of_matmul": {
            way: flop / time_ / max(rates.values()) for way, time_ in median.items()
        },
    }


def _flop(model: AdapterModel, data: Encoded) -> float:
    """There and back through frozen matrices, 2 + 2 for each weight and token that reads it."""
    inside = sum(
        p.numel()
        for n, p in model.network.named_parameters()
        if (".layer." in n or ".layers." in n) and "lora_" not in n and p.ndim == 2
    )
    found = 4.0 * inside * float(data.lengths.sum())
    if isinstance(data, Tokenised) and data.by_token:
        backbone: Any = model.network.backbone
        found += (
            4.0
            * backbone.get_output_embeddings().weight.numel()
            * int((data.targets != IGNORED).sum())
        )
    return found


def _rates(shape: Shape) -> dict[str, float]:
    """Of the machine's own product in the step's shape."""
    width = shape.sizes.get("hidden_size", 768)
    return matmul_rates(DEVICE, 16_384 if DEVICE.type == "cuda" else 1024, width, 4 * width)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("shape", choices=list(SHAPES))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--records", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--ways", default="fixed,packed,plain,recipe")
    parser.add_argument("--base", type=Path, help="of a process of its own: memory alone")
    return parser.parse_args()


if __name__ == "__main__":
    main()
