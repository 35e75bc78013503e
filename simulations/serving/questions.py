"""What is asked of a model, as tables of the kind that OpenAI's clients send, and its answers.

A conversation is put to a base with a chat template in that template's form, to others as its
texts, a blank line between two; a prompt as it is. Fields that change how a language model draws
its words and are not known here are left aside, as such clients send many; what would change the
form of the answer is refused.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedlora.common.adapter.peft import LoadedAdapter
from fedlora.common.codec.strict import json_table
from fedlora.common.data.encoding import word_tokens
from fedlora.common.errors import BadInput
from fedlora.common.tasks.task import LANGUAGE, TRANSLATION

MOST_TOKENS, DEFAULT_TOKENS = 1024, 128
MOST_INPUTS = 256
MOST_STOPS = 4
Table = Mapping[str, Any]


@dataclass(frozen=True)
class Asked:
    """A prompt, and how its answer is to be drawn. `temperature` 0: the likeliest words."""

    prompt: str | list[dict[str, str]]  # or a conversation's messages
    tokens: int
    temperature: float
    stop: tuple[str, ...]


def chat(loaded: LoadedAdapter, model: str, body: bytes) -> dict[str, Any]:
    """The answer to `messages`, as `/v1/chat/completions` gives it; BadInput: what is wrong."""
    table = json_table(body, "body")
    messages = table.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BadInput("messages: expected a list of at least one message")
    texts = [_content(message, n) for n, message in enumerate(messages)]
    if getattr(loaded.model.tokenizer, "chat_template", None):
        roles = [str(message.get("role", "user")) for message in messages]
        pairs = zip(roles, texts, strict=True)
        prompt: Any = [{"role": role, "content": text} for role, text in pairs]
    else:
        prompt = "\n\n".join(texts)
    text, frame = _completed(loaded, model, _asked(table, prompt))
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return {**frame, "object": "chat.completion", "choices": [choice]}


def completion(loaded: LoadedAdapter, model: str, body: bytes) -> dict[str, Any]:
    """The answer to `prompt`, as `/v1/completions` gives it; BadInput says what is wrong."""
    table = json_table(body, "body")
    prompt = table.get("prompt")
    if not isinstance(prompt, str) or not prompt:
        raise BadInput("prompt: expected a text")
    text, frame = _completed(loaded, model, _asked(table, prompt))
    choice = {"index": 0, "text": text, "finish_reason": "stop"}
    return {**frame, "object": "text_completion", "choices": [choice]}


def predictions(loaded: LoadedAdapter, model: str, body: bytes) -> dict[str, Any]:
    """An answer to each of `inputs`, which are what the model's task reads; BadInput as above."""
    if loaded.model.task.medium is not None:  # a path would name a file of this machine
        raise BadInput(f"task: found {loaded.description.task}, expected one whose inputs are text")
    inputs = json_table(body, "body").get("inputs")
    inputs = [inputs] if isinstance(inputs, str) else inputs
    if not isinstance(inputs, list) or not 0 < len(inputs) <= MOST_INPUTS:
        raise BadInput(f"inputs: expected a text, or a list of 1 to {MOST_INPUTS}")
    if not all(map(_is_input, inputs)):
        raise BadInput("inputs: expected a text in each place, or a list of texts")
    return {"model": model, "predictions": loaded.predict(inputs)}


def _content(message: object, number: int) -> str:
    """The text of a message: its content, or the texts of its parts."""
    content = message.get("content") if isinstance(message, Mapping) else None
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, Mapping)]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) == len(content):
            return "\n".join(texts)
    if not isinstance(content, str):
        raise BadInput(f"messages {number}: expected a content that is text")
    return content


def _asked(table: Table, prompt: Any) -> Asked:
    if table.get("stream"):
        raise BadInput("stream: found true, expected false: an answer comes whole")
    if table.get("n", 1) != 1:
        raise BadInput("n: expected 1")
    tokens = table.get("max_completion_tokens", table.get("max_tokens", DEFAULT_TOKENS))
    stop = table.get("stop") or ()
    stop = (stop,) if isinstance(stop, str) else stop
    if not isinstance(stop, Sequence) or len(stop) > MOST_STOPS or not all(map(_is_text, stop)):
        raise BadInput(f"stop: expected a text, or at most {MOST_STOPS}")
    return Asked(
        prompt,
        int(_number(tokens, "max_tokens", 1, MOST_TOKENS)),
        _number(table.get("temperature", 0.0), "temperature", 0.0, 2.0),
        tuple(stop),
    )


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value != ""


def _is_input(value: object) -> bool:
    """A text, or the two of a pair, or words."""
    return _is_text(value) or (
        isinstance(value, list) and bool(value) and all(map(_is_text, value))
    )


def _number(value: object, name: str, low: float, high: float) -> float:
    right = isinstance(value, int | float) and not isinstance(value, bool)
    if not right or not low <= value <= high:  # type: ignore[operator]
        raise BadInput(f"{name}: expected a number from {low:g} to {high:g}")
    return float(value)  # type: ignore[arg-type]


def _completed(loaded: LoadedAdapter, model: str, asked: Asked) -> tuple[str, dict[str, Any]]:
    """The model's words up to the first `stop`, and what every answer says beside them."""
    if loaded.model.task.reads not in (LANGUAGE, TRANSLATION):
        raise BadInput(f"task: found {loaded.description.task}, whose answers /predict gives")
    text = loaded.complete(asked.prompt, asked.tokens, asked.temperature)
    for stop in asked.stop:
        text = text.partition(stop)[0]
    prompt = asked.prompt
    read = prompt if isinstance(prompt, str) else "\n\n".join(each["content"] for each in prompt)
    given, said = (len(ids) for ids in word_tokens(loaded.model.tokenizer, [read, text]))
    used = {"prompt_tokens": given, "completion_tokens": said, "total_tokens": given + said}
    named = {"id": f"fedlora-{secrets.token_hex(8)}", "created": int(time.time())}
    return text, {**named, "model": model, "usage": used}
