"""A small HTTP service for this machine's own browser and programs: loopback, bounded, one line.

Whatever web page a browser shows may send requests to loopback, and a name of its own can be made
to lead there (DNS rebinding). So a request must name this machine as its host, and one with a body
must come from no other page; what is too long is refused before it is read. Nothing here speaks
TLS or knows users: it is no service for a network.
"""

from __future__ import annotations

import ipaddress
import json
import logging
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from fedlora.common.codec.strict import check_port
from fedlora.common.errors import BadInput
from fedlora.common.terminal import one_line

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
MOST_BODY, MOST_DROPPED, PART = 1 << 20, 64 << 20, 1 << 16  # bytes
SECONDS = 30.0  # that a request may take to arrive
HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class Reply(Exception):
    """How a request ends that is not answered as asked: a status, and one line why."""

    def __init__(self, status: HTTPStatus, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class LoopbackServer(ThreadingHTTPServer):
    """Serves `handler` on `host`, which is a loopback address unless `anywhere` says otherwise."""

    daemon_threads = True

    def __init__(
        self, handler: type[LoopbackHandler], host: str, port: int, anywhere: bool = False
    ) -> None:
        if not anywhere and not _is_loopback(host):
            raise BadInput(f"--host {host}: expected a loopback address, as {LOOPBACK}")
        check_port(port, "any that is free")
        self.anywhere = anywhere
        super().__init__((host, port), handler)

    @property
    def url(self) -> str:
        """Where a browser finds it."""
        return f"http://{self.server_address[0]!s}:{self.server_port}/"


class LoopbackHandler(BaseHTTPRequestHandler):
    """Answers GET and POST by `get` and `post`; a `Reply` that they raise ends as one line."""

    server: LoopbackServer
    timeout = SECONDS
    server_version, sys_version = "fedlora", ""
    protocol_version = "HTTP/1.1"

    def get(self, path: str) -> None:
        """Answer a request for `path`."""
        raise Reply(HTTPStatus.NOT_FOUND, f"{path}: found nothing there")

    def post(self, path: str, body: bytes) -> None:
        """Answer a request that brings `body`."""
        raise Reply(HTTPStatus.NOT_FOUND, f"{path}: found nothing there")

    def do_GET(self) -> None:
        """The library's own, of a request that was read."""
        self._answer(self.get)

    def do_POST(self) -> None:
        """The library's own, of a request whose body was not read yet."""
        self._answer(lambda path: self.post(path, self._body()))

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: what was asked is nobody's business."""

    def send(self, kind: str, body: bytes, status: HTTPStatus = HTTPStatus.OK, **more: str) -> None:
        """A whole answer; keywords are headers, with `_` for `-`."""
        self.send_response(status)
        named = {name.replace("_", "-"): value for name, value in more.items()}
        length = {"Content-Type": kind, "Content-Length": str(len(body))}
        for name, value in {**HEADERS, **length, **named}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def send_json(self, table: Mapping[str, Any], status: HTTPStatus = HTTPStatus.OK) -> None:
        """A table as JSON."""
        self.send("application/json", json.dumps(table).encode(), status)

    def _answer(self, work: Callable[[str], None]) -> None:
        try:
            self._check_origin()
            work(urlsplit(self.path).path)
        except Reply as reply:
            self._refuse(reply.status, str(reply))
        except BadInput as error:
            self._refuse(HTTPStatus.BAD_REQUEST, error.faults[0])
        except (BrokenPipeError, ConnectionResetError, TimeoutError):
            self.close_connection = True  # whoever asked has gone
        except Exception as error:
            log.exception("a request ended unexpectedly")
            said = f"found a fault of this program ({type(error).__name__})"
            self._refuse(HTTPStatus.INTERNAL_SERVER_ERROR, said)

    def _refuse(self, status: HTTPStatus, reason: str) -> None:
        self.close_connection = True  # a body may not have been read
        self.send_json({"error": {"message": one_line(reason), "type": status.phrase}}, status)

    def _check_origin(self) -> None:
        """Refuse a request that another page sent, or that calls this machine by another name."""
        if self.server.anywhere:
            return
        hosts = self.headers.get_all("Host") or [""]
        if len(hosts) != 1 or not _is_loopback(urlsplit(f"//{hosts[0]}").hostname or ""):
            raise Reply(HTTPStatus.FORBIDDEN, "Host: expected a loopback address or localhost")
        origin = self.headers.get("Origin")
        if origin is not None and urlsplit(origin).netloc != hosts[0]:
            raise Reply(HTTPStatus.FORBIDDEN, "Origin: expected none, or this service's own")

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise Reply(HTTPStatus.LENGTH_REQUIRED, "Content-Length: expected a number of bytes")
        if int(length) > MOST_BODY:
            left = min(int(length), MOST_DROPPED)
            while left and (part := self.rfile.read(min(PART, left))):
                left -= len(part)  # who is hung up on while it sends may lose the answer
            raise Reply(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"body: found {length} bytes, expected at most {MOST_BODY}",
            )
        return self.rfile.read(int(length))


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
