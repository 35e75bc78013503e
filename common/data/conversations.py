"""Columns of conversations: a list of messages in each row, each with a role and what was said."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedlora.common.config.toml import shown
from fedlora.common.data.formats import Values
from fedlora.common.data.values import no_text
from fedlora.common.errors import BadInput

ROLES = ("system", "developer", "user", "assistant", "tool")
_KEYS = {"role", "content"}


def conversations(values: Values, where: str, column: str) -> list[list[dict[str, str]]]:
    """Messages of role and content; BadInput names the row of anything else.

    A conversation in which the assistant says nothing has nothing to learn from.
    """
    return [_messages(value, f"{where} row {row} {column}") for row, value in enumerate(values, 1)]


def _messages(value: Any, place: str) -> list[dict[str, str]]:
    messages = messages_of(value, place)
    if not any(each["role"] == "assistant" and each["content"].strip() for each in messages):
        raise BadInput(f"{place}: found no turn of the assistant's, expected at least one")
    return messages


def messages_of(value: Any, place: str) -> list[dict[str, str]]:
    """A conversation, as somebody asks it; BadInput for anything else than messages."""
    if not isinstance(value, list):
        found = "nothing" if value is None else type(value).__name__
        raise BadInput(f"{place}: found {found}, expected a list of messages")
    return [_message(each, f"{place} message {n}") for n, each in enumerate(value, 1)]


def _message(value: Any, place: str) -> dict[str, str]:
    if not isinstance(value, Mapping):
        raise BadInput(f"{place}: found {type(value).__name__}, expected role and content")
    # a column of structures has every key in each row, and nothing under most of them
    given = {name: each for name, each in value.items() if each not in (None, [], {})}
    more = sorted(set(given) - _KEYS)
    if more:
        raise BadInput(f"{place}: found {shown(more[0])}, expected role and content alone")
    role, content = given.get("role"), given.get("content", "")
    if role not in ROLES:
        raise BadInput(f"{place}: found the role {shown(role)}, expected one of {', '.join(ROLES)}")
    if found := no_text(content):
        raise BadInput(f"{place}: found {found}, expected text as content")
    return {"role": str(role), "content": str(content)}
