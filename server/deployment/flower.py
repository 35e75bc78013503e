"""The coordinator's end of Flower: a cohort that asks through a Grid and adds the answers.

    1. choose whom to ask (`choose`: all, or by Poisson participation)
    2. one message each; its id is kept, and says from then on who has answered
    3. poll until all have answered or the deadline has passed
    4. check each reply against the plan; add it to one float64 sum; forget it

Who failed is known by message id alone: Flower answers for a dead node in its own name
(`src_node_id = 1`). A reply counts once, for the client that was asked, in the attempt that asked;
all others are refused.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from flwr.app import Context, Message, MessageType, RecordDict
from flwr.app.error import Error
from flwr.serverapp import Grid, ServerApp

from fedlora.common.errors import BadInput, Refused
from fedlora.common.manifest.manifest import RunManifest
from fedlora.common.manifest.plan import RoundPlan, Update
from fedlora.common.model.state import AdapterState
from fedlora.common.protocol import flower
from fedlora.common.protocol.messages import MAX_REPLY_BYTES
from fedlora.common.protocol.stages import Request, Stage
from fedlora.common.terminal import one_line
from fedlora.server.deployment.process import outcome_of
from fedlora.server.rounds.cohort import CohortSum, Failure

log = logging.getLogger(__name__)

REQUEST = "request"  # kind of an envelope of a deployment; its answer has the same
# Kinds of envelopes: a stage's message; why there is none, in UTF-8, for this attempt, and for any.
SECURE, DECLINED, REFUSED = "secure", "declined", "refused"
# of a stage's answer beside its vector: a thousand peers' sealed shares of an epoch
MAX_STAGE_BYTES = 1 << 26
SHORTEST_POLL, LONGEST_POLL = 0.02, 0.5  # seconds between two looks at the grid


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


@dataclass(frozen=True)
class Enrolment:
    """Who takes part: the node that answers for each client, and which nodes declined, and why."""

    nodes: Mapping[str, int]
    declined: tuple[Failure, ...]


def enrol(
    grid: Grid,
    manifest: RunManifest,
    expected: int,
    deadline: float,
    patience: float = 5.0,
    clock: Clock | None = None,
) -> Enrolment:
    """Offer the run to every node that comes online, until `expected` clients take part.

    It ends earlier where `deadline` seconds have passed, or `patience` seconds without a new node
    once all have answered. Refused, with every reason, where no client takes part. A client belongs
    to the node that named it first; a second node that claims it is declined.
    """
    clock = clock or Clock()
    end = clock.now() + deadline
    quiet_since = clock.now()
    nodes: dict[str, int] = {}
    declined: list[Failure] = []
    offered: set[int] = set()
    while len(nodes) < expected and clock.now() < min(end, quiet_since + patience):
        arrived = sorted(set(grid.get_node_ids()) - offered)
        offered.update(arrived)
        declined += _offer(grid, arrived, manifest, nodes, end - clock.now(), clock)
        if arrived:
            quiet_since = clock.now()
        else:
            clock.sleep(LONGEST_POLL)
    if not nodes:
        reasons = [f"node {failure.client}: {failure.reason}" for failure in declined]
        raise Refused(
            "\n".join(reasons) or f"no node came online within {min(deadline, patience):g} s"
        )
    return Enrolment(nodes, tuple(declined))


class GridCohort:
    """A `Cohort` whose clients are behind a Flower Grid.

    `nodes` maps a client to the node that answers for it; `choose` names the clients asked for a
    plan. `deadline` is in seconds, for a whole attempt.
    """

    def __init__(
        self,
        grid: Grid,
        nodes: Mapping[str, int],
        choose: Callable[[RoundPlan], Sequence[str]],
        deadline: float,
        clock: Clock | None = None,
    ) -> None:
        self._grid = grid
        self._nodes = dict(nodes)
        self._choose = choose
        self._deadline = deadline
        self._clock = clock or Clock()

    def total(self, plan: RoundPlan, state: AdapterState) -> CohortSum:
        """Sum of the valid updates, added as they come: memory does not grow with the cohort."""
        started = self._clock.now()
        total = np.zeros(state.spec.size, dtype=np.float64)
        replies = 0
        failures: list[Failure] = []
        asked = self._choose(plan)
        for answer in self._answers(asked, plan, state):
            if isinstance(answer, Failure):
                failures.append(answer)
            else:
                total += answer.delta
                replies += 1
        seconds = self._clock.now() - started
        return CohortSum(total, replies, len(asked), tuple(failures), seconds)

    def _answers(
        self, asked: Sequence[str], plan: RoundPlan, state: AdapterState
    ) -> Iterator[Update | Failure]:
        """Exactly one answer for each client asked."""
        tasks = []
        for client, record in flower.plan_records(asked, plan, state):
            if client in self._nodes:
                tasks.append((client, self._nodes[client], record))
            else:
                yield Failure(client, "no node answers for it")
        for client, answer in _exchange(
            self._grid, MessageType.TRAIN, tasks, self._deadline, self._clock
        ):
            size = state.spec.size
            yield answer if isinstance(answer, Failure) else _judge(client, answer, plan, size)


class GridCarrier:
    """A deployment's `Carrier`: opaque envelopes to members' nodes.

    `nodes` is read anew, for members come and go.
    """

    def __init__(
        self, grid: Grid, nodes: Callable[[], Mapping[str, int]], clock: Clock | None = None
    ) -> None:
        self._grid, self._nodes, self._clock = grid, nodes, clock or Clock()

    def online(self) -> set[str]:
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
        tasks = (
            (name, nodes[name], flower.envelope_record(REQUEST, requests[name]))
            for name in requests
            if name in nodes
        )
        for name, answer in _exchange(self._grid, MessageType.TRAIN, tasks, deadline, self._clock):
            yield name, answer if isinstance(answer, Failure) else _carried(name, answer)


def _carried(name: str, record: RecordDict) -> bytes | Failure:
    """A node's bytes; a relay that reached no trainer says so in an envelope of another kind."""
    try:
        kind, data = flower.read_envelope(record, MAX_REPLY_BYTES)
    except BadInput as error:
        return Failure(name, "; ".join(error.faults))
    return data if kind == REQUEST else Failure(name, one_line(data.decode(errors="replace")))


class GridExchange:
    """An `Exchange` over a Flower Grid: opaque bytes each way, one deadline a stage.

    What comes back is the institution's own signed message; whoever carried it is not asked who it
    is.
    """

    def __init__(
        self, grid: Grid, nodes: Mapping[str, int], deadline: float, clock: Clock | None = None
    ) -> None:
        self._grid, self._nodes, self._deadline = grid, dict(nodes), deadline
        self._clock = clock or Clock()

    def ask(
        self, stage: str, messages: Mapping[str, bytes], plan: RoundPlan, state: AdapterState
    ) -> Iterator[tuple[str, bytes | Failure]]:
        """Each name once, as the answers come in."""
        vector = state.vector.astype("<f4", copy=False).tobytes() if stage == Stage.INPUT else b""
        limit = MAX_STAGE_BYTES + 8 * state.spec.size

        def record(name: str) -> RecordDict:
            return flower.envelope_record(
                SECURE, Request(stage, name, plan, messages[name], vector).to_bytes()
            )

        for name in messages:
            if name not in self._nodes:
                yield name, Failure(name, "no node answers for it")
        tasks = (
            (name, self._nodes[name], record(name)) for name in messages if name in self._nodes
        )
        for name, answer in _exchange(
            self._grid, MessageType.TRAIN, tasks, self._deadline, self._clock
        ):
            yield name, answer if isinstance(answer, Failure) else _opened(name, answer, limit)


def _opened(name: str, record: RecordDict, limit: int) -> bytes | Failure:
    """The bytes of an answer, or why there are none: a decline is an envelope of its own."""
    try:
        kind, data = flower.read_envelope(record, limit)
        if kind in (DECLINED, REFUSED):
            return Failure(name, one_line(data.decode(errors="replace")), refused=kind == REFUSED)
        if kind != SECURE:
            raise BadInput(f"envelope kind: found {kind}, expected {SECURE}")
    except BadInput as error:
        return Failure(name, "; ".join(error.faults))
    return data


def _offer(
    grid: Grid,
    node_ids: Sequence[int],
    manifest: RunManifest,
    nodes: dict[str, int],
    deadline: float,
    clock: Clock,
) -> Iterator[Failure]:
    """Enter into `nodes` who consents; yield the nodes that do not."""
    offers = [(str(node), node, flower.offer_record(manifest)) for node in node_ids]
    for node, answer in _exchange(grid, MessageType.QUERY, offers, deadline, clock):
        failure = answer if isinstance(answer, Failure) else _register(nodes, int(node), answer)
        if failure is not None:
            yield failure


def _exchange(
    grid: Grid,
    message_type: str,
    contents: Iterable[tuple[str, int, RecordDict]],
    deadline: float,
    clock: Clock,
) -> Iterator[tuple[str, RecordDict | Failure]]:
    """Send each (name, node, content); yield each name once, with the reply or why there is none.

    No reply is kept, nor a content once it is sent. A message that no open id waits for is refused:
    late, sent twice or never asked for.
    """
    end = clock.now() + deadline
    waiting: dict[str, tuple[str, int]] = {}
    for name, node, content in contents:
        message_id = _push(
            grid, Message(content, node, message_type, ttl=max(end - clock.now(), 1.0))
        )
        if message_id is None:
            yield name, Failure(name, "the message could not be sent")
        else:
            waiting[message_id] = (name, node)
    pause = SHORTEST_POLL
    while waiting:
        replies = list(grid.pull_messages(set(waiting)))
        for reply in replies:
            asked = waiting.pop(reply.metadata.reply_to_message_id, None)
            if asked is None:
                log.warning(
                    "refused a reply from node %s that nobody waits for", reply.metadata.src_node_id
                )
            else:
                yield asked[0], _content_or_failure(reply, *asked)
        left = end - clock.now()
        if left <= 0:
            break
        pause = SHORTEST_POLL if replies else min(2 * pause, LONGEST_POLL)
        if waiting:
            clock.sleep(min(pause, left))
    for name, _ in waiting.values():
        yield name, Failure(name, f"no answer within {deadline:g} s")


def _push(grid: Grid, message: Message) -> str | None:
    """Id of the message, or None: a grid answers what it can't take with nothing or None."""
    ids = list(grid.push_messages([message]))
    return ids[0] if len(ids) == 1 and ids[0] else None


def _content_or_failure(reply: Message, name: str, node: int) -> RecordDict | Failure:
    if reply.has_error():
        return Failure(name, _describe(reply.error))
    if reply.metadata.src_node_id != node:
        return Failure(name, f"answered by node {reply.metadata.src_node_id}, expected node {node}")
    if not reply.has_content():
        return Failure(name, "found an empty reply")
    return reply.content


def _describe(error: Error) -> str:
    """A Flower error without its stack trace: the last line says most."""
    lines = [line.strip() for line in (error.reason or "").splitlines() if line.strip()]
    return one_line(f"Flower error {error.code}: {lines[-1] if lines else 'no reason given'}")


def _judge(client: str, record: RecordDict, plan: RoundPlan, size: int) -> Update | Failure:
    """The update if it is this client's answer to this plan, or why it does not count."""
    try:
        reply = flower.read_reply(record, size)
        if reply.client != client:
            raise BadInput(f"update client: found {reply.client}, expected {client}")
        if isinstance(reply, flower.Refusal):
            return Failure(client, reply.reason, reply.refused)
        reply.check(plan, size)
    except BadInput as error:
        return Failure(client, "; ".join(error.faults))
    return reply


def _register(nodes: dict[str, int], node: int, record: RecordDict) -> Failure | None:
    """Enter `node`'s clients; a Failure where it declines or claims another's client."""
    try:
        clients = flower.read_answer(record)
    except (BadInput, Refused) as error:
        return Failure(str(node), one_line(str(error)), isinstance(error, Refused))
    taken = [client for client in clients if client in nodes]
    if taken:
        return Failure(str(node), f"claims {taken[0]}, which node {nodes[taken[0]]} answers for")
    nodes.update(dict.fromkeys(clients, node))
    return None
