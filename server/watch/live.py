"""A live page of a run, on loopback: the page once, then server-sent events whenever files grow.

Nothing is loaded from outside the page, and what institutions or configurations wrote is put into
it as text, never as markup.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any

from fedlora.common.errors import FedloraError
from fedlora.server.watch.loopback import LOOPBACK, LoopbackHandler, LoopbackServer, Reply
from fedlora.server.watch.view import view

PAGE = Path(__file__).parent / "templates" / "watch.html"
LOOK = 1.0  # seconds between two looks at the files
BEAT = 15.0  # seconds after which a stream without news says so
MOST_STREAMS = 16
More = Callable[[], Mapping[str, Any]]


class Watching(LoopbackServer):
    """A server that shows the run in `folder`; `more` are values that take the place of its own.

    `port` 0: any that is free. BadInput where `folder` holds no run.
    """

    def __init__(self, folder: Path, port: int = 0, more: More = dict) -> None:
        self._folder, self._more = folder, more
        self.streams: list[int] = []  # one entry for each page that watches
        self._now()  # a folder without a run is refused here
        super().__init__(Page, LOOPBACK, port)

    def state(self) -> str:
        """The run's state as JSON, or the line that says what is wrong with its files."""
        try:
            table = self._now()
        except FedloraError as error:
            table = {"fault": str(error)}
        return json.dumps(table, allow_nan=False)

    def _now(self) -> dict[str, Any]:
        return {**view(self._folder), **self._more()}


class Page(LoopbackHandler):
    """The page, and its stream of events."""

    server: Watching

    def get(self, path: str) -> None:
        """The page at the root, its stream beside it."""
        if path == "/":
            self._page()
        elif path == "/events":
            self._events()
        else:
            super().get(path)

    def _page(self) -> None:
        nonce = secrets.token_urlsafe(16)
        policy = (
            f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}';"
            " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        # without a "<" it can't end the element that holds it
        first = self.server.state().replace("<", "\\u003c")
        page = PAGE.read_text(encoding="utf-8").replace("{{nonce}}", nonce)
        page = page.replace("{{first}}", first)
        self.send("text/html; charset=utf-8", page.encode(), Content_Security_Policy=policy)

    def _events(self) -> None:
        streams = self.server.streams
        if len(streams) >= MOST_STREAMS:
            raise Reply(HTTPStatus.SERVICE_UNAVAILABLE, "found too many pages that watch")
        streams.append(1)
        try:
            self.close_connection = True
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self._stream()
        finally:
            streams.pop()

    def _stream(self) -> None:
        """Until the page is closed, which the next write to it shows."""
        said, spoken = "", time.monotonic()
        while True:
            state = self.server.state()
            if state != said:
                self.wfile.write(f"data: {state}\n\n".encode())
                said, spoken = state, time.monotonic()
            elif time.monotonic() - spoken > BEAT:
                self.wfile.write(b": nothing new\n\n")
                spoken = time.monotonic()
            time.sleep(LOOK)
