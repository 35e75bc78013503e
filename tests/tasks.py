"""For each task: records that a test makes, the configuration that reads them, a line to answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import transformers

from fedlora.common.model.tokenizer import load_tokenizer
from tests.conftest import WORDS
from tests.media import png, wav

Row = dict[str, Any]


TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ {'system': '<sys>', 'user': '<user>', 'assistant': '<bot>'}[message['role']] }} "
    "{{ message['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<bot> {% endif %}"
)


def chatting(base: Path, folder: Path, template: str = TEMPLATE) -> Path:
    """A base with a chat template, and control tokens of its own for roles."""
    tokenizer = load_tokenizer(base)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<sys>", "<user>", "<bot>"]})
    tokenizer.chat_template = template
    network = transformers.AutoModelForCausalLM.from_pretrained(base)
    network.resize_token_embeddings(len(tokenizer))
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Made:
    """A task on a tiny base. `base` names a fixture, `data` and `model` are TOML lines."""

    id: str
    task: str
    row: Callable[[np.random.Generator], Row]
    line: str  # a line of a file that is to be answered
    metric: str  # that a summary must have
    data: str = ""
    model: str = ""
    base: str = "tiny_bert"
    private: bool = True

    def write(self, path: Path, count: int, seed: int) -> Path:
        """JSON lines of so many records; what is bytes lies in files beside them."""
        rng = np.random.default_rng(seed)
        rows = (json.dumps(_beside(path, n, self.row(rng))) for n in range(count))
        path.write_text("".join(row + "\n" for row in rows), encoding="utf-8")
        return path

    def config(self, base: Path, folder: Path, more: str = "") -> str:
        """A short run over three institutions."""
        return f"""
seed = 5
[model]
base = "{base}"
task = "{self.task}"
max_length = 24
{self.model}
[lora]
rank = 2
[data]
train = "{folder}/train.jsonl"
test = "{folder}/test.jsonl"
validation = "{folder}/validation.jsonl"
{self.data}
[federation]
clients = 3
partition = "iid"
[training]
steps = 1
sampling_rate = 0.5
precision = "fp32"
attention = "sdpa"
[privacy]
epsilon = 8.0
delta = 1e-4
{more}
"""


def _beside(path: Path, number: int, row: Row) -> Row:
    file = path.with_name(f"{path.stem}-{number}")
    for value in row.values():
        if isinstance(value, bytes):
            file.write_bytes(value)
    return {k: file.name if isinstance(v, bytes) else v for k, v in row.items()}


def text(rng: np.random.Generator, most: int = 8) -> str:
    """Words of nothing in particular."""
    return " ".join(rng.choice(WORDS, rng.integers(1, most)))


def _one(rng: np.random.Generator) -> Row:
    label = int(rng.integers(2))
    return {"text": f"{text(rng)} {('bad', 'good')[label]}", "label": label}


def _pair(rng: np.random.Generator) -> Row:
    label, first = int(rng.integers(2)), text(rng)
    return {"a": first, "b": first if label else text(rng), "label": label}


def _number(rng: np.random.Generator) -> Row:
    score = float(rng.integers(0, 11)) / 2
    return {"text": f"{text(rng)} {'good ' * int(score)}", "score": score}


def _two_numbers(rng: np.random.Generator) -> Row:
    return {**_pair(rng), "score": float(rng.uniform(0, 5))}


def _many(rng: np.random.Generator) -> Row:
    labels = [each for each in ("good", "bad", "poor") if rng.random() < 0.4]
    return {"text": " ".join([text(rng), *labels]), "labels": labels}


def _tagged(rng: np.random.Generator) -> Row:
    words = text(rng, 10).split()
    tags = ["B-place" if word == "bank" else "O" for word in words] + ["B-place", "I-place"]
    return {"tokens": [*words, "bank", "loan"], "tags": tags}


def _spans(rng: np.random.Generator) -> Row:
    before = text(rng)
    start = len(before) + 1
    span = {"start": start, "end": start + len("bank loan"), "label": "place"}
    return {"text": f"{before} bank loan", "spans": [span]}


def _answered(rng: np.random.Generator) -> Row:
    return {"prompt": text(rng), "response": text(rng)}


def _image(rng: np.random.Generator) -> Row:
    label = int(rng.integers(2))
    return {"image": png(rng, label), "label": ("blue", "red")[label]}


def _sound(rng: np.random.Generator) -> Row:
    label = int(rng.integers(2))
    return {"audio": wav(rng, 300 + 1500 * label), "label": ("low", "high")[label]}


def _said(rng: np.random.Generator) -> Row:
    turns = ("user", "assistant") * int(rng.integers(1, 3))
    return {"messages": [{"role": role, "content": text(rng, 4)} for role in turns]}


MADE = (
    Made("one text", "sequence-classification", _one, "it was good", "accuracy"),
    Made(
        "a pair",
        "sequence-classification",
        _pair,
        '["it was good", "it was"]',
        "macro_f1",
        'text = ["a", "b"]',
        'pooling = "mean"',  # both texts as one: the others are read apart
    ),
    Made(
        "a pair, decoder",
        "sequence-classification",
        _pair,
        '["it was good", "it was"]',
        "accuracy",
        'text = ["a", "b"]',
        base="tiny_llama",
    ),
    Made(
        "a number",
        "regression",
        _number,
        "it was good good",
        "spearman",
        'label = "score"\nscale = [0, 5]',
    ),
    Made(
        "a number for a pair",
        "regression",
        _two_numbers,
        '["it was", "was it"]',
        "pearson",
        'text = ["a", "b"]\nlabel = "score"\nscale = [0.0, 5.0]',
    ),
    Made(
        "an image",
        "image-classification",
        _image,
        "test-0",
        "accuracy",
        'image = "image"',
        base="tiny_vit",
    ),
    Made("many labels", "multi-label", _many, "it was good", "micro_f1", 'label = "labels"'),
    Made(
        "tagged words",
        "token-classification",
        _tagged,
        "it was the bank",
        "entity_f1",
        'tokens = "tokens"\ntags = "tags"',
    ),
    Made(
        "spans",
        "token-classification",
        _spans,
        "it was the bank",
        "entity_f1",
        'tags = "spans"',
        base="tiny_llama",
    ),
    Made(
        "prompt and response",
        "causal-lm",
        _answered,
        "it was",
        "perplexity",
        'prompt = "prompt"\nresponse = "response"',
        base="tiny_llama",
    ),
    Made(
        "prompt and response, T5",
        "seq2seq",
        _answered,
        "it was",
        "perplexity",
        'prompt = "prompt"\nresponse = "response"',
        base="tiny_t5",
    ),
    Made("text", "causal-lm", _one, "it was", "perplexity", base="tiny_llama"),
    Made(
        "conversations",
        "causal-lm",
        _said,
        '[{"role": "user", "content": "it was"}]',
        "perplexity",
        'messages = "messages"',
        base="tiny_chat",
    ),
)
IDS = [each.id for each in MADE]
SOUND = Made(
    "a sound",
    "audio-classification",
    _sound,
    "test-0",
    "accuracy",
    'audio = "audio"',
    base="tiny_ast",
)
