"""Bad messages of secure aggregation, by their names in the project's list of bad inputs.

Each is refused with one line by whoever gets it, changes nothing there, and the round goes on to
the same sum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest

from fedlora.client.node.outbox import MemoryOutbox
from fedlora.client.secagg.node import SecureNode
from fedlora.common.errors import BadInput, FedloraError, Refused
from fedlora.common.secagg import shamir, wire
from fedlora.common.secagg.cohort import CohortPolicy
from fedlora.common.secagg.wire import KeyOffer, MaskedInput, Opening
from fedlora.server.secagg.attempt import Listed, ServerAttempt
from fedlora.server.secagg.epoch import ServerEpoch
from tests.secure_world import (
    FEDERATION,
    IDENTITIES,
    RUN,
    World,
    epoch_of,
    node_name,
    peers_of,
    slot_of,
)

VICTIM, OTHER = node_name(0), node_name(1)


@dataclass
class Round:
    """A round of five at its latest stage; `before` steps are done, and `finish` does the rest."""

    world: World = field(default_factory=lambda: World(5, minimum=5))
    sent: dict[str, bytes] = field(default_factory=dict)
    epoch: ServerEpoch = field(init=False)
    listed: Listed = field(init=False)
    attempt: ServerAttempt = field(init=False)
    members: bytes = b""
    survivors: bytes = b""
    agreement: bytes = b""

    def keys(self) -> Round:
        self.epoch = self.world.server_epoch(epoch_of())
        self.sent = {name: node.offer(epoch_of()) for name, node in self.world.nodes.items()}
        for offer in self.sent.values():
            self.epoch.add_offer(offer)
        self.members = self.epoch.close_offers()
        return self

    def shares(self) -> Round:
        for node in self.world.nodes.values():
            self.epoch.add_deal(node.deal(self.members))
        self.listed = self.epoch.close_deals()
        for name, node in self.world.nodes.items():
            node.accept(self.epoch.delivery(name))
        self.attempt = ServerAttempt(self.listed, slot_of(), self.world.encoding)
        world = self.world
        self.sent = {
            n: world.nodes[n].mask(slot_of(), world.encoding, world.values(n)) for n in world.names
        }
        return self

    def inputs(self) -> Round:
        for message in self.sent.values():
            self.attempt.add_input(message)
        self.survivors = self.attempt.close_inputs()
        return self

    def confirmed(self) -> Round:
        for node in self.world.nodes.values():
            self.attempt.add_confirmation(node.confirm(1, self.survivors))
        self.agreement = self.attempt.agreement()
        return self

    def opened(self) -> Round:
        self.sent = {name: node.open(1, self.agreement) for name, node in self.world.nodes.items()}
        return self

    def offers(self) -> list[KeyOffer]:
        return list(wire.cohort_from_bytes(self.members))

    def victim(self) -> SecureNode:
        return self.world.nodes[VICTIM]


def deal(now: Round, changed: list[KeyOffer]) -> None:
    now.victim().deal(wire.cohort_to_bytes([offer.to_bytes() for offer in changed]))


def input_with(now: Round, **changes: object) -> None:
    message = MaskedInput.from_bytes(now.sent[VICTIM])
    now.attempt.add_input(replace(message, **changes).to_bytes())  # type: ignore[arg-type]


def flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def two_names_of_one_house(now: Round) -> None:
    peers = peers_of(5)
    peers[OTHER] = replace(peers[OTHER], organisation="organisation-2")
    node = SecureNode(
        IDENTITIES[0], CohortPolicy(VICTIM, peers, 5, 1), FEDERATION, RUN, MemoryOutbox()
    )
    own = KeyOffer.from_bytes(node.offer(epoch_of()))
    node.deal(wire.cohort_to_bytes([each.to_bytes() for each in [own, *now.offers()[1:]]]))


def signed_by(number: int, offer: KeyOffer) -> KeyOffer:
    return replace(offer, signature=IDENTITIES[number].sign(wire.KEYS_TAG, *offer.signed()))


def opening_of_a_liar(now: Round) -> None:
    message = Opening.from_bytes(now.sent[OTHER])
    wrong = replace(message, shares=message.shares[:-32] + shamir.to_bytes(1))
    signed = wrong.signed(slot_of().context(epoch_of()), now.attempt._signed[-1])
    now.attempt.add_opening(
        replace(wrong, signature=IDENTITIES[1].sign(wire.OPENING_TAG, *signed)).to_bytes()
    )


def late(now: Round) -> None:
    now.attempt._inputs.discard(VICTIM)  # as if it had not come before U3 was fixed
    try:
        now.attempt.add_input(now.sent[VICTIM])
    finally:
        now.attempt._inputs.add(VICTIM)


SLOT = slot_of().context(epoch_of())
KEYS, SHARES, INPUTS, CONFIRMED, OPENED = range(5)
CASES: dict[str, tuple[int, Callable[[Round], object], str]] = {
    "msg-wrong-run": (
        KEYS,
        lambda now: now.victim().offer(epoch_of(2, run="sha256:other")),
        "another federation",
    ),
    "msg-wrong-round": (
        SHARES,
        lambda now: input_with(now, context=slot_of(round_number=2).context(epoch_of())),
        "round, attempt, model",
    ),
    "msg-wrong-stage": (SHARES, lambda now: now.attempt.add_input(now.sent[OTHER][9:]), "kind|end"),
    "msg-wrong-stage-signature": (
        KEYS,
        lambda now: deal(
            now,
            [
                *now.offers()[:4],
                replace(
                    now.offers()[4],
                    signature=IDENTITIES[4].sign(wire.SHARES_TAG, *now.offers()[4].signed()),
                ),
            ],
        ),
        "did not make",
    ),
    "msg-wrong-sender": (SHARES, lambda now: input_with(now, name=OTHER), "did not make"),
    "msg-replayed": (INPUTS, lambda now: now.victim().offer(epoch_of(1)), "expected one above"),
    "msg-signature-flipped": (
        SHARES,
        lambda now: now.attempt.add_input(flipped(now.sent[VICTIM])),
        "did not make",
    ),
    "msg-oversize": (
        KEYS,
        lambda now: now.victim().deal(wire.cohort_to_bytes([b""] * 1001)),
        "too many fields",
    ),
    "vec-short": (
        SHARES,
        lambda now: input_with(now, vector=bytes(76)),
        "found 76 bytes, expected 80",
    ),
    "vec-long": (
        SHARES,
        lambda now: input_with(now, vector=bytes(84)),
        "found 84 bytes, expected 80",
    ),
    "cohort-below-minimum": (
        KEYS,
        lambda now: deal(now, now.offers()[:4]),
        "found 4 members, expected at least 5",
    ),
    "cohort-duplicate-key": (
        KEYS,
        lambda now: deal(
            now,
            [
                *now.offers()[:4],
                signed_by(4, replace(now.offers()[4], share_key=now.offers()[3].share_key)),
            ],
        ),
        "one key twice",
    ),
    "cohort-two-keys-one-organisation": (
        KEYS,
        two_names_of_one_house,
        "two members of one organisation",
    ),
    "unmask-overlap": (
        INPUTS,
        lambda now: now.victim().confirm(1, wire.survivors_to_bytes([VICTIM, *now.world.names])),
        "one twice",
    ),
    "unmask-below-t": (
        CONFIRMED,
        lambda now: now.victim().open(
            1, wire.agreement_to_bytes(wire.agreement_from_bytes(now.agreement)[:3])
        ),
        "found 3 signatures, expected at least 4",
    ),
    "unmask-twice": (
        OPENED,
        lambda now: now.victim().open(1, now.agreement),
        "no input that is still open",
    ),
    "share-corrupt": (OPENED, opening_of_a_liar, "did not deal"),
    "key-low-order": (
        KEYS,
        lambda now: deal(
            now, [*now.offers()[:4], signed_by(4, replace(now.offers()[4], share_key=bytes(32)))]
        ),
        "low order",
    ),
    "late-input": (INPUTS, late, "too late"),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_message(name: str) -> None:
    stage, step, said = CASES[name]
    now, steps = Round(), ("keys", "shares", "inputs", "confirmed", "opened")
    for done in steps[: stage + 1]:
        getattr(now, done)()
    with pytest.raises(FedloraError, match=said) as caught:
        step(now)
    assert type(caught.value) in (BadInput, Refused) and "\n" not in str(caught.value)
    for rest in steps[stage + 1 :]:
        getattr(now, rest)()
    for sender, message in now.sent.items():
        if (name, sender) != ("share-corrupt", OTHER):
            now.attempt.add_opening(message)
    assert (now.attempt.result().levels == now.world.plain_sum(now.world.names)).all()
