"""Conversations, laid out by the tokenizer's own chat template.

What somebody typed stays ordinary text, whatever control word it spells: a template is given a mark
for each message, and the words take the marks' places when what is round them is tokenised already.
The assistant's turns are learnt, each with the control token that ends it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fedlora.common.data.encoding import control_tokens, spelt_tokens, word_tokens
from fedlora.common.errors import BadInput

ASSISTANT, INSTRUCTIONS = "assistant", ("system", "developer")
Message = Mapping[str, str]  # role and content
_MARK = re.compile("\ue000([0-9]+)\ue001")


@dataclass(frozen=True)
class Turn:
    """One message in its place: what stands before it, its words, and what ends it if learnt."""

    before: list[int]
    trimmed: bool  # the template takes white space off its ends
    ending: list[int]


class Layout:
    """A tokenizer's template, asked once for each sequence of roles."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._turns: dict[tuple[str, ...], tuple[list[Turn], list[int]]] = {}
        if not getattr(tokenizer, "chat_template", None):
            raise BadInput(
                "[model] base: found a tokenizer without a chat template, expected one, since"
                " [data] messages are to be laid out"
            )

    def tokens(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """A whole conversation, and which tokens of it are learnt; BadInput where the template
        refuses it.
        """
        turns, _ = self._laid_out(tuple(message["role"] for message in messages))
        ids: list[int] = []
        learnt: list[bool] = []
        for turn, message in zip(turns, messages, strict=True):
            own = message["role"] == ASSISTANT
            words = self._words(message, turn)
            ids += turn.before + words + turn.ending
            learnt += [False] * len(turn.before) + [own] * (len(words) + len(turn.ending))
        return ids, learnt

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """A conversation up to where the assistant's next turn begins."""
        turns, opening = self._laid_out(tuple(message["role"] for message in messages))
        pairs = zip(turns, messages, strict=True)
        parts = [turn.before + self._words(message, turn) + turn.ending for turn, message in pairs]
        return [token for part in [*parts, opening] for token in part]

    def _words(self, message: Message, turn: Turn) -> list[int]:
        text = message["content"].strip() if turn.trimmed else message["content"]
        return word_tokens(self._tokenizer, [text])[0]

    def _laid_out(self, roles: tuple[str, ...]) -> tuple[list[Turn], list[int]]:
        """The turns of a sequence of roles, and what opens the assistant's next one."""
        if roles not in self._turns:
            self._turns[roles] = self._asked(roles)
        return self._turns[roles]

    def _asked(self, roles: tuple[str, ...]) -> tuple[list[Turn], list[int]]:
        between = self._between(roles)
        wide = self._rendered(roles, wide=True)
        turns, rest = [], between[0]
        for place, role in enumerate(roles):
            ending = ""
            if role == ASSISTANT:
                own = self._between(roles[: place + 1])[-1]
                ending = _common(own, between[place + 1])
            tokens = self._tokenized(ending)
            stop = next((n for n, each in enumerate(tokens) if each in self._control), None)
            kept = tokens if stop is None else tokens[: stop + 1]
            trimmed = f" \ue000{place}\ue001 " not in wide
            turns.append(Turn(self._tokenized(rest), trimmed, kept))
            left = tokens[len(kept) :]
            rest = between[place + 1].removeprefix(ending)
            if left:  # what ends a turn behind its control token is not learnt: a line break, say
                rest = self._tokenizer.decode(left) + rest
        opened = self._between(roles, opened=True)[-1]
        last = turns[-1].ending if roles[-1] == ASSISTANT else []
        return turns, self._tokenized(opened)[len(last) :]

    def _between(self, roles: tuple[str, ...], opened: bool = False) -> list[str]:
        """What a template puts before, between and after messages; BadInput if it leaves one out
        or changes their order.
        """
        parts = _MARK.split(self._rendered(roles, opened=opened))
        if parts[1::2] != [str(place) for place in range(len(roles))]:
            raise BadInput(f"found the roles {', '.join(roles)}, of which the template drops some")
        return parts[::2]

    def _rendered(self, roles: tuple[str, ...], wide: bool = False, opened: bool = False) -> str:
        gap = " " * wide
        messages = [
            {"role": role, "content": f"{gap}\ue000{place}\ue001{gap}"}
            for place, role in enumerate(roles)
        ]
        try:
            text: str = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=opened
            )
        except Exception as error:  # a template raises what it likes
            reason = next(iter(str(error).splitlines()), type(error).__name__)[:120]
            raise BadInput(
                f"found the roles {', '.join(roles)}, which the base's chat template refuses"
                f" ({reason})"
            ) from error
        return text

    @cached_property
    def _control(self) -> frozenset[int]:
        return control_tokens(self._tokenizer)

    def _tokenized(self, text: str) -> list[int]:
        return spelt_tokens(self._tokenizer, text)


def fitted(
    layout: Layout, messages: Sequence[Message], room: int
) -> tuple[list[int], list[bool], bool]:
    """A conversation in at most `room` tokens, which of them are learnt, and whether turns are
    gone.

    Earlier exchanges go first and whole; an instruction at the beginning stays while it can. What
    comes after the assistant's last turn teaches nothing.
    """
    last = max(n for n, message in enumerate(messages) if message["role"] == ASSISTANT)
    kept = list(messages[: last + 1])
    ids, learnt = layout.tokens(kept)
    while len(ids) > room and (shorter := _without_earliest(kept)) is not None:
        try:
            ids, learnt = layout.tokens(shorter)
        except BadInput:  # the template takes the whole alone: a refusal would say how long it is
            break
        kept = shorter
    return ids, learnt, len(kept) < last + 1


def to_answer(layout: Layout, messages: Sequence[Message], room: int) -> list[int]:
    """A conversation up to where the assistant's next turn begins, in at most `room` tokens.

    Earlier exchanges go first and whole, as in training; of a single one the end stays.
    """
    kept = list(messages)
    ids = layout.prompt(kept)
    while len(ids) > room and (shorter := _without_earliest(kept)) is not None:
        try:
            ids = layout.prompt(shorter)
        except BadInput:  # as in `fitted`
            break
        kept = shorter
    return ids[-room:]


def _without_earliest(messages: list[Message]) -> list[Message] | None:
    """The same without the first exchange, or, if there is but one, without its instruction."""
    roles = [message["role"] for message in messages]
    start = next((n for n, role in enumerate(roles) if role not in INSTRUCTIONS), len(roles))
    asked = [n for n, role in enumerate(roles) if n > start and role == "user"]
    if asked:
        return messages[:start] + messages[asked[0] :]
    return messages[1:] if 0 < start < len(messages) else None


def _common(one: str, other: str) -> str:
    """How both begin."""
    length = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
    return one[: min(len(one), len(other)) if length is None else length]
