"""The relay loads nothing heavy, hands bytes over as they are, and says if the trainer is away."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from flwr.app import Context, Message, MessageType, RecordDict

from fedlora.client.network.relay import NO_ANSWER, door_of, query, train
from fedlora.client.network.supernode import Link, supervise, trainer_address
from fedlora.client.node.policy import TrainerPolicy
from fedlora.client.service.endpoint import Service
from fedlora.common.errors import BadInput, Refused
from fedlora.common.protocol.flower import envelope_record, read_envelope
from tests.client.institution import Institution


@pytest.fixture(autouse=True)
def a_task_of_flower(monkeypatch: pytest.MonkeyPatch) -> None:
    # what a SuperNode sets in the process of a ClientApp, and every Message asks for
    for name in ("_run_id", "_task_id", "_node_id"):
        monkeypatch.setattr(f"flwr.supercore.task_identity.TaskIdentity.{name}", 1)


HEAVY = ("torch", "transformers", "peft", "opacus", "scipy", "pyarrow", "sklearn")


def context(trainer: str) -> Context:
    return Context(1, 2, {"trainer": trainer}, RecordDict(), {})


def message(data: bytes) -> Message:
    return Message(envelope_record("offer", data), 1, MessageType.TRAIN)


def test_the_relay_starts_quickly_and_without_torch() -> None:
    code = (
        "import sys, fedlora.client.network.relay, fedlora.client.network.supernode;"
        f" sys.exit(any(m in sys.modules for m in {HEAVY}))"
    )
    started = time.monotonic()
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
    assert time.monotonic() - started < 4


@pytest.mark.parametrize("given", ["", "foo", "unix:", "unix: x", "host:", "host:99999999"])
def test_a_trainer_that_nobody_can_reach_is_bad_input(given: str) -> None:
    with pytest.raises(BadInput, match=r"--trainer .*: expected unix:PATH or host:port"):
        trainer_address(given, Path())
    for port in ("0", "65536"):
        with pytest.raises(BadInput, match=r"--trainer .*: expected a port of 1 to 65535"):
            trainer_address(f"host:{port}", Path())
    assert trainer_address("[::1]:65535", Path()) == "[::1]:65535"


def test_bytes_go_there_and_back_as_they_are(tmp_path: Path) -> None:
    service = Service(lambda data: data[::-1], TrainerPolicy(), tmp_path)
    service.start()
    try:
        for handler in (train, query):
            reply = handler(message(b"\x00\xffabc"), context(service.address))
            assert read_envelope(reply.content, 100) == ("offer", b"cba\xff\x00")
    finally:
        service.stop(0)


def test_an_absent_trainer_is_named_on_one_line(tmp_path: Path) -> None:
    reply = train(message(b"x"), context(f"unix:{tmp_path}/none.sock"))
    kind, line = read_envelope(reply.content, 1000)
    assert (
        kind == NO_ANSWER and b"unavailable" in line and b"none.sock" in line and b"\n" not in line
    )


def test_where_the_trainer_is_comes_from_the_nodes_own_configuration() -> None:
    with pytest.raises(BadInput, match="trainer: missing"):
        door_of({})
    with pytest.raises(BadInput, match="is not there"):
        door_of({"trainer": "h:1", "trainer-key": "/no/such/key"})


def test_health_answers_while_a_round_trains(tmp_path: Path) -> None:
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    from fedlora.client.network.channel import SERVICE, Door, TrainerAway

    begun, end = threading.Event(), threading.Event()

    def trains(data: bytes) -> bytes:
        begun.set()
        end.wait(30)
        return data

    service = Service(trains, TrainerPolicy(), tmp_path)
    service.start()
    door = Door(service.address)
    asking = [threading.Thread(target=lambda: door.ask(b"x", 30)) for _ in range(4)]
    try:
        for each in asking:
            each.start()
        assert begun.wait(10)
        time.sleep(0.3)
        with door.channel() as channel:
            found = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(service=SERVICE), timeout=5
            )
        assert found.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(TrainerAway, match="busy"):
            door.ask(b"x", 5)
    finally:
        end.set()
        for each in asking:
            each.join(30)
        service.stop(1)


def test_a_stop_ends_the_round_at_hand_and_begins_no_other(tmp_path: Path) -> None:
    from fedlora.client.network.channel import Door, TrainerAway

    begun, end, heard = threading.Event(), threading.Event(), list[bytes]()

    def trains(data: bytes) -> bytes:
        heard.append(data)
        begun.set()
        end.wait(30)
        return data

    service = Service(trains, TrainerPolicy(), tmp_path)
    service.start()
    door = Door(service.address)
    with ThreadPoolExecutor(3) as threads:
        first = threads.submit(door.ask, b"first", 30)
        assert begun.wait(10)
        second = threads.submit(door.ask, b"second", 30)
        time.sleep(0.3)
        stopped = threads.submit(service.stop, 20)
        with pytest.raises(TrainerAway, match="the trainer stops; ask again later"):
            second.result(10)
        assert not stopped.done()
        end.set()
        assert first.result(10) == b"first" and stopped.result(10) and heard == [b"first"]


def test_link_names_what_is_missing_and_starts_a_supernode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "flower-supernode").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=":")
    north = Institution(tmp_path / "node")
    link = Link(north.folder.relay, trainer_address("unix:trainer.sock", north.root))
    words = link.command()
    assert words[0].endswith("flower-supernode") and "127.0.0.1:9092" in words
    assert f'trainer="unix:{north.root.resolve()}/trainer.sock"' in words
    for port in (-1, 65536):
        with pytest.raises(BadInput, match=f"--port {port}: expected 1 to 65535, or 0: Flower's"):
            replace(link, port=port).command()
    (north.folder.relay / "flower_key").chmod(0o640)
    with pytest.raises(Refused, match="others can read"):
        link.command()
    with pytest.raises(BadInput, match="found no address"):
        replace(link, folder=_with_key(tmp_path / "empty")).command()


def _with_key(folder: Path) -> Path:
    folder.mkdir()
    (folder / "flower_key").touch(mode=0o600)
    return folder


def test_a_process_that_dies_is_started_again_until_it_is_stopped(tmp_path: Path) -> None:
    mark, stop = tmp_path / "mark", threading.Event()
    code = f"open({str(mark)!r}, 'a').write('x')"
    running = threading.Thread(target=supervise, args=([sys.executable, "-c", code], stop))
    running.start()
    deadline = time.monotonic() + 20
    while (not mark.exists() or len(mark.read_text()) < 2) and time.monotonic() < deadline:
        time.sleep(0.05)
    stop.set()
    running.join(10)
    assert len(mark.read_text()) >= 2 and not running.is_alive()


@pytest.mark.skipif(
    sys.platform != "linux", reason="needs a Linux parent-death signal: not shown here"
)
def test_a_link_that_is_killed_leaves_no_relay_behind(tmp_path: Path) -> None:
    """It would go on without its link, and SuperLink would turn the next one away for as long."""
    mark = tmp_path / "mark"
    child = f"import os, time; open({str(mark)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    link = (
        "import sys, threading; from fedlora.client.network.supernode import supervise;"
        f" supervise([sys.executable, '-c', {child!r}], threading.Event())"
    )
    process = subprocess.Popen([sys.executable, "-c", link])
    _wait_for(lambda: mark.exists() and mark.read_text() != "")
    number = int(mark.read_text())
    process.kill()
    process.wait(10)
    _wait_for(lambda: not _runs(number))


def _runs(process: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False


def _wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "nothing happened within 20 s"
        time.sleep(0.05)


def test_a_signal_that_another_thread_gets_ends_the_trainer_too(tmp_path: Path) -> None:
    """As the kernel gives it where a tracer has the main thread stopped.

    A wait without end would sleep on.
    """
    code = f"""
import signal, threading
from pathlib import Path
from fedlora.client.node.policy import TrainerPolicy
from fedlora.client.service.endpoint import serve
threading.Timer(1.0, lambda: signal.pthread_kill(threading.get_ident(), signal.SIGTERM)).start()
serve(lambda data: data, TrainerPolicy(), Path({str(tmp_path)!r}), print)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)


def test_who_ends_the_trainer_as_soon_as_its_socket_is_there_is_heard(tmp_path: Path) -> None:
    """It died of the signal while it could be reached already, and a supervisor read a failure."""
    code = f"""
import os, signal
from pathlib import Path
from fedlora.client.node.policy import TrainerPolicy
from fedlora.client.service.endpoint import serve
def listening(address):
    assert Path(address.removeprefix("unix:")).is_socket()
    os.kill(os.getpid(), signal.SIGTERM)
serve(lambda data: data, TrainerPolicy(), Path({str(tmp_path)!r}), listening)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)
