"""A central PEFT loop without privacy: what a federation is held to.

Written as its user would: torch, transformers and PEFT alone, all records on one machine, LoRA on
queries and values beside a head of its own, AdamW, warm-up and a linear decay.

    python simulations/benchmarks/central.py --train FILE --test FILE [--task TASK]
        [--text COLUMN [COLUMN]] [--label COLUMN] [--records N] [--json OUT]

Where each word is tagged, `--text` is the column of words and `--label` that of their tags. Of
conversations (causal-lm), `--label` is the column of messages; the assistant's turns are learnt.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from scipy.stats import spearmanr
from sklearn.metrics import accuracy_score, f1_score
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)
from transformers import get_linear_schedule_with_warmup as warm_and_decay

from fedlora.common.data.data_file import columns_of
from fedlora.common.data.records import read_label_lists, read_label_set
from fedlora.common.data.tagged import read_tag_set
from fedlora.common.model.base import resolve_base
from fedlora.common.tasks.chat import Layout
from fedlora.common.tasks.token_classification import entities

IGNORED = -100  # the target of a token that begins no word: torch's default
Table = Mapping[str, Sequence[Any]]
Names = Sequence[str]


@dataclass(frozen=True)
class Task:
    """`names` are read from a file and a column; `target` is a record's, with each name's place;
    `loss` is of scores and targets; `score` of all test records' scores, targets and the names.
    """

    names: Callable[[Path, str], Names]
    target: Callable[[Any, dict[str, int]], Any]
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    metric: str
    score: Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor], Names], float]
    reads: str = "texts"  # or words, or conversations


def _entity_f1(
    scores: Sequence[torch.Tensor], targets: Sequence[torch.Tensor], names: Names
) -> float:
    """Of entities whose type and borders are right, among words that were read."""
    true: set[tuple[Any, ...]] = set()
    given: set[tuple[Any, ...]] = set()
    for record, (found, own) in enumerate(zip(scores, targets, strict=True)):
        for tags, kept in ((own, true), (found.argmax(dim=1), given)):
            words = [names[tag] for tag in tags[own != IGNORED].tolist()]
            kept |= {(record, *entity) for entity in entities(words)}
    return 2 * len(true & given) / max(1, len(true) + len(given))


def _next_token_loss(scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(scores[:, :-1].transpose(1, 2), targets[:, 1:])


def _perplexity(scores: Sequence[torch.Tensor], targets: Sequence[torch.Tensor], _: Names) -> float:
    """Of a token that the assistant says, all of the file's tokens alike."""
    learnt = [int((own[1:] != IGNORED).sum()) for own in targets]
    losses = [
        float(_next_token_loss(each[None], own[None])) * count
        for each, own, count in zip(scores, targets, learnt, strict=True)
        if count
    ]
    return math.exp(sum(losses) / sum(learnt))


def _many_hot(labels: Sequence[str], places: dict[str, int]) -> list[float]:
    return [float(name in labels) for name in places]


TASKS = {
    "sequence-classification": Task(
        read_label_set,
        lambda label, places: places[str(label)],
        functional.cross_entropy,
        "accuracy",
        lambda scores, targets, _: accuracy_score(
            torch.stack([*targets]), torch.stack([*scores]).argmax(dim=1)
        ),
    ),
    "multi-label": Task(
        read_label_lists,
        _many_hot,
        functional.binary_cross_entropy_with_logits,
        "micro F1",
        lambda scores, targets, _: f1_score(
            torch.stack([*targets]), torch.stack([*scores]) > 0, average="micro"
        ),
    ),
    "regression": Task(
        lambda path, column: [column],
        lambda number, _: [float(number)],
        functional.mse_loss,
        "Spearman",
        lambda scores, targets, _: spearmanr(torch.cat([*scores]), torch.cat([*targets])).statistic,
    ),
    "token-classification": Task(
        read_tag_set,
        lambda tags, places: [places[tag] for tag in tags],
        lambda scores, targets: functional.cross_entropy(scores.transpose(1, 2), targets),
        "entity F1",
        _entity_f1,
        reads="words",
    ),
    "causal-lm": Task(
        lambda path, column: [],
        lambda messages, _: messages,
        _next_token_loss,
        "perplexity",
        _perplexity,
        reads="conversations",
    ),
}


def main() -> None:
    """Train and print the task's figure on the test file after each epoch."""
    wanted = _arguments().parse_args()
    torch.manual_seed(wanted.seed)
    task = TASKS[wanted.task]
    names = task.names(wanted.test, wanted.label)
    columns = (*(wanted.text if task.reads != "conversations" else ()), wanted.label)
    train, test = (columns_of(path, columns, None) for path in (wanted.train, wanted.test))
    if wanted.records is not None:
        chosen = torch.randperm(len(train[wanted.label]))[: wanted.records].tolist()
        train = {name: [values[row] for row in chosen] for name, values in train.items()}
    began, found, count = time.monotonic(), [], len(train[wanted.label])
    for figure in _epochs(wanted, task, names, train, test):
        found.append(figure)
        print(f"epoch {len(found)}: {task.metric} {figure:.4f}", flush=True)
    seconds = time.monotonic() - began
    print(f"{count} records, {seconds:.0f} s")
    if wanted.json is not None:
        told = {task.metric: found, "seconds": seconds, "records": count}
        wanted.json.write_text(json.dumps({**told, "arguments": vars(wanted)}, default=str))


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--task", choices=TASKS, default="sequence-classification")
    parser.add_argument("--text", nargs="+", default=["text"], help="a text, or the two of a pair")
    parser.add_argument("--label", default="label")
    parser.add_argument("--records", type=int, help="train on so many, drawn by the seed")
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


def _epochs(wanted: Any, task: Task, names: Names, train: Table, test: Table) -> Iterator[float]:
    folder, count = resolve_base(wanted.base), len(train[wanted.label])
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model = _adapted(folder, len(names), wanted.rank, task.reads)
    optimizer = torch.optim.AdamW(model.parameters(), lr=wanted.learning_rate)
    steps = wanted.epochs * -(-count // wanted.batch)
    schedule = warm_and_decay(optimizer, steps // 10, steps)  # type: ignore[no-untyped-call]
    places = {name: place for place, name in enumerate(names)}
    for _ in range(wanted.epochs):
        model.train()
        for rows in _parts(torch.randperm(count).tolist(), wanted.batch):
            inputs, targets = _batch(wanted, task, places, tokenizer, train, rows)
            with torch.autocast("cpu", torch.bfloat16, enabled=wanted.bf16):
                logits = model(**inputs).logits
            loss = task.loss(logits.float(), targets)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        model.eval()
        scores, truth = [], []
        for rows in _parts([*range(len(test[wanted.label]))], 128):
            inputs, targets = _batch(wanted, task, places, tokenizer, test, rows)
            with torch.no_grad():
                scores += [*model(**inputs).logits]
            truth += [*targets]
        yield float(task.score(scores, truth, names))


def _parts(rows: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _adapted(folder: Path, outputs: int, rank: int, reads: str) -> Any:
    kind: Any
    if reads == "conversations":
        base = AutoModelForCausalLM.from_pretrained(folder)
        kind, targets = peft.TaskType.CAUSAL_LM, ["q_proj", "v_proj"]
    elif reads == "words":
        base = AutoModelForTokenClassification.from_pretrained(folder, num_labels=outputs)
        kind, targets = peft.TaskType.TOKEN_CLS, ["query", "value"]
    else:
        base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=outputs)
        kind, targets = peft.TaskType.SEQ_CLS, ["query", "value"]
    lora = peft.LoraConfig(task_type=kind, r=rank, lora_alpha=2 * rank, target_modules=targets)
    return peft.get_peft_model(base, lora)


def _batch(
    wanted: Any, task: Task, places: dict[str, int], tokenizer: Any, table: Table, rows: list[int]
) -> tuple[Any, torch.Tensor]:
    """What a network reads, and targets: of each record, or of each token that begins a word."""
    if task.reads == "conversations":
        return _conversations(wanted, tokenizer, [table[wanted.label][row] for row in rows])
    inputs = tokenizer(
        *([table[name][row] for row in rows] for name in wanted.text),
        padding=True,
        truncation=True,
        max_length=wanted.max_length,
        is_split_into_words=task.reads == "words",
        return_tensors="pt",
    )
    targets = [task.target(table[wanted.label][row], places) for row in rows]
    if task.reads == "texts":
        return inputs, torch.tensor(targets)
    aligned = torch.full(inputs["input_ids"].shape, IGNORED)
    for place, own in enumerate(targets):
        words = inputs.word_ids(place)
        for token, word in enumerate(words):
            if word is not None and word not in words[:token]:
                aligned[place, token] = own[word]
    return inputs, aligned


def _conversations(
    wanted: Any, tokenizer: Any, conversations: Sequence[Any]
) -> tuple[Any, torch.Tensor]:
    """Laid out by the tokenizer's template, cut where `--max-length` ends; targets are tokens."""
    layout = Layout(tokenizer)
    laid_out = [layout.tokens(messages) for messages in conversations]
    shape = len(laid_out), min(wanted.max_length, max(len(ids) for ids, _ in laid_out))
    ids, seen = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    targets = torch.full(shape, IGNORED)
    for place, (own, learnt) in enumerate(laid_out):
        count = min(shape[1], len(own))
        ids[place, :count], seen[place, :count] = torch.tensor(own[:count]), 1
        chosen = torch.tensor(learnt[:count])
        targets[place, :count][chosen] = ids[place, :count][chosen]
    return {"input_ids": ids, "attention_mask": seen}, targets


if __name__ == "__main__":
    main()
