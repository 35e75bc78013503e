"""The proxy lets the Fleet API through and no more, and strangers cost those who use it little."""

from __future__ import annotations

import http.client
import http.server
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from statistics import median

import psutil
import pytest

from fedlora.server.coordinator.folder import Directory
from fedlora.simulations.local.processes import free_port
from tests.beside import beside

NGINX = shutil.which("nginx") or ("/usr/sbin/nginx" if Path("/usr/sbin/nginx").exists() else "")
pytestmark = pytest.mark.skipif(not NGINX, reason="nginx is not installed: the proxy was not shown")
IDLE = 1000
HUGE = 300 << 20


@pytest.fixture
def made(tmp_path: Path) -> Directory:
    return Directory.create(
        tmp_path / "coordinator", "bank-intents", "127.0.0.1", free_port(), free_port()
    )


class Upstream(http.server.BaseHTTPRequestHandler):
    """What stands where SuperLink would: it says which path reached it."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = self.path.encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Silent."""


@contextmanager
def behind_nginx(made: Directory) -> Iterator[int]:
    """nginx as configured, before an upstream with the coordinator's own certificate; its port."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", made.settings.superlink.port), Upstream)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(made.root / "tls" / "server.crt", made.root / "tls" / "server.key")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    command = [NGINX, "-c", str(made.root / "nginx.conf"), "-g", "daemon off;"]
    proxy = subprocess.Popen(command, stderr=subprocess.PIPE)
    try:
        _wait(made.settings.address.port)
        yield made.settings.address.port
    finally:
        proxy.terminate()
        proxy.communicate(timeout=10)
        server.shutdown()
        server.server_close()
        thread.join()


def _wait(port: int) -> None:
    for _ in range(100):
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.05)
    raise TimeoutError(f"nothing listens on {port}")


def test_nginx_accepts_its_configuration(made: Directory) -> None:
    command = [NGINX, "-t", "-c", str(made.root / "nginx.conf")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr


def test_institutions_reach_the_fleet_api_and_nothing_else(made: Directory) -> None:
    context = ssl.create_default_context(cafile=str(made.root / "ca" / "ca.crt"))
    with behind_nginx(made) as port:

        def ask(path: str, method: str = "POST", body: bytes = b"x") -> tuple[int, str]:
            connection = http.client.HTTPSConnection("127.0.0.1", port, context=context, timeout=10)
            try:
                connection.request(method, path, body=body)
                answer = connection.getresponse()
                return answer.status, answer.read().decode(errors="replace")
            finally:
                connection.close()

        assert ask("/v1/fleet/pull-messages") == (200, "/v1/fleet/pull-messages")
        # as checked
        assert ask("/v1/control/../fleet/pull-messages") == (200, "/v1/fleet/pull-messages")
        for path in (
            "/v1/control/start-run",
            "/v1/runtime/acquire-task",
            "/v1/fleet/../control/start-run",
            "/v1/fleet/%2e%2e/control/start-run",
            "/v1/fleet/..%2fcontrol/start-run",
            "//v1/control/start-run",
            "/v1/FLEET/x",
            "/docs",
            "/",
        ):
            assert ask(path)[0] in (400, 404), path
        assert ask("/v1/fleet/x", method="GET")[0] == 403
        connection = http.client.HTTPSConnection("127.0.0.1", port, context=context, timeout=10)
        connection.putrequest("POST", "/v1/fleet/x")
        connection.putheader("Content-Length", str(300 << 20))
        connection.endheaders()
        assert connection.getresponse().status == 413  # before a byte of the 300 MB was sent
        connection.close()


def test_strangers_cost_an_honest_request_little(made: Directory) -> None:
    """1,000 idle connections and bodies of 300 MB cost at most 300 MB; the times are printed."""
    context = ssl.create_default_context(cafile=str(made.root / "ca" / "ca.crt"))
    with behind_nginx(made) as port:
        _update(port, context)  # the first one starts what needs starting
        alone = _update(port, context)
        before = _memory(made)
        idle = [_idle(port, context, secured=bool(number % 2)) for number in range(IDLE)]
        try:
            with beside(partial(_flood, port, context)) as flood:
                honest = [_update(port, context) for _ in range(20)]
                grown = _memory(made) - before
            sent = flood.result()
        finally:
            for each in idle:
                each.close()
    times = f"alone {alone:.2f} s, beside {median(honest):.2f} s (at most {max(honest):.2f} s)"
    print(f"{times}, {sent} bodies refused, {grown >> 20} MB more")
    assert sent and grown < HUGE, (sent, grown)


def _update(port: int, context: ssl.SSLContext) -> float:
    """Seconds of an honest request: an adapter of a million coordinates."""
    started = time.monotonic()
    connection = http.client.HTTPSConnection("127.0.0.1", port, context=context, timeout=60)
    connection.request("POST", "/v1/fleet/push-messages", body=bytes(4 << 20))
    assert connection.getresponse().status == 200
    connection.close()
    return time.monotonic() - started


def _idle(port: int, context: ssl.SSLContext, secured: bool) -> socket.socket:
    """A stranger who connects, or speaks TLS and half a header, and then waits."""
    made = socket.create_connection(("127.0.0.1", port), timeout=60)
    if secured:
        made = context.wrap_socket(made, server_hostname="127.0.0.1")
        made.sendall(b"POST /v1/fleet/x HTTP/1.1\r\nHost: x\r\n")
    return made


def _flood(port: int, context: ssl.SSLContext, stop: threading.Event) -> int:
    """Bodies of 300 MB whose length is not announced, until `stop`; how many. Each is refused."""
    part, sent = b"%x\r\n" % (1 << 20) + bytes(1 << 20) + b"\r\n", 0
    while not stop.is_set():
        raw = socket.create_connection(("127.0.0.1", port), timeout=60)
        with context.wrap_socket(raw, server_hostname="127.0.0.1") as stream:
            stream.sendall(
                b"POST /v1/fleet/x HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
            )
            # it reads on for a while after its answer, and then no more
            with suppress(ConnectionError):
                for _ in range(HUGE >> 20):
                    stream.sendall(part)
            with suppress(ConnectionError):
                assert b" 413 " in stream.recv(1 << 10).partition(b"\r\n")[0]
        sent += 1
    return sent


def _memory(made: Directory) -> int:
    """Resident bytes of nginx, its children with it."""
    master = psutil.Process(int((made.root / "nginx.pid").read_text()))
    return sum(each.memory_info().rss for each in (master, *master.children()))
