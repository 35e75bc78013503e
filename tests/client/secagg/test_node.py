"""What a node refuses: every attack of a hostile coordinator, by name, and why it fails."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedlora.client.node.outbox import FolderOutbox, MemoryOutbox
from fedlora.client.secagg.node import SecureNode
from fedlora.common.errors import BadInput, Refused
from fedlora.common.secagg import commit, keys, masks, shamir, wire
from fedlora.common.secagg.cohort import CohortPolicy, threshold
from fedlora.common.secagg.ring import key_stream
from fedlora.common.secagg.wire import Confirmation, Deal, Dealer, Delivery, KeyOffer, Opening
from fedlora.common.trust.enrolment import Peer
from fedlora.common.trust.identity import Identity
from fedlora.server.secagg.attempt import Listed, ServerAttempt
from tests.secure_world import (
    ADAPTER,
    FEDERATION,
    IDENTITIES,
    RUN,
    World,
    encoding_of,
    epoch_of,
    node_name,
    peers_of,
    remove,
    slot_of,
)

VICTIM = node_name(0)


def offers(world: World, number: int = 1, first: int = 1, count: int = 1) -> dict[str, KeyOffer]:
    """Stage 1 as a coordinator sees it."""
    epoch = epoch_of(number, first, count)
    return {name: KeyOffer.from_bytes(world.nodes[name].offer(epoch)) for name in world.names}


def as_list(found: Collection[KeyOffer]) -> bytes:
    return wire.cohort_to_bytes([offer.to_bytes() for offer in found])


def deals(world: World, cohort_list: bytes) -> dict[str, Deal]:
    return {name: Deal.from_bytes(world.nodes[name].deal(cohort_list)) for name in world.names}


def delivery(
    found: dict[str, Deal], to: str, names: Sequence[str], only: Collection[str]
) -> Delivery:
    """U2 = `only`, as it is sent to one node."""
    size = len(next(iter(found.values())).hashes) // len(names)
    place, dealers, paths = list(names).index(to), [], []
    for name in only:
        hashes = found[name].hashes
        tree = commit.MerkleTree(
            [commit.leaf(hashes[at : at + size]) for at in range(0, len(hashes), size)]
        )
        dealers.append(Dealer(name, tree.root, found[name].seeds, found[name].signature))
        paths.append(tree.path(place))
    return Delivery(tuple(dealers), tuple(found[name].sealed[place] for name in only), tuple(paths))


def begun(world: World) -> Listed:
    return world.begin(epoch_of(count=2))


def masked(world: World, listed: Listed) -> ServerAttempt:
    """Everybody's input is in."""
    server = ServerAttempt(listed, slot_of(), world.encoding)
    for name in world.names:
        server.add_input(world.nodes[name].mask(slot_of(), world.encoding, world.values(name)))
    return server


# --- the three published attacks on Flower's SecAgg+ ----------------------------------------------


def test_attack_seed_search() -> None:
    """SecAgg+ expands masks with a generator of 28 effective bits.

    A few known words give the seed by search. Here a mask is AES-256-CTR under a key derived from
    256 bits, all of which count: whatever 28 bits a search runs through, the other 228 make another
    key, and so another stream.
    """
    context, dealers = bytes(32), bytes(32)
    seed = bytes(range(32))
    streams = set()
    for bit in range(256):
        flipped = (int.from_bytes(seed, "big") ^ 1 << bit).to_bytes(32, "big")
        streams.add(key_stream(masks.seed_mask(flipped, context, dealers)).update(bytes(16)))
    streams.add(key_stream(masks.seed_mask(seed, context, dealers)).update(bytes(16)))
    assert len(streams) == 257, "a bit of the seed does not count"
    own, peer = keys.KeyPair(seed), keys.KeyPair(bytes(reversed(seed)))
    shared = own.agree(peer.public)
    low = [(int.from_bytes(shared, "big") ^ 1 << bit).to_bytes(32, "big") for bit in range(256)]
    derived = {
        masks.pair_mask(each, context, context, dealers, "a", "b") for each in [*low, shared]
    }
    assert len(derived) == 257
    # SecAgg+ itself: the victim's word minus the candidate's mask is small for one of few seeds.
    # Here none of 2^12 truncated seeds explains a word.
    word = int.from_bytes(
        key_stream(masks.seed_mask(seed, context, dealers)).update(bytes(16)), "big"
    )
    for guess in range(1 << 12):
        candidate = masks.seed_mask(guess.to_bytes(32, "big"), context, dealers)
        assert int.from_bytes(key_stream(candidate).update(bytes(16)), "big") != word


def test_attack_overlapping_survivor_lists() -> None:
    """`unmask-overlap`: SecAgg+ opens both shares of whoever is named both a survivor and dead.

    Here nobody says what to open: a node computes the dead as U2 without the one list that it
    confirmed.
    """
    world = World(5)
    server = masked(world, begun(world))
    survivors = server.close_inputs()
    for name in world.names:
        server.add_confirmation(world.nodes[name].confirm(1, survivors))
    agreement = server.agreement()
    without = wire.survivors_to_bytes(world.names[1:])
    for name in world.names[1:]:
        with pytest.raises(Refused, match="second list"):
            world.nodes[name].confirm(1, without)
        world.nodes[name].open(1, agreement)
        with pytest.raises(Refused):
            world.nodes[name].confirm(1, without)
    doubled = wire.survivors_to_bytes([VICTIM, *world.names])
    other = World(5)
    masked(other, begun(other))
    with pytest.raises(Refused, match="not in order, or one twice"):
        other.nodes[VICTIM].confirm(1, doubled)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_attack_cohort_and_threshold_chosen_by_the_server(count: int) -> None:
    """`cohort-below-minimum`: with SecAgg+ the server names cohort and threshold.

    With a threshold of 1 it unmasks alone. Here t follows from |U1|, no message carries it, and a
    cohort below the node's own minimum is refused.
    """
    world = World(5, minimum=5)
    found = offers(world)
    with pytest.raises(Refused, match="expected at least 5"):
        world.nodes[VICTIM].deal(as_list(list(found.values())[:count]))
    assert [threshold(n) for n in (3, 5, 10, 20, 100)] == [3, 4, 7, 14, 67]
    fields = {name for message in wire.CLEAR_FIELDS.values() for name in message}
    assert not fields & {"threshold", "weight", "examples", "active", "dead"}


# --- U1 -------------------------------------------------------------------------------------------


def stranger(name: str = "sybil") -> tuple[Identity, KeyOffer]:
    """Somebody whom no operator approved, with keys that are in order."""
    identity = Identity.generate()
    peers = {name: Peer(name, name, identity.public)}
    node = SecureNode(identity, CohortPolicy(name, peers), FEDERATION, RUN, MemoryOutbox())
    return identity, KeyOffer.from_bytes(node.offer(epoch_of()))


def test_a_sybil_in_the_roster() -> None:
    """The coordinator makes up members, so that the sum's only honest update is the victim's."""
    world = World(5)
    found = offers(world)
    _, sybil = stranger()
    with pytest.raises(Refused, match="not approved"):
        world.nodes[VICTIM].deal(as_list([*found.values(), sybil]))


def test_a_sybil_under_a_members_name() -> None:
    """A man in the middle: a member's place with keys of the coordinator's."""
    world = World(5)
    found = offers(world)
    _, sybil = stranger(node_name(3))
    with pytest.raises(Refused, match="did not make"):
        world.nodes[VICTIM].deal(
            as_list([sybil if o.name == sybil.name else o for o in found.values()])
        )


@pytest.mark.parametrize("field", ["share_key", "mask_keys"])
def test_a_swapped_key(field: str) -> None:
    """A member's signature covers each of its keys."""
    world = World(5)
    found = offers(world)
    mine = keys.KeyPair(b"\x01" * 32).public
    offer = found[node_name(2)]
    changed = (
        replace(offer, share_key=mine)
        if field == "share_key"
        else replace(offer, mask_keys=(mine,))
    )
    with pytest.raises(Refused, match="did not make"):
        world.nodes[VICTIM].deal(
            as_list([changed if o.name == changed.name else o for o in found.values()])
        )


def test_my_own_entry_must_be_what_i_sent() -> None:
    world = World(5)
    earlier = offers(world)
    now = offers(world, number=2)
    for entry in (None, earlier[VICTIM]):
        listed = [offer for offer in now.values() if offer.name != VICTIM]
        with pytest.raises(Refused, match="another entry for this node"):
            world.nodes[VICTIM].deal(
                as_list(sorted([*listed, *([entry] if entry else [])], key=lambda o: o.name))
            )


def test_keys_of_another_epoch_or_run() -> None:
    """`msg-replayed`, `msg-wrong-run`: keys are signed for one federation, run and epoch."""
    world = World(5)
    stale = offers(world)[node_name(4)]
    now = offers(world, number=2)
    with pytest.raises(Refused, match="another federation, run or epoch"):
        world.nodes[VICTIM].deal(as_list([*list(now.values())[:4], stale]))
    for epoch in (epoch_of(3, run="sha256:other"), replace(epoch_of(3), federation="banks")):
        with pytest.raises(Refused, match="another federation or run"):
            world.nodes[VICTIM].offer(epoch)


def test_an_epoch_has_one_set_of_keys() -> None:
    """A second offer under one number would be two sets of keys for one context."""
    world = World(5)
    node = world.nodes[VICTIM]
    node.offer(epoch_of(2))
    for number in (1, 2):
        with pytest.raises(Refused, match="expected one above 2"):
            node.offer(epoch_of(number))


def test_cohort_duplicate_key() -> None:
    """`cohort-duplicate-key`, and a member who uses one mask key for two rounds of an epoch."""
    world = World(5)
    found = list(offers(world, count=2).values())
    pair = keys.KeyPair(b"\x05" * 32).public
    for changed in (
        replace(found[4], mask_keys=(pair, pair)),
        replace(found[4], mask_keys=(pair, found[3].mask_keys[1])),
        replace(found[4], share_key=found[4].mask_keys[0]),
    ):
        signature = IDENTITIES[4].sign(wire.KEYS_TAG, *changed.signed())
        with pytest.raises(Refused, match="one key twice"):
            world.nodes[VICTIM].deal(as_list([*found[:4], replace(changed, signature=signature)]))


def test_a_key_reused_over_epochs() -> None:
    """Who signs old keys for a new epoch: one s for two rounds would expose the older input."""
    world = World(5)
    first = list(offers(world).values())
    world.nodes[VICTIM].deal(as_list(first))
    second = list(offers(world, number=2).values())
    reused = replace(second[4], mask_keys=first[4].mask_keys)
    reused = replace(reused, signature=IDENTITIES[4].sign(wire.KEYS_TAG, *reused.signed()))
    with pytest.raises(Refused, match="a key of an earlier epoch in the entry of node-004"):
        world.nodes[VICTIM].deal(as_list([*second[:4], reused]))


def test_cohort_two_keys_one_organisation() -> None:
    """`cohort-two-keys-one-organisation`: a node's file names organisations, no coordinator."""
    world = World(5)
    peers = peers_of(5)
    peers[node_name(1)] = replace(peers[node_name(1)], organisation="organisation-2")
    policy = CohortPolicy(VICTIM, peers, 3, 1)
    node = SecureNode(IDENTITIES[0], policy, FEDERATION, RUN, MemoryOutbox())
    own = KeyOffer.from_bytes(node.offer(epoch_of()))
    found = offers(world)
    with pytest.raises(Refused, match="one organisation"):
        node.deal(as_list([own, *list(found.values())[1:]]))


def test_two_names_one_identity() -> None:
    world = World(5)
    peers = peers_of(5)
    peers[node_name(1)] = replace(peers[node_name(2)], name=node_name(1), organisation="other")
    node = SecureNode(
        IDENTITIES[0], CohortPolicy(VICTIM, peers, 3, 1), FEDERATION, RUN, MemoryOutbox()
    )
    own = KeyOffer.from_bytes(node.offer(epoch_of()))
    with pytest.raises(Refused, match="one identity"):
        node.deal(as_list([own, *list(offers(world).values())[1:]]))


def test_a_revoked_member() -> None:
    world = World(5)
    found = offers(world)
    remove(world.nodes[VICTIM], node_name(4))
    with pytest.raises(Refused, match="not approved"):
        world.nodes[VICTIM].deal(as_list(found.values()))


def test_a_revocation_ends_the_epoch() -> None:
    world = World(5)
    begun(world)
    remove(world.nodes[VICTIM], node_name(4))
    with pytest.raises(Refused, match="joins the next"):
        world.nodes[VICTIM].check(slot_of(), encoding_of())
    remove(world.nodes[node_name(1)], "node-777")  # of another cohort: nothing happens
    world.nodes[node_name(1)].check(slot_of(), encoding_of())


@pytest.mark.parametrize(
    "public",
    [value.to_bytes(32, "little") for value in sorted(keys.LOW_ORDER)],
    ids=lambda key: key[:2].hex(),
)
def test_key_low_order(public: bytes) -> None:
    """`key-low-order`: such a key gives a shared secret that everybody knows."""
    world = World(5)
    found = list(offers(world).values())
    for changed in (replace(found[4], share_key=public), replace(found[4], mask_keys=(public,))):
        signed = replace(changed, signature=IDENTITIES[4].sign(wire.KEYS_TAG, *changed.signed()))
        with pytest.raises(Refused, match="low order"):
            world.nodes[VICTIM].deal(as_list([*found[:4], signed]))
    with pytest.raises(Refused, match="low order"):
        keys.KeyPair(b"\x01" * 32).agree(public)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_another_number_of_mask_keys_than_the_epoch_has_attempts(count: int) -> None:
    world = World(5)
    *others, last = offers(world, count=2).values()
    fresh = tuple(keys.KeyPair.generate(os.urandom).public for _ in range(count))
    odd = replace(last, mask_keys=fresh)
    signed = replace(odd, signature=IDENTITIES[4].sign(wire.KEYS_TAG, *odd.signed()))
    with pytest.raises(BadInput, match=f"found {count} mask keys, expected 2"):
        world.nodes[VICTIM].deal(as_list([*others, signed]))


def test_an_organisation_in_another_spelling_is_the_same() -> None:
    world = World(5)
    peers = peers_of(5)
    again = replace(peers[node_name(3)], organisation="  ORGANISATION-4 ")
    world.nodes[VICTIM].adopt(
        replace(world.nodes[VICTIM].policy, peers=peers | {again.name: again})
    )
    with pytest.raises(Refused, match="two members of one organisation"):
        world.nodes[VICTIM].deal(as_list(offers(world).values()))


@pytest.mark.parametrize("changed", ["identity", "organisation"])
def test_an_epoch_ends_where_a_member_is_another_to_its_operator(changed: str) -> None:
    """A rotated key or a corrected organisation: who was checked is not who is on the roster."""
    world = World(5)
    begun(world)
    peers = peers_of(5)
    new = {"identity": IDENTITIES[77].public, "organisation": "another"}[changed]
    other = replace(peers[node_name(4)], **{changed: new})  # type: ignore[arg-type]
    node = world.nodes[VICTIM]
    node.adopt(replace(node.policy, peers=peers_of(5)))
    assert node.accepted
    node.adopt(replace(node.policy, peers=peers | {other.name: other}))
    with pytest.raises(Refused, match="it joins the next"):
        node.mask(slot_of(), world.encoding, world.values(VICTIM))


def test_another_key_may_give_the_same_secret_and_then_names_tell_them_apart() -> None:
    """u and 1/u differ by the point of order 2, which every secret multiplies away.

    A twin of a key without its secret.
    """
    one, two = keys.KeyPair.generate(os.urandom), keys.KeyPair.generate(os.urandom)
    twin = pow(int.from_bytes(two.public, "little"), -1, 2**255 - 19).to_bytes(32, "little")
    keys.check_public(twin, "twin")
    assert twin != two.public and one.agree(twin) == one.agree(two.public)
    shared, any_hash = one.agree(twin), bytes(32)
    derived = {
        masks.pair_mask(shared, any_hash, any_hash, any_hash, "a", name) for name in ("b", "twin")
    }
    derived |= {masks.sealing_key(shared, any_hash, "a", name) for name in ("b", "twin")}
    assert len(derived) == 4


def test_a_key_has_one_encoding() -> None:
    """Else `k` and `k + p` were two keys with one secret, or one of low order in disguise."""
    for value in (2**255 - 19, 2**255 - 18, 2**255, 2**256 - 1):
        with pytest.raises(Refused, match="not canonical"):
            keys.check_public(value.to_bytes(32, "little"), "key")


@pytest.mark.parametrize(
    ("members", "colluders", "fine"),
    [
        (3, 1, True),
        (3, 2, False),
        (5, 2, True),
        (5, 3, False),
        (10, 3, True),
        (10, 4, False),
        (4, 1, True),
        (4, 2, False),
        (6, 3, True),
    ],
)
def test_the_bound_on_colluders(members: int, colluders: int, fine: bool) -> None:
    """No two lists are confirmed (2t - n > c), and a sum hides somebody (t - c >= 2)."""
    world = World(members, colluders=colluders)
    found = as_list(offers(world).values())
    if fine:
        world.nodes[VICTIM].deal(found)
    else:
        with pytest.raises(Refused, match=r"colluders|collude"):
            world.nodes[VICTIM].deal(found)


def test_a_list_out_of_order_or_a_second_list() -> None:
    world = World(5)
    found = list(offers(world).values())
    for names in ([*found[1:], found[0]], [*found, found[4]]):
        with pytest.raises(Refused, match="not in order, or one twice"):
            world.nodes[VICTIM].deal(as_list(names))
    world.nodes[VICTIM].deal(as_list(found))
    with pytest.raises(Refused, match="second list"):
        world.nodes[VICTIM].deal(as_list(found[:4]))


def test_policy_min_cohort_below_3() -> None:
    """`policy-min-cohort-below-3`: two inputs and one colluder give the other one."""
    for minimum in (2, 0, -1, True, 3.0):
        with pytest.raises(BadInput, match="expected at least 3"):
            CohortPolicy(VICTIM, peers_of(5), minimum)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="max_colluders"):
        CohortPolicy(VICTIM, peers_of(5), 3, -1)
    with pytest.raises(BadInput, match="no entry for node-000 itself"):
        CohortPolicy(VICTIM, {})
    with pytest.raises(BadInput, match="another's name"):
        CohortPolicy(VICTIM, {VICTIM: peers_of(2)[node_name(1)]})


# --- U2 -------------------------------------------------------------------------------------------


def dealt(world: World) -> dict[str, Deal]:
    return deals(world, as_list(offers(world).values()))


def test_a_u2_of_one() -> None:
    """Alone in U2 a node would mask with its own seed only, and t peers would open that."""
    world = World(5)
    found = dealt(world)
    for only in ([VICTIM], world.names[:2], world.names[:3]):
        with pytest.raises(Refused, match="expected at least 4"):
            world.nodes[VICTIM].accept(delivery(found, VICTIM, world.names, only).to_bytes())
    world.nodes[VICTIM].accept(delivery(found, VICTIM, world.names, world.names[:4]).to_bytes())
    small = World(5, minimum=5)
    found = dealt(small)
    with pytest.raises(Refused, match="expected at least 5"):
        small.nodes[VICTIM].accept(delivery(found, VICTIM, small.names, small.names[:4]).to_bytes())


def test_a_dealer_who_is_no_member_or_did_not_sign() -> None:
    world = World(5)
    found = dealt(world)
    right = delivery(found, VICTIM, world.names, world.names)
    last = right.dealers[4]
    other_cohort = World(5)
    elsewhere = delivery(dealt(other_cohort), VICTIM, world.names, world.names).dealers[4]
    for changed, why in (
        (replace(last, name="sybil"), "not in the list before"),
        (replace(last, root=bytes(32)), "did not make"),
        (replace(last, seeds=bytes(32)), "did not make"),
        (elsewhere, "did not make"),  # signed for another U1
    ):
        with pytest.raises(Refused, match=why):
            world.nodes[VICTIM].accept(
                replace(right, dealers=(*right.dealers[:4], changed)).to_bytes()
            )
    own = replace(right.dealers[0], root=bytes(32))
    with pytest.raises(Refused, match="another entry for this node"):
        world.nodes[VICTIM].accept(replace(right, dealers=(own, *right.dealers[1:])).to_bytes())
    without = delivery(found, VICTIM, world.names, world.names[1:])
    with pytest.raises(Refused, match="not one of them"):
        world.nodes[VICTIM].accept(without.to_bytes())


def test_a_second_u2_and_a_u2_before_u1() -> None:
    world = World(5)
    listed = offers(world)
    with pytest.raises(Refused, match="not the next step"):
        world.nodes[VICTIM].accept(Delivery((), (), ()).to_bytes())
    found = deals(world, as_list(listed.values()))
    world.nodes[VICTIM].accept(delivery(found, VICTIM, world.names, world.names).to_bytes())
    with pytest.raises(Refused, match="not the next step"):
        world.nodes[VICTIM].accept(delivery(found, VICTIM, world.names, world.names[:4]).to_bytes())


def test_a_share_that_was_changed_on_its_way_costs_its_dealer_only() -> None:
    world = World(5)
    found = dealt(world)
    right = delivery(found, VICTIM, world.names, world.names)
    sealed = list(right.sealed)
    sealed[3] = bytes(len(sealed[3]))
    paths = list(right.paths)
    paths[2] = bytes(len(paths[2]))
    sealed[4] = right.sealed[3]  # another dealer's
    world.nodes[VICTIM].accept(replace(right, sealed=tuple(sealed), paths=tuple(paths)).to_bytes())
    assert world.nodes[VICTIM].bad_dealers == tuple(world.names[2:])


def test_a_refused_u2_leaves_no_share_behind() -> None:
    world = World(5)
    found = dealt(world)
    right = delivery(found, VICTIM, world.names, world.names)
    node = world.nodes[VICTIM]
    assert node._state is not None
    short = replace(right.dealers[-1], seeds=b"")
    short = replace(
        short, signature=IDENTITIES[4].sign(wire.SHARES_TAG, *short.signed(node._state.cohort))
    )
    with pytest.raises(BadInput, match="seed hashes of node-004"):
        node.accept(replace(right, dealers=(*right.dealers[:-1], short)).to_bytes())
    assert not node.accepted
    assert all(set(attempt.shares) == {VICTIM} for attempt in node._state.attempts.values())


# --- input ----------------------------------------------------------------------------------------


def test_one_input_for_an_attempt() -> None:
    """`msg-replayed`: another model or round: a node never makes a second input."""
    world = World(5)
    begun(world)
    node = world.nodes[VICTIM]
    first = node.mask(slot_of(), world.encoding, world.values(VICTIM))
    for slot in (slot_of(), slot_of(adapter="sha256:other"), slot_of(round_number=2)):
        with pytest.raises(Refused, match="attempt 1 is not open"):
            node.mask(slot, world.encoding, world.values(VICTIM))
    assert node.sent(1, 1) == first
    assert node.sent(1, 2) is None
    node.mask(slot_of(2, 2), world.encoding, world.values(VICTIM))
    with pytest.raises(Refused, match="attempt 3"):
        node.check(slot_of(3, 3), encoding_of())


def test_a_later_attempt_closes_the_earlier_one() -> None:
    world = World(5)
    server = masked(world, begun(world))
    survivors = server.close_inputs()
    world.nodes[VICTIM].mask(slot_of(2, 2), world.encoding, world.values(VICTIM))
    with pytest.raises(Refused, match="no input that is still open"):
        world.nodes[VICTIM].confirm(1, survivors)


def test_the_same_update_in_two_cohorts() -> None:
    """An update without noise of its own, asked for again in a cohort without one peer.

    The difference is that peer's.
    """
    world = World(5, noised=False)
    world.attempt(world.begin(epoch_of()), slot_of())
    world.begin(epoch_of(2, first=2), no_keys=[node_name(4)])
    with pytest.raises(Refused, match="the difference of two cohorts"):
        world.nodes[VICTIM].check(slot_of(attempt=2, round_number=1), encoding_of())
    world.nodes[VICTIM].check(slot_of(attempt=2, round_number=2), encoding_of())
    # with noise, sampling and a reservation of its own, each attempt is accounted for
    noised = World(5)
    noised.attempt(noised.begin(epoch_of()), slot_of())
    noised.begin(epoch_of(2, first=2), no_keys=[node_name(4)])
    noised.nodes[VICTIM].check(slot_of(attempt=2, round_number=1), encoding_of())


def test_a_restarted_node_is_a_drop_out_and_repeats_itself_only(tmp_path: Path) -> None:
    world = World(5)
    outbox = FolderOutbox(tmp_path / "outbox")
    world.nodes[VICTIM] = SecureNode(
        IDENTITIES[0], CohortPolicy(VICTIM, peers_of(5), 3, 1), FEDERATION, RUN, outbox
    )
    server = masked(world, begun(world))
    sent = outbox.get(1, 1)
    survivors = server.close_inputs()
    restarted = SecureNode(
        IDENTITIES[0],
        CohortPolicy(VICTIM, peers_of(5), 3, 1),
        FEDERATION,
        RUN,
        FolderOutbox(tmp_path / "outbox"),
    )
    for step in (
        lambda: restarted.confirm(1, survivors),
        lambda: restarted.open(1, survivors),
        lambda: restarted.check(slot_of(2, 2), encoding_of()),
    ):
        with pytest.raises(Refused, match="joins the next"):
            step()
    assert restarted.sent(1, 1) == sent
    with pytest.raises(Refused, match="used before"):
        restarted.offer(epoch_of(2, first=1))
    with pytest.raises(Refused, match="was used before"):
        outbox.put(7, 1, b"")
    restarted.offer(epoch_of(2, first=2))


def test_an_input_that_could_not_be_kept_is_never_made_again() -> None:
    world = World(5)
    begun(world)
    node, outbox = world.nodes[VICTIM], world.outboxes[VICTIM]

    def full(round_number: int, attempt: int, data: bytes) -> None:
        raise OSError("disk full")

    outbox.put = full  # type: ignore[method-assign]
    with pytest.raises(OSError, match="disk full"):
        node.mask(slot_of(), world.encoding, world.values(VICTIM))
    with pytest.raises(Refused):
        node.mask(slot_of(), world.encoding, world.values(VICTIM))
    with pytest.raises(Refused):
        node.confirm(1, wire.survivors_to_bytes(world.names))


def test_nodes_with_different_models_or_lists_give_noise() -> None:
    """Different adapters, or different U2, derive different masks.

    Nothing cancels, nobody confirms the other.
    """
    world = World(5)
    listed = begun(world)
    one, other = slot_of(), slot_of(adapter="sha256:other")
    server = ServerAttempt(listed, one, world.encoding)
    for name in world.names[:4]:
        server.add_input(world.nodes[name].mask(one, world.encoding, world.values(name)))
    answer = world.nodes[node_name(4)].mask(other, world.encoding, world.values(node_name(4)))
    with pytest.raises(Refused, match="another federation, run, round, attempt, model or cohort"):
        server.add_input(answer)
    survivors = wire.survivors_to_bytes(world.names)
    found = [
        Confirmation.from_bytes(world.nodes[name].confirm(1, survivors)) for name in world.names
    ]
    with pytest.raises(Refused, match="did not make"):
        world.nodes[VICTIM].open(1, wire.agreement_to_bytes(found))
    world.nodes[VICTIM].open(1, wire.agreement_to_bytes(found[:4]))  # t of the same mind


def test_masked_words_depend_on_context_and_lists() -> None:
    key = masks.seed_mask(b"b" * 32, b"c" * 32, b"d" * 32)
    assert key != masks.seed_mask(b"b" * 32, b"x" * 32, b"d" * 32)
    assert key != masks.seed_mask(b"b" * 32, b"c" * 32, b"x" * 32)
    pair = masks.pair_mask(b"s" * 32, b"c" * 32, b"1" * 32, b"2" * 32, "a", "b")
    assert pair == masks.pair_mask(b"s" * 32, b"c" * 32, b"1" * 32, b"2" * 32, "b", "a")
    for changed in (
        (b"x" * 32, b"1" * 32, b"2" * 32),
        (b"c" * 32, b"x" * 32, b"2" * 32),
        (b"c" * 32, b"1" * 32, b"x" * 32),
    ):
        assert pair != masks.pair_mask(b"s" * 32, *changed, "a", "b")
    assert masks.sealing_key(b"s" * 32, b"1" * 32, "a", "b") != masks.sealing_key(
        b"s" * 32, b"1" * 32, "b", "a"
    )
    world = World(3)
    epoch = epoch_of(count=2)
    contexts = {
        slot.context(epoch)
        for slot in (
            slot_of(),
            slot_of(2),
            slot_of(1, 2),
            slot_of(adapter="x"),
            replace(slot_of(), base="x"),
        )
    }
    contexts |= {
        slot_of().context(each)
        for each in (
            epoch_of(2, count=2),
            epoch_of(count=3),
            epoch_of(first=1, run="x"),
            replace(epoch, federation="x"),
        )
    }
    assert len(contexts) == 9 and ADAPTER and world.names


# --- U3 and unmasking -----------------------------------------------------------------------------


def test_two_u3_lists_to_two_halves() -> None:
    """The coordinator tells half of the nodes that the victim survived, half that it did not.

    Were both halves to open, it would hold b and s of the victim. t signatures of one list are
    needed, two sets of t share an honest node, and an honest node signs one list.
    """
    world = World(5)
    masked(world, begun(world))
    lists = [wire.survivors_to_bytes(world.names), wire.survivors_to_bytes(world.names[1:])]
    signed: list[list[Confirmation]] = [[], []]
    for number, name in enumerate(world.names):
        which = number % 2
        signed[which].append(Confirmation.from_bytes(world.nodes[name].confirm(1, lists[which])))
    everything = [*signed[0], *signed[1]]
    for name in world.names:
        for agreement in (
            *signed,
            sorted(everything, key=lambda each: each.name),
            [*signed[0], *signed[0]],
        ):
            with pytest.raises(Refused):
                world.nodes[name].open(1, wire.agreement_to_bytes(agreement))


def test_unmask_below_t() -> None:
    """`unmask-below-t`: a survivor list or an agreement below max(t, minimum cohort)."""
    world = World(5, minimum=5)
    server = masked(world, begun(world))
    for names in (world.names[:1], world.names[:3], world.names[:4]):
        with pytest.raises(Refused, match="expected at least 5"):
            world.nodes[VICTIM].confirm(1, wire.survivors_to_bytes(names))
    survivors = server.close_inputs()
    found = [
        Confirmation.from_bytes(world.nodes[name].confirm(1, survivors)) for name in world.names
    ]
    for count in (0, 1, 3):
        with pytest.raises(Refused, match="expected at least 4"):
            world.nodes[VICTIM].open(1, wire.agreement_to_bytes(found[:count]))
    world.nodes[VICTIM].open(1, wire.agreement_to_bytes(found[:4]))


def test_unmask_twice_and_unmask_unasked() -> None:
    """`unmask-twice`, and every step out of its turn."""
    world = World(5)
    server = masked(world, begun(world))
    survivors = server.close_inputs()
    node = world.nodes[VICTIM]
    with pytest.raises(Refused, match="confirmed no list"):
        node.open(1, wire.agreement_to_bytes([]))
    for name in world.names:
        server.add_confirmation(world.nodes[name].confirm(1, survivors))
    agreement = server.agreement()
    node.open(1, agreement)
    with pytest.raises(Refused, match="no input that is still open"):
        node.open(1, agreement)
    with pytest.raises(Refused, match="no input that is still open"):
        node.open(2, agreement)


def test_a_signer_twice_a_stranger_or_a_signature_for_another_list() -> None:
    world = World(5)
    server = masked(world, begun(world))
    survivors = server.close_inputs()
    found = [
        Confirmation.from_bytes(world.nodes[name].confirm(1, survivors)) for name in world.names
    ]
    flipped = bytes([found[1].signature[0] ^ 1]) + found[1].signature[1:]
    for changed, why in (
        ([*found[:3], found[0]], "one signer twice"),
        ([*found[:3], replace(found[0], name="node-077")], "not in U3"),
        ([found[0], replace(found[1], signature=flipped), *found[2:]], "did not make"),
        ([found[0], replace(found[1], signature=found[2].signature), *found[2:]], "did not make"),
    ):
        with pytest.raises(Refused, match=why):
            world.nodes[VICTIM].open(1, wire.agreement_to_bytes(changed))


def test_survivors_who_did_not_deal() -> None:
    world = World(5)
    masked_by = world.begin(epoch_of(), no_deal=[node_name(4)])
    for name in masked_by.deals:
        world.nodes[name].mask(slot_of(), world.encoding, world.values(name))
    with pytest.raises(Refused, match="not in the list before"):
        world.nodes[VICTIM].confirm(1, wire.survivors_to_bytes(world.names))
    with pytest.raises(Refused, match="not one of them"):
        small = World(6)
        masked(small, begun(small))
        small.nodes[VICTIM].confirm(1, wire.survivors_to_bytes(small.names[1:]))


def test_what_is_opened() -> None:
    """Of members of U3 the share of b, of others that of s, and each as its dealer dealt it."""
    world = World(5)
    listed = begun(world)
    server = ServerAttempt(listed, slot_of(), world.encoding)
    for name in world.names[:4]:
        server.add_input(world.nodes[name].mask(slot_of(), world.encoding, world.values(name)))
    survivors = server.close_inputs()
    for name in world.names[:4]:
        server.add_confirmation(world.nodes[name].confirm(1, survivors))
    opening = Opening.from_bytes(world.nodes[VICTIM].open(1, server.agreement()))
    shares = [
        opening.shares[at : at + shamir.BYTES] for at in range(0, len(opening.shares), shamir.BYTES)
    ]
    for name, share in zip(world.names, shares, strict=True):
        kind = "b" if name in world.names[:4] else "s"
        found = commit.share_hash(listed.cohort, name, VICTIM, 1, kind, share)
        at = 0 if kind == "b" else commit.DIGEST_BYTES
        assert listed.deals[name].hashes[at : at + commit.DIGEST_BYTES] == found


def test_secrets_are_dropped_after_opening() -> None:
    world = World(5)
    world.attempt(begun(world), slot_of())
    state = world.nodes[VICTIM]._state
    assert state is not None and list(state.attempts) == [2]


def test_masked_words_are_uniform_and_say_nothing_of_the_input() -> None:
    """Chi-squared over bytes, and no correlation with the input: 60,000 words of one node."""
    size = 60_000
    world = World(3)
    world.encoding = type(world.encoding)(size, 32, 1.0, 1 << 20)
    begun(world)
    values = world.values(VICTIM)
    message = wire.MaskedInput.from_bytes(
        world.nodes[VICTIM].mask(slot_of(), world.encoding, values)
    )
    counts = np.bincount(np.frombuffer(message.vector, np.uint8), minlength=256)
    expected = len(message.vector) / 256
    chi = float(((counts - expected) ** 2 / expected).sum())
    assert 150 < chi < 380, chi  # 255 degrees of freedom: both ends are beyond 1e-6
    words = np.frombuffer(message.vector, "<u4", count=size).astype(np.float64)
    correlation = abs(float(np.corrcoef(words, values)[0, 1]))
    assert correlation < 5.5 / np.sqrt(size), correlation
    plain = np.bincount(values.astype("<u4").view(np.uint8), minlength=256)
    assert ((plain - expected) ** 2 / expected).sum() > 1e5, "the test can't tell"
