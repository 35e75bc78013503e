"""The live page: what it says of a run, whom it answers, and that a browser draws it."""

from __future__ import annotations

import http.client
import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedlora.common.errors import BadInput
from fedlora.common.model.state import AdapterState
from fedlora.server.rounds.checkpoint import Checkpoint, Progress
from fedlora.server.watch import live
from fedlora.server.watch.live import Watching
from fedlora.server.watch.loopback import LoopbackHandler, LoopbackServer
from fedlora.server.watch.view import POINTS, view
from tests.server.releases import SPEC, STATE, manifest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def line_of(number: int, institutions: int) -> dict[str, Any]:
    """A line of metrics.jsonl; a third of the institutions fail in each round."""
    failing = [f"client-{k}" for k in range(number % 3, institutions, 3)]
    return {
        "round": number,
        "attempt": number,
        "seconds": 2.0,
        "elapsed_seconds": 2.0 * number,
        "cpu_seconds": 3.0 * number,
        "peak_rss_bytes": 700_000_000,
        "epsilon": 3.0 * number / 2000,
        "asked": institutions,
        "replies": institutions - len(failing),
        "failures": [[name, "</script><b>no</b> answer within 600 s"] for name in failing],
        "examples_per_second": 88.5,
        "loss": 1.0 / number,
        "accuracy": number / (number + 10),
    }


def run_folder(folder: Path, rounds: int, institutions: int) -> Path:
    """A run that goes on, `rounds` of twice as many committed."""
    (phase,) = manifest().phases
    phase = replace(phase, rounds=2 * rounds, attempts=2 * rounds + 4)
    of = replace(manifest(), phases=(phase,))
    checkpoint = Checkpoint.create(folder / "checkpoint", of, AdapterState.zeros(SPEC))
    checkpoint.commit(Progress(rounds, STATE, STATE))
    (folder / "config.toml").write_text(f"[federation]\nclients = {institutions}\n")
    lines = [json.dumps(line_of(number, institutions)) for number in range(1, rounds + 1)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "lost.jsonl").write_text('{"attempt": 3, "reason": "1 of 2 answered"}\n')
    return folder


@contextmanager
def served(server: LoopbackServer) -> Iterator[LoopbackServer]:
    """Answering, for as long as this lasts."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def asked(
    server: LoopbackServer, method: str, path: str, body: bytes = b"", headers: Any = None
) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    try:
        connection.request(method, path, body or None, headers or {})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def test_a_view_is_of_public_figures_alone(tmp_path: Path) -> None:
    found = view(run_folder(tmp_path, 12, 5))
    assert (found["round"], found["rounds"], found["attempts"]) == (12, 24, [0, 28])
    assert found["state"] == "running" and found["answered"] == [3, 5]
    assert found["series"]["round"] == list(range(1, 13))
    assert found["series"]["accuracy"][-1] == 12 / 22 and "perplexity" not in found["series"]
    assert found["epsilon"] == "0.018" and float(found["promised"]) > 0
    first = found["institutions"][0]
    assert len(found["institutions"]) == 5 and first["failed"] == 4
    assert first["last"].startswith("round 1") and "no</b> answer" in first["last"]
    assert found["lost"] == [[3, "1 of 2 answered"]]
    assert found["resources"]["CPUs"] == 1.5 and found["resources"]["seconds left"] == 24.0
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"round": 13, "accu')  # half written
    assert view(tmp_path)["series"]["round"][-1] == 12
    (tmp_path / "summary.json").write_text('{"ended": "spent"}')
    assert view(tmp_path)["state"] == "ended early: spent"
    with pytest.raises(BadInput, match="found no run that was begun"):
        view(tmp_path / "elsewhere")


def test_a_long_run_is_drawn_by_a_thousand_points(tmp_path: Path) -> None:
    series = view(run_folder(tmp_path, 2 * POINTS + 1, 1))["series"]
    assert len(series["round"]) <= POINTS and series["round"][-1] == 2 * POINTS + 1


def test_a_stream_tells_what_files_say_and_goes_on_as_they_grow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "LOOK", 0.01)
    run_folder(tmp_path, 2, 3)
    with served(Watching(tmp_path, more=lambda: {"state": "as the caller says"})) as server:
        status, page = asked(server, "GET", "/")
        assert status == 200 and "EventSource" in page and "{{" not in page
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
        connection.request("GET", "/events")
        answer = connection.getresponse()
        assert answer.getheader("Content-Type") == "text/event-stream"
        first = json.loads(answer.readline().removeprefix(b"data: "))
        assert first["series"]["round"] == [1, 2] and first["state"] == "as the caller says"
        with (tmp_path / "metrics.jsonl").open("a") as stream:
            stream.write(json.dumps(line_of(3, 3)) + "\n")
        assert answer.readline() == b"\n"
        second = json.loads(answer.readline().removeprefix(b"data: "))
        assert second["series"]["round"] == [1, 2, 3]
        connection.close()


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "127.0.0.1"}, 200),
        ({"Host": "localhost:1"}, 200),
        ({"Host": "[::1]:8"}, 200),
        ({"Host": "evil.example"}, 403),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Host": "localhost", "Origin": "http://evil.example"}, 403),
        ({"Host": "localhost", "Origin": "null"}, 403),
        ({"Host": "localhost", "Origin": "http://localhost"}, 200),
    ],
    ids=str,
)
def test_no_other_page_is_answered(tmp_path: Path, headers: dict[str, str], status: int) -> None:
    """A name of somebody else's that leads to loopback is no name of this machine."""
    with served(Watching(run_folder(tmp_path, 1, 1))) as server:
        found, said = asked(server, "GET", "/", headers=headers)
        assert found == status
        assert status == 200 or "expected" in json.loads(said)["error"]["message"]


def test_what_is_not_there_and_who_asks_for_more(tmp_path: Path) -> None:
    run_folder(tmp_path, 1, 1)
    with served(Watching(tmp_path)) as server:
        assert asked(server, "GET", "/../../etc/passwd")[0] == 404
        assert asked(server, "POST", "/events", b"{}")[0] == 404
    with pytest.raises(BadInput, match=r"--host 0\.0\.0\.0: expected a loopback address"):
        LoopbackServer(LoopbackHandler, "0.0.0.0", 0)
    for port in (-1, 65536):
        with pytest.raises(BadInput, match=f"--port {port}: expected 1 to 65535, or 0: any"):
            Watching(tmp_path, port)
    with pytest.raises(BadInput, match="found no run"):
        Watching(tmp_path / "elsewhere")


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_a_browser_draws_it(tmp_path: Path) -> None:
    """Without a word from outside the page; a reason that looks like markup stays text."""
    run_folder(tmp_path / "run", 40, 100)
    with served(Watching(tmp_path / "run")) as server:
        command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
        command += [f"--user-data-dir={tmp_path / 'profile'}"]
        done = subprocess.run(
            [*command, server.url], capture_output=True, text=True, timeout=120, check=True
        )
    page = done.stdout
    assert "round 40 of 80" in page and page.count("<polyline") == 4
    assert (
        "&lt;/script&gt;&lt;b&gt;no&lt;/b&gt; answer" in page and page.count("<td>client-") == 100
    )
