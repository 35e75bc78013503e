"""A central PEFT loop without privacy: what a federation is held to.

Written as its user would: torch, transformers and PEFT alone, all records on one machine, LoRA on
queries and values beside a classifier of its own, AdamW, warm-up and a linear decay.

    python simulations/benchmarks/central.py --train FILE --test FILE [--text COLUMN [COLUMN]]
        [--label COLUMN] [--json OUT]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from torch.nn import functional
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers import get_linear_schedule_with_warmup as warm_and_decay

from fedlora.common.data.records import Columns, Records, read_label_set, read_records
from fedlora.common.errors import BadInput
from fedlora.common.model.base import resolve_base
from fedlora.common.tasks.texts import PAIR


def main() -> None:
    """Train and print the accuracy on the test file after each epoch."""
    wanted = _arguments().parse_args()
    torch.manual_seed(wanted.seed)
    names = tuple(read_label_set(wanted.test, wanted.label))
    columns = Columns(text=wanted.text[0], second="".join(wanted.text[1:]), label=wanted.label)
    train, test = (read_records(path, columns, names) for path in (wanted.train, wanted.test))
    began, rates = time.monotonic(), []
    for accuracy in _epochs(wanted, len(names), train, test):
        rates.append(accuracy)
        print(f"epoch {len(rates)}: accuracy {accuracy:.4f}", flush=True)
    if wanted.json is not None:
        found = {"accuracy": rates, "seconds": time.monotonic() - began, "records": len(train)}
        wanted.json.write_text(json.dumps({**found, "arguments": vars(wanted)}, default=str))


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--text", nargs="+", default=["text"], help="a text, or the two of a pair")
    parser.add_argument("--label", default="label")
    parser.add_argument("--base", default="minilm")
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--bf16", action="store_true", help="multiply in bfloat16 (autocast)")
    parser.add_argument("--json", type=Path, help="write what was found to this file")
    return parser


def _epochs(wanted: Any, classes: int, train: Records, test: Records) -> Iterator[float]:
    folder = resolve_base(wanted.base)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=classes)
    lora = peft.LoraConfig(
        task_type=peft.TaskType.SEQ_CLS,
        r=wanted.rank,
        lora_alpha=2 * wanted.rank,
        target_modules=["query", "value"],
    )
    model = peft.get_peft_model(base, lora)
    optimizer = torch.optim.AdamW(model.parameters(), lr=wanted.learning_rate)
    steps = wanted.epochs * -(-len(train) // wanted.batch)
    schedule = warm_and_decay(optimizer, steps // 10, steps)  # type: ignore[no-untyped-call]
    for _ in range(wanted.epochs):
        model.train()
        for rows in _shuffled(len(train), wanted.batch):
            inputs, labels = _batch(tokenizer, train, rows, wanted.max_length)
            with torch.autocast("cpu", torch.bfloat16, enabled=wanted.bf16):
                logits = model(**inputs).logits
            loss = functional.cross_entropy(logits.float(), labels)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        yield _accuracy(model, tokenizer, test, wanted.max_length)


def _shuffled(records: int, batch: int) -> Iterator[list[int]]:
    order = torch.randperm(records).tolist()
    for start in range(0, records, batch):
        yield order[start : start + batch]


def _batch(
    tokenizer: Any, records: Records, rows: list[int], length: int
) -> tuple[Any, torch.Tensor]:
    if records.labels is None:
        raise BadInput(f"{records.where}: found no labels, expected a column of them")
    sides = (records.texts, records.parts.get(PAIR))
    texts = [[side[row] for row in rows] for side in sides if side is not None]
    inputs = tokenizer(
        *texts, padding=True, truncation=True, max_length=length, return_tensors="pt"
    )
    return inputs, torch.from_numpy(records.labels[rows].astype(np.int64))


@torch.no_grad()
def _accuracy(model: Any, tokenizer: Any, test: Records, length: int) -> float:
    model.eval()
    right = 0
    for start in range(0, len(test), 128):
        rows = list(range(start, min(start + 128, len(test))))
        inputs, labels = _batch(tokenizer, test, rows, length)
        right += int((model(**inputs).logits.argmax(dim=1) == labels).sum())
    return right / len(test)


if __name__ == "__main__":
    main()
