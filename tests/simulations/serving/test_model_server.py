"""The endpoint answers a client of the OpenAI kind, and bears no body that is too long or wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fedlora.common.adapter.peft import LoadedAdapter
from fedlora.common.errors import BadInput
from fedlora.server.watch.loopback import MOST_BODY, LoopbackServer
from fedlora.simulations.serving.model_server import Serving
from tests.common.adapter.test_merged import CASES, exported
from tests.server.watch.test_live import asked, served


@pytest.fixture(scope="module")
def prompts(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> LoadedAdapter:
    folder = tmp_path_factory.mktemp("prompts")
    return exported(tiny_llama, "default", CASES["a language model"][2], folder)


@pytest.fixture(scope="module")
def labels(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> LoadedAdapter:
    folder = tmp_path_factory.mktemp("labels")
    return exported(tiny_bert, "mean", CASES["a head of ours"][2], folder)


def posted(server: LoopbackServer, path: str, table: Any) -> tuple[int, dict[str, Any]]:
    body = table if isinstance(table, bytes) else json.dumps(table).encode()
    status, said = asked(server, "POST", path, body, {"Content-Type": "application/json"})
    found = json.loads(said)
    assert isinstance(found, dict)
    return status, found


def test_a_client_of_the_openai_kind_is_answered(prompts: LoadedAdapter) -> None:
    message = {"role": "user", "content": "w1 w2 good"}
    # what such clients send beside it is left aside
    more = {"model": "mine", "max_tokens": 5, "top_p": 1, "user": "u", "temperature": 0}
    with served(Serving(prompts, "mine")) as server:
        assert json.loads(asked(server, "GET", "/v1/models")[1])["data"][0]["id"] == "mine"
        status, chat = posted(server, "/v1/chat/completions", {"messages": [message], **more})
        assert status == 200 and chat["object"] == "chat.completion"
        said = chat["choices"][0]["message"]
        assert said == {"role": "assistant", "content": prompts.complete("w1 w2 good", 5)}
        usage = chat["usage"]
        assert usage["prompt_tokens"] == 3 and 0 < usage["completion_tokens"] <= 5
        whole = {"prompt": "w1 w2 good", **more}
        status, plain = posted(server, "/v1/completions", whole)
        assert status == 200 and plain["choices"][0]["text"] == said["content"]
        first = said["content"].split()[0]
        _, cut = posted(server, "/v1/completions", {**whole, "stop": [first]})
        assert cut["choices"][0]["text"] == ""
        parts = {"role": "user", "content": [{"type": "text", "text": "w1 w2 good"}]}
        _, same = posted(server, "/v1/chat/completions", {"messages": [parts], **more})
        assert same["choices"][0]["message"] == said
        torch.manual_seed(0)
        drawn = [
            posted(server, "/v1/completions", {**whole, "temperature": 2.0})[1]["choices"][0]
            for _ in range(3)
        ]
        assert len({choice["text"] for choice in drawn}) > 1


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("/v1/completions", b"{", 400, "body: found bytes that are not JSON"),
        ("/v1/completions", b"[]", 400, "body: found list, expected a table"),
        ("/v1/completions", {"prompt": 7}, 400, "prompt: expected a text"),
        ("/v1/completions", {"prompt": "a", "max_tokens": 1 << 20}, 400, "max_tokens: expected"),
        ("/v1/completions", {"prompt": "a", "max_tokens": True}, 400, "max_tokens: expected"),
        ("/v1/completions", {"prompt": "a", "temperature": -1}, 400, "temperature: expected"),
        ("/v1/completions", {"prompt": "a", "stop": [1]}, 400, "stop: expected"),
        ("/v1/completions", {"prompt": "a", "n": 2}, 400, "n: expected 1"),
        ("/v1/completions", {"prompt": "a", "stream": True}, 400, "an answer comes whole"),
        ("/v1/chat/completions", {"messages": []}, 400, "messages: expected a list"),
        ("/v1/chat/completions", {"messages": [{"content": [{}]}]}, 400, "messages 0: expected"),
        (
            "/predict",
            {"inputs": ["w1", ["w2"]]},
            400,
            "input 2 message 1: found str, expected role and content",
        ),
        ("/v1/completions", {"prompt": "\ud800"}, 400, "found half a surrogate pair"),
        ("/v1/embeddings", {}, 404, "found nothing there"),
        ("/predict", b" " * (MOST_BODY + 1), 413, f"expected at most {MOST_BODY}"),
        ("/predict", b" " * (8 * MOST_BODY), 413, f"expected at most {MOST_BODY}"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_wrong_is_one_line(
    prompts: LoadedAdapter, path: str, body: Any, status: int, said: str
) -> None:
    with served(Serving(prompts, "mine")) as server:
        found, answer = posted(server, path, body)
        assert found == status and said in answer["error"]["message"]
        assert "\n" not in answer["error"]["message"]
        assert posted(server, "/v1/completions", {"prompt": "w1", "max_tokens": 1})[0] == 200


def test_a_classifier_gives_labels(labels: LoadedAdapter) -> None:
    texts = ["w1 good", "w2 bad"]
    with served(Serving(labels, "mine")) as server:
        status, found = posted(server, "/predict", {"inputs": texts})
        assert status == 200 and found["predictions"] == labels.predict(texts)
        assert len(posted(server, "/predict", {"inputs": "w1"})[1]["predictions"]) == 1
        for wrong in (None, [], [""], [1], ["w1"] * 257):
            assert posted(server, "/predict", {"inputs": wrong})[0] == 400
        status, refused = posted(server, "/v1/completions", {"prompt": "w1"})
        assert status == 400 and "whose answers /predict gives" in refused["error"]["message"]


def test_a_network_is_served_only_where_that_was_meant(labels: LoadedAdapter) -> None:
    with pytest.raises(BadInput, match=r"--host 0\.0\.0\.0: expected a loopback address"):
        Serving(labels, "mine", host="0.0.0.0")
    Serving(labels, "mine", host="0.0.0.0", anywhere=True).server_close()
