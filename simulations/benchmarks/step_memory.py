"""Peak memory of a private step on random bases, beside what `plan` says that it takes.

    python simulations/benchmarks/step_memory.py [--json FILE] [--only SHAPE WAY]

Each way in a process of its own: the base is written to disk, loaded, and one private step is made
on records of nobody's. Peaks are of the whole process, its libraries among them.

    whole       scores of all words at all places, matrices in float32: as it was before
    chunks      scores where a word is predicted
    bfloat16    the same, matrices stored as bfloat16
    again       the same, layers computed again on the way back
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers

from fedlora.client.training.memory import Memory, memory_of_step
from fedlora.client.training.step import ClipGroups, PerSampleGradients, private_mean
from fedlora.common.config.schema import LoraConfig, ModelConfig
from fedlora.common.data.records import unit_groups
from fedlora.common.model.network import AdapterModel, build_model
from fedlora.common.privacy.randomness import OsRandom
from fedlora.common.tasks.batch import IGNORED, Tokenised
from fedlora.common.tasks.causal_lm import LEARNT, CausalLanguageModel
from fedlora.server.runs.summary import peak_rss_bytes
from fedlora.simulations.benchmarks.fresh_process import in_a_fresh_process

RECORDS = 4
WAYS = ("whole", "chunks", "bfloat16", "again")


@dataclass(frozen=True)
class Shape:
    """A Llama of random weights, and the records that a step has."""

    layers: int
    width: int
    words: int
    tokens: int  # of a record
    micro_batch: int


SHAPES = {
    "vocabulary": Shape(layers=2, width=256, words=128_000, tokens=256, micro_batch=1024),
    "deep": Shape(layers=12, width=384, words=8_000, tokens=256, micro_batch=1024),
}


def main() -> None:
    """Measure every way of every shape, and print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", nargs=2, metavar=("SHAPE", "WAY"))
    parser.add_argument("--base", type=Path)
    asked = parser.parse_args()
    if asked.only:
        print(json.dumps(_measured(asked.base, SHAPES[asked.only[0]], asked.only[1])))
        return
    rows = []
    for name, shape in SHAPES.items():
        with tempfile.TemporaryDirectory() as folder:
            base = write_base(Path(folder), shape)
            for way in WAYS:
                found = in_a_fresh_process(__file__, "--only", name, way, "--base", base)
                rows.append({"shape": name, "way": way, **found})
                print(json.dumps(rows[-1]), flush=True)
    _print(rows)
    if asked.json:
        asked.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


def write_base(folder: Path, shape: Shape) -> Path:
    """A base of that shape as people publish one, in bfloat16."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=shape.words,
        hidden_size=shape.width,
        intermediate_size=4 * shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )
    base: Any = transformers.LlamaForCausalLM(config)
    base.to(torch.bfloat16).save_pretrained(folder)
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    names = [*special.values(), *(f"w{number}" for number in range(shape.words - len(special)))]
    words: Any = {name: number for number, name in enumerate(names)}
    tokenizer = Tokenizer(models.WordLevel(words, special["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast: Any = transformers.PreTrainedTokenizerFast
    fast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


def built(base: Path, shape: Shape, way: str) -> AdapterModel:
    """The model, in one of the `WAYS`."""
    dtype = "float32" if way in ("whole", "chunks") else "bfloat16"
    settings = ModelConfig(base=str(base), task="causal-lm", max_length=shape.tokens, dtype=dtype)
    lora = LoraConfig(rank=8, targets=("all-linear",))
    model = build_model(settings, lora, CausalLanguageModel(), 1)
    if way == "whole":
        model.next_words = None
    if way == "again":
        model.recompute()
    return model


def step(model: AdapterModel, shape: Shape) -> None:
    """One private step over `RECORDS` records of full length, half of each a response."""
    tokens = np.random.default_rng(0).integers(3, 200, RECORDS * shape.tokens).astype(np.int32)
    offsets = np.arange(RECORDS + 1, dtype=np.int64) * shape.tokens
    half = np.arange(shape.tokens) >= shape.tokens // 2
    targets = np.tile(np.where(half, LEARNT, IGNORED), RECORDS)
    data = Tokenised(tokens, offsets, targets, {}, by_token=True)
    gradients, groups = PerSampleGradients(model), ClipGroups.flat(model.spec, 1.0)
    every = np.arange(RECORDS, dtype=np.int64)
    units = unit_groups(None, RECORDS)
    total = gradients.clipped_sum(data, units, every, groups, shape.micro_batch, packed=True)
    private_mean(total, groups, 1.0, float(RECORDS), OsRandom())


def _measured(base: Path, shape: Shape, way: str) -> dict[str, Any]:
    model = built(base, shape, way)
    planned: Memory = memory_of_step(model, shape.micro_batch, shape.tokens, packed=True)
    started = time.perf_counter()
    step(model, shape)
    return {
        **vars(planned),
        "planned": planned.peak,
        "measured": peak_rss_bytes(),
        "seconds": time.perf_counter() - started,
    }


def _print(rows: list[dict[str, Any]]) -> None:
    names = ("weights", "held", "activations", "gradients", "scores", "planned", "measured")
    table = Table("shape", "way", *(f"{name} MB" for name in names), "of measured", "s", box=None)
    for row in rows:
        numbers = [f"{row[name] / 1e6:,.0f}" for name in names]
        ratio = f"{row['planned'] / row['measured']:.2f}"
        table.add_row(row["shape"], row["way"], *numbers, ratio, f"{row['seconds']:.1f}")
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
