"""A cohort that aggregates securely in one process.

Honest nodes, an honest coordinator, drop-outs at any stage. Tests take single steps of it and lie
in between.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from fedlora.client.node.outbox import MemoryOutbox
from fedlora.client.secagg.node import SecureNode
from fedlora.common.secagg.cohort import CohortPolicy
from fedlora.common.secagg.ring import Encoding
from fedlora.common.secagg.wire import Epoch, Slot
from fedlora.common.trust.enrolment import Peer
from fedlora.common.trust.identity import Identity
from fedlora.server.secagg.attempt import Listed, SecureSum, ServerAttempt
from fedlora.server.secagg.epoch import ServerEpoch

FEDERATION, RUN = "hospitals", "sha256:" + "ab" * 32
ADAPTER, BASE = "sha256:" + "cd" * 32, "sha256:" + "ef" * 32
IDENTITIES = [Identity.generate() for _ in range(100)]
Ints = npt.NDArray[np.int64]


def node_name(number: int) -> str:
    return f"node-{number:03d}"


def peers_of(count: int) -> dict[str, Peer]:
    return {
        node_name(number): Peer(
            node_name(number), f"organisation-{number}", IDENTITIES[number].public
        )
        for number in range(count)
    }


def remove(node: SecureNode, name: str) -> None:
    """The node's operator takes a peer off the roster."""
    peers = {each: peer for each, peer in node.policy.peers.items() if each != name}
    node.adopt(replace(node.policy, peers=peers))


def slot_of(attempt: int = 1, round_number: int = 1, adapter: str = ADAPTER) -> Slot:
    return Slot(round_number, attempt, adapter, BASE)


def encoding_of(size: int = 16, members: int = 100) -> Encoding:
    return Encoding.fitting(size, 1.0, 1 << 20, members)


@dataclass
class World:
    """`count` nodes of one federation; `minimum` and `colluders` are every node's policy."""

    count: int
    minimum: int = 3
    colluders: int = 1
    noised: bool = True
    encoding: Encoding = field(default_factory=encoding_of)
    outboxes: dict[str, MemoryOutbox] = field(default_factory=dict)
    nodes: dict[str, SecureNode] = field(default_factory=dict)
    assumed: int = 1  # colluders, by the coordinator

    def __post_init__(self) -> None:
        for name in self.names:
            self.outboxes[name] = MemoryOutbox()
            self.nodes[name] = self.node(name)

    @property
    def names(self) -> list[str]:
        return [node_name(number) for number in range(self.count)]

    def node(self, name: str) -> SecureNode:
        """The node, as it is after a start: it has its outbox, and no secrets."""
        peers = peers_of(self.count)
        policy = CohortPolicy(name, peers, self.minimum, self.colluders)
        identity = IDENTITIES[int(name[-3:])]
        return SecureNode(identity, policy, FEDERATION, RUN, self.outboxes[name], self.noised)

    def values(self, name: str) -> Ints:
        """A node's update in levels, extremes included."""
        rng = np.random.default_rng(int(name[-3:]))
        values = rng.integers(-self.encoding.levels, self.encoding.levels + 1, self.encoding.size)
        values[:2] = self.encoding.levels, -self.encoding.levels
        return values

    def plain_sum(self, names: Collection[str]) -> Ints:
        total = np.zeros(self.encoding.size, dtype=np.int64)
        for name in names:
            total += self.values(name)
        return total

    def server_epoch(self, epoch: Epoch) -> ServerEpoch:
        identities = {name: peer.identity for name, peer in peers_of(self.count).items()}
        return ServerEpoch(epoch, identities, self.minimum, colluders=self.assumed)

    def begin(
        self, epoch: Epoch, no_keys: Collection[str] = (), no_deal: Collection[str] = ()
    ) -> Listed:
        """Stages 1 and 2; who is named in `no_keys` or `no_deal` drops out there."""
        server = self.server_epoch(epoch)
        here = [name for name in self.names if name not in no_keys]
        for name in here:
            server.add_offer(self.nodes[name].offer(epoch))
        members = server.close_offers()
        for name in here:
            if name not in no_deal and name in server.members:
                server.add_deal(self.nodes[name].deal(members))
        listed = server.close_deals()
        for name in listed.deals:
            self.nodes[name].accept(server.delivery(name))
        return listed

    def attempt(
        self,
        listed: Listed,
        slot: Slot,
        no_input: Collection[str] = (),
        no_confirmation: Collection[str] = (),
        no_opening: Collection[str] = (),
    ) -> SecureSum:
        """Stages 3 to 6."""
        server = ServerAttempt(listed, slot, self.encoding)
        for name in listed.deals:
            if name not in no_input:
                server.add_input(self.nodes[name].mask(slot, self.encoding, self.values(name)))
        survivors = server.close_inputs()
        here = [name for name in listed.deals if name not in no_input]
        for name in here:
            if name not in no_confirmation:
                server.add_confirmation(self.nodes[name].confirm(slot.attempt, survivors))
        agreement = server.agreement()
        for name in here:
            if name not in no_confirmation and name not in no_opening:
                server.add_opening(self.nodes[name].open(slot.attempt, agreement))
        return server.result()


def epoch_of(number: int = 1, first: int = 1, count: int = 1, run: str = RUN) -> Epoch:
    return Epoch(FEDERATION, run, number, first, count)
