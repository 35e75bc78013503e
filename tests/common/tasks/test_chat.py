"""Conversations: as the template lays them out, learnt where the assistant speaks, cut by turns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from fedlora.common.data.records import Columns, Records, read_records
from fedlora.common.errors import BadInput
from fedlora.common.model.tokenizer import load_tokenizer
from fedlora.common.tasks.causal_lm import LEARNT, CausalLanguageModel, prompt_tokens
from fedlora.common.tasks.chat import Layout
from tests.tasks import TEMPLATE, chatting

TASK = CausalLanguageModel()
CHAT = [
    {"role": "system", "content": "the bank"},
    {"role": "user", "content": "is it good"},
    {"role": "assistant", "content": "it is"},
    {"role": "user", "content": "was it"},
    {"role": "assistant", "content": "it was fine"},
]

SYSTEM_FIRST = (
    "{{ bos_token }}{% if messages[0]['role'] != 'system' %}"
    "{{ raise_exception('no instruction') }}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(chatting(tiny_llama, tmp_path_factory.mktemp("chat")))


def encoded(tokenizer: Any, messages: list[dict[str, str]], most: int) -> tuple[str, str, Any]:
    """The whole row, what of it is learnt, and what was cut."""
    records = Records([""], None, None, None, {}, "test", parts={"messages": [messages]})
    data = TASK.encode(records, tokenizer, most)
    learnt = data.tokens[data.targets == LEARNT]
    whole, own = (
        " ".join(tokenizer.convert_ids_to_tokens(e.tolist())) for e in (data.tokens, learnt)
    )
    return whole, own, {name for name, count in data.truncated.items() if count}


def test_the_assistants_turns_are_learnt_and_nothing_else(tokenizer: Any) -> None:
    whole, learnt, cut = encoded(tokenizer, CHAT, 64)
    plain = tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=True)["input_ids"]
    assert whole.split() == tokenizer.convert_ids_to_tokens(plain)
    assert learnt == "it is </s> it was fine </s>" and not cut


def test_what_comes_after_the_last_answer_teaches_nothing(tokenizer: Any) -> None:
    more = [*CHAT, {"role": "user", "content": "good good"}]
    assert encoded(tokenizer, more, 64) == encoded(tokenizer, CHAT, 64)


def test_earlier_exchanges_go_first_and_whole(tokenizer: Any) -> None:
    full = len(encoded(tokenizer, CHAT, 64)[0].split())
    whole, learnt, cut = encoded(tokenizer, CHAT, full - 1)
    assert whole == "<s> <sys> the bank </s> <user> was it </s> <bot> it was fine </s>"
    assert learnt == "it was fine </s>" and cut == {"conversation"}
    short = len(whole.split()) - 1
    assert encoded(tokenizer, CHAT, short)[0] == "<s> <user> was it </s> <bot> it was fine </s>"
    whole, learnt, cut = encoded(tokenizer, CHAT, 8)
    assert (whole, learnt) == ("was it </s> <bot> it was fine </s>", "it was fine </s>")
    assert cut == {"conversation", "prompt"}
    whole, learnt, cut = encoded(tokenizer, CHAT, 4)
    assert learnt == "it was" and cut == {"conversation", "prompt", "response"}


def test_a_control_word_that_somebody_typed_stays_words(tokenizer: Any) -> None:
    typed = [{"role": "user", "content": "it </s> <bot>"}, CHAT[2]]
    whole, learnt, _ = encoded(tokenizer, typed, 64)
    assert whole.split().count("</s>") == 2 and whole.split().count("<bot>") == 1
    assert learnt == "it is </s>"


def test_an_answer_begins_where_the_template_opens_it(tokenizer: Any) -> None:
    expected = tokenizer.apply_chat_template(
        CHAT[:2], tokenize=True, add_generation_prompt=True, return_dict=True
    )["input_ids"]
    assert prompt_tokens(tokenizer, CHAT[:2], 64) == expected
    assert prompt_tokens(tokenizer, CHAT[:2], 3) == expected[-3:]
    empty = [{"role": "user"}], [{"role": "user", "content": ""}]  # as a column of structures has
    first, second = (prompt_tokens(tokenizer, messages, 64) for messages in empty)
    assert first == second


def test_a_long_conversation_is_answered_by_its_last_exchanges(tokenizer: Any) -> None:
    """Whole ones, as in training; before, the first word that fitted stood in the midst of one."""
    full = len(prompt_tokens(tokenizer, CHAT[:4], 64))
    kept = prompt_tokens(tokenizer, [CHAT[0], CHAT[3]], 64)
    assert prompt_tokens(tokenizer, CHAT[:4], full - 1) == kept
    assert prompt_tokens(tokenizer, CHAT[:4], len(kept) - 1) == prompt_tokens(
        tokenizer, [CHAT[3]], 64
    )


def test_a_long_instruction_alone_keeps_its_end(tokenizer: Any) -> None:
    whole = prompt_tokens(tokenizer, CHAT[:1], 64)
    assert prompt_tokens(tokenizer, CHAT[:1], 3) == whole[-3:]


def test_an_instruction_of_a_developer_stays_as_a_systems(tokenizer: Any) -> None:
    said = [{"role": "developer", "content": "the bank"}, *CHAT]
    full = len(encoded(tokenizer, said, 64)[0].split())
    whole, _, cut = encoded(tokenizer, said, full - 1)
    assert whole.split().count("bank") == 2 and cut == {"conversation"}


def test_a_turn_that_a_template_trims_is_trimmed(tiny_llama: Path, tmp_path: Path) -> None:
    trimming = TEMPLATE.replace("message['content']", "message['content'] | trim")
    layout = Layout(load_tokenizer(chatting(tiny_llama, tmp_path, trimming)))
    turns, _ = layout._laid_out(("user", "assistant"))
    assert [turn.trimmed for turn in turns] == [True, True]


def test_a_base_without_a_template_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(BadInput, match="found a tokenizer without a chat template"):
        encoded(load_tokenizer(tiny_llama), CHAT, 64)


def test_what_a_template_refuses_or_drops_is_one_line(tiny_llama: Path, tmp_path: Path) -> None:
    refusing = "{{ raise_exception('only users') }}" + TEMPLATE
    for template, fault in (
        (refusing, r"row 1: found the roles user, assistant, which .* refuses \(only users\)"),
        ("{{ messages[-1]['content'] }}", "of which the template drops some"),
    ):
        tokenizer = load_tokenizer(chatting(tiny_llama, tmp_path, template))
        with pytest.raises(BadInput, match=fault):
            encoded(tokenizer, CHAT[1:3], 64)


@pytest.mark.parametrize(
    ("changed", "messages"),
    [
        # what is left of a long one is refused by a template that takes the whole
        (("{{ bos_token }}", SYSTEM_FIRST), CHAT[:3]),
        # what is left of it has nothing to learn from: no word, and no word that ends the turn
        (("{{ eos_token }}", ""), [*CHAT, CHAT[1], {"role": "assistant", "content": " "}]),
    ],
    ids=["refused", "nothing"],
)
def test_no_length_that_a_coordinator_asks_for_is_answered_by_a_refusal(
    tiny_llama: Path, tmp_path: Path, changed: tuple[str, str], messages: list[dict[str, str]]
) -> None:
    """It would say how long a conversation is, by offers that nobody is charged for."""
    tokenizer = load_tokenizer(chatting(tiny_llama, tmp_path, TEMPLATE.replace(*changed)))
    for most in range(4, 40):
        whole, _, _ = encoded(tokenizer, messages, most)
        assert 0 < len(whole.split()) <= most


@pytest.mark.parametrize(
    ("messages", "fault"),
    [
        (None, "found nothing, expected a list of messages"),
        ([], "found no turn of the assistant's"),
        ([{"role": "user", "content": "a"}], "found no turn of the assistant's"),
        ([{"role": "robot", "content": "a"}], 'message 1: found the role "robot"'),
        (["a"], "message 1: found str, expected role and content"),
        ([{"role": "assistant", "content": ["a"]}], "found list, expected text as content"),
        (
            [{"role": "assistant", "content": "\ud800"}],
            "found half a surrogate pair, expected text",
        ),
        (
            [{"role": "assistant", "content": "a", "tool_calls": [{"name": "f"}]}],
            'found "tool_calls", expected role and content alone',
        ),
    ],
)
def test_conversations_that_are_refused(messages: Any, fault: str, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps({"messages": messages}), encoding="utf-8")
    with pytest.raises(BadInput, match=fault) as caught:
        read_records(path, Columns("", messages="messages"))
    assert str(caught.value).startswith("train.jsonl row 1 messages")


def test_what_is_asked_is_a_text_or_a_conversation() -> None:
    assert TASK.asked(["it", CHAT[:2]]).texts == ["it", "the bank\nis it good"]
    for wrong, fault in (
        (["it", ["was"]], "input 2 message 1: found str, expected role and content"),
        ([[{"role": "user", "content": 3}]], "input 1 message 1: found int, expected text"),
        ([[{"role": "robot", "content": ""}]], 'input 1 message 1: found the role "robot"'),
        ([[]], "input 1: found no message"),
        ([None], "input 1: found nothing, expected text"),
    ):
        with pytest.raises(BadInput, match=fault):
            TASK.asked(wrong)


def test_empty_keys_of_a_structure_are_no_keys(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    rows = [{"messages": [{**each, "tool_calls": None, "name": None} for each in CHAT]}]
    path.write_text(json.dumps(rows[0]), encoding="utf-8")
    records = read_records(path, Columns("", messages="messages"))
    assert records.parts["messages"] == [CHAT]
    assert records.texts == ["\n".join(each["content"] for each in CHAT)]


def test_a_text_is_learnt_from_its_beginning(tiny_llama: Path) -> None:
    tokenizer: transformers.PreTrainedTokenizerBase = load_tokenizer(tiny_llama)
    records = Records(["it was good", "it was"], None, None, None, {}, "test")
    data = TASK.encode(records, tokenizer, 4)
    words = tokenizer.convert_ids_to_tokens(data.tokens.tolist())
    assert words == ["<s>", "it", "was", "good", "<s>", "it", "was", "</s>"]
    assert (data.targets == LEARNT).tolist() == [False, True, True, True] * 2
    assert dict(data.truncated) == {"text": 0}
