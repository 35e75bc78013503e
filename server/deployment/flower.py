"""The coordinator's end of Flower: a `Carrier` of signed bytes over a Grid.

    1. one message to each institution's node; its id is kept, and says from then on who answered
    2. poll until all have answered or the deadline has passed
    3. hand each answer on as it comes; forget it

Who failed is known by message id alone: Flower answers for a dead node in its own name
(`src_node_id = 1`). A reply counts once, for the institution that was asked, in the attempt that
asked; all others are refused.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from flwr.app import Context, Message, MessageType
from flwr.app.error import Error
from flwr.serverapp import Grid, ServerApp

from fedlora.common.errors import BadInput
from fedlora.common.protocol import flower
from fedlora.common.protocol.messages import MAX_REPLY_BYTES
from fedlora.common.terminal import one_line
from fedlora.server.deployment import talks
from fedlora.server.deployment.process import outcome_of
from fedlora.server.deployment.talks import LONGEST_POLL, SHORTEST_POLL, Talk
from fedlora.server.rounds.cohort import Failure

log = logging.getLogger(__name__)

REQUEST = "request"  # kind of an envelope of a deployment; its answer has the same


server_app = ServerApp()


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """`fedlora-server run`: one run of a coordinator's folder, begun or resumed.

    How it ended lies in its folder.
    """
    from fedlora.server.coordinator.folder import Directory
    from fedlora.server.deployment.serve import serve

    folder, root = Path(str(context.run_config["run"])), Path(str(context.run_config["directory"]))

    def work() -> None:
        directory = Directory.open(root)
        serve(folder, directory.coordinator(), GridCarrier(grid, directory.nodes))

    outcome_of(work, folder, str(context.run_config["token"]))


@dataclass(frozen=True)
class Clock:
    """Time as the cohort sees it.

    `sleep` may raise KeyboardInterrupt to end a run at its last checkpoint.
    """

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


class GridCarrier:
    """A `Carrier` of opaque envelopes to institutions' nodes.

    `nodes` is read anew, for members come and go. A node that answers for several finds in the
    message's group whom a request is for.
    """

    def __init__(
        self, grid: Grid, nodes: Callable[[], Mapping[str, int]], clock: Clock | None = None
    ) -> None:
        self._grid, self._nodes, self._clock = grid, nodes, clock or Clock()
        self._asked = dict[str, int]()  # by a message's id, the node that it went to

    def online(self) -> set[str]:
        """Whose SuperNode is connected now."""
        connected = set(self._grid.get_node_ids())
        return {name for name, node in self._nodes().items() if node in connected}

    def ask(
        self, requests: Mapping[str, bytes], deadline: float
    ) -> Iterator[tuple[str, bytes | Failure]]:
        """Each name once, as the answers come in."""
        nodes = self._nodes()
        for name in requests:
            if name not in nodes:
                yield name, Failure(name, "no node is registered for it")
        end, waiting = self._clock.now() + deadline, dict[str, str]()
        for name in requests:
            if name in nodes:
                ttl = max(end - self._clock.now(), 1.0)
                sent = self._push(name, nodes[name], requests[name], ttl)
                if isinstance(sent, Failure):
                    yield name, sent
                else:
                    waiting[sent] = name
        yield from self._answers(waiting, end)
        for name in waiting.values():
            yield name, Failure(name, f"no answer within {deadline:g} s")

    def converse(
        self, with_each: Mapping[str, Talk], deadline: float
    ) -> Iterator[tuple[str, bytes | Failure]]:
        """Each name once, as its talk ends."""
        return talks.converse(self, with_each, deadline)

    def send(self, name: str, request: bytes, seconds: float) -> str | Failure:
        """The id of the message that carries a request; it is of use for so many `seconds`."""
        node = self._nodes().get(name)
        if node is None:
            return Failure(name, "no node is registered for it")
        return self._push(name, node, request, seconds)

    def _push(self, name: str, node: int, request: bytes, ttl: float) -> str | Failure:
        record = flower.envelope_record(REQUEST, request)
        message = Message(record, node, MessageType.TRAIN, ttl=ttl, group_id=name)
        ids = list(self._grid.push_messages([message]))
        # a grid answers what it can't take with nothing or None
        if len(ids) != 1 or not ids[0]:
            return Failure(name, "the message could not be sent")
        self._asked[ids[0]] = node
        return ids[0]

    def received(self, waiting: Mapping[str, str]) -> list[tuple[str, bytes | Failure]]:
        """Which of these messages, by name, are answered; none of the replies is kept.

        A message that no open id waits for is refused: late, sent twice or never asked for.
        """
        found = dict[str, bytes | Failure]()
        for reply in self._grid.pull_messages(set(waiting)):
            number = reply.metadata.reply_to_message_id
            if number not in waiting or number in found:
                source = reply.metadata.src_node_id
                log.warning("refused a reply from node %s that nobody waits for", source)
            else:
                found[number] = _carried(reply, waiting[number], self._asked.pop(number))
        return list(found.items())

    def now(self) -> float:
        """Seconds, by its clock."""
        return self._clock.now()

    def sleep(self, seconds: float) -> None:
        """As its clock does."""
        self._clock.sleep(seconds)

    def _answers(
        self, waiting: dict[str, str], end: float
    ) -> Iterator[tuple[str, bytes | Failure]]:
        """Take each name out of `waiting`, by message id, as its answer comes in."""
        pause = SHORTEST_POLL
        while waiting:
            replies = self.received(waiting)
            for number, answer in replies:
                yield waiting.pop(number), answer
            left = end - self._clock.now()
            if left <= 0:
                break
            pause = SHORTEST_POLL if replies else min(2 * pause, LONGEST_POLL)
            if waiting:
                self._clock.sleep(min(pause, left))


def _carried(reply: Message, name: str, node: int) -> bytes | Failure:
    """A node's bytes; a relay that reached no trainer says so in an envelope of another kind."""
    if reply.has_error():
        return Failure(name, _describe(reply.error))
    if reply.metadata.src_node_id != node:
        return Failure(name, f"answered by node {reply.metadata.src_node_id}, expected node {node}")
    if not reply.has_content():
        return Failure(name, "found an empty reply")
    try:
        kind, data = flower.read_envelope(reply.content, MAX_REPLY_BYTES)
    except BadInput as error:
        return Failure(name, "; ".join(error.faults))
    return data if kind == REQUEST else Failure(name, one_line(data.decode(errors="replace")))


def _describe(error: Error) -> str:
    """A Flower error without its stack trace: the last line says most."""
    lines = [line.strip() for line in (error.reason or "").splitlines() if line.strip()]
    return one_line(f"Flower error {error.code}: {lines[-1] if lines else 'no reason given'}")
