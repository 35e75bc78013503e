"""The endpoint: `/v1/chat/completions`, `/v1/completions`, `/v1/models`, `/predict`, one at a time.

For trying a model on one's own machine: it listens on loopback unless asked otherwise, knows no
users, and refuses what is too long before it reads it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from fedlora.common.adapter.peft import LoadedAdapter
from fedlora.server.watch.loopback import LOOPBACK, LoopbackHandler, LoopbackServer
from fedlora.simulations.serving.questions import chat, completion, predictions

ANSWERS: dict[str, Callable[[LoadedAdapter, str, bytes], dict[str, Any]]] = {
    "/v1/chat/completions": chat,
    "/v1/completions": completion,
    "/predict": predictions,
}


class Serving(LoopbackServer):
    """Answers for `loaded`, which clients know as `name`; on another host than loopback only where
    `anywhere` says that this was meant.
    """

    def __init__(
        self,
        loaded: LoadedAdapter,
        name: str,
        port: int = 0,
        host: str = LOOPBACK,
        anywhere: bool = False,
    ) -> None:
        self.loaded, self.name = loaded, name
        self.turn = threading.Lock()  # one network, one answer at a time
        super().__init__(Endpoint, host, port, anywhere)


class Endpoint(LoopbackHandler):
    """A request's body to the function that answers it."""

    server: Serving

    def get(self, path: str) -> None:
        """The one model that there is."""
        if path != "/v1/models":
            super().get(path)
            return
        model = {"id": self.server.name, "object": "model", "owned_by": "fedlora"}
        self.send_json({"object": "list", "data": [model]})

    def post(self, path: str, body: bytes) -> None:
        """Whatever `ANSWERS` has for the path."""
        if path not in ANSWERS:
            super().post(path, body)
            return
        with self.server.turn:
            answer = ANSWERS[path](self.server.loaded, self.server.name, body)
        self.send_json(answer)
