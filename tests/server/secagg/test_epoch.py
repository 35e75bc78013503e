"""The coordinator's half: exact sums, drop-outs at every stage, liars by name, none below t."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedlora.common.errors import BadInput, FedloraError, QuorumLost, Refused
from fedlora.common.secagg import commit, keys, shamir, wire
from fedlora.common.secagg.cohort import borne, threshold
from fedlora.common.secagg.wire import Deal, MaskedInput, Opening
from fedlora.server.secagg.attempt import Listed, ServerAttempt
from fedlora.server.secagg.epoch import ServerEpoch
from fedlora.server.secagg.log import KEYS, SumLog
from tests.secure_world import (
    IDENTITIES,
    World,
    encoding_of,
    epoch_of,
    node_name,
    peers_of,
    slot_of,
)

STAGES = ("no_deal", "no_input", "no_confirmation", "no_opening")
FEW = [(n, stage, drops) for n in (3, 5, 10) for stage in STAGES for drops in range(borne(n) + 1)]


def exact(world: World, stage: str, drops: int, epochs: int = 1) -> None:
    out = {stage: world.names[1 : 1 + drops]}
    at_start = {key: value for key, value in out.items() if key == "no_deal"}
    later = {key: value for key, value in out.items() if key != "no_deal"}
    listed = world.begin(epoch_of(count=epochs), **at_start)
    for number in range(1, epochs + 1):
        result = world.attempt(listed, slot_of(number, number), **later)
        gone = out[stage] if stage in ("no_deal", "no_input") else []
        assert result.members == tuple(name for name in world.names if name not in gone)
        assert (result.levels == world.plain_sum(result.members)).all()
        assert result.dropped == (tuple(gone) if stage == "no_input" else ())
        assert (result.cohort, result.threshold, result.liars) == (
            world.count,
            threshold(world.count),
            (),
        )


@pytest.mark.parametrize(("count", "stage", "drops"), FEW)
def test_the_sum_is_exact_with_drop_outs_at_every_stage(count: int, stage: str, drops: int) -> None:
    exact(World(count), stage, drops, epochs=2)


def test_the_sum_of_a_hundred_is_exact() -> None:
    """n - t = 33 drop-outs over all stages; `make chaos` tests each number at each stage."""
    world = World(100)
    names = world.names
    listed = world.begin(epoch_of(), no_deal=names[:11])
    out = {"no_input": names[11:22], "no_confirmation": names[22:28], "no_opening": names[28:33]}
    result = world.attempt(listed, slot_of(), **out)
    assert result.members == tuple(names[22:])
    assert (result.levels == world.plain_sum(result.members)).all()


@pytest.mark.chaos
@pytest.mark.parametrize("stage", STAGES[1:])
def test_the_sum_of_a_hundred_is_exact_for_every_number_of_drop_outs(stage: str) -> None:
    """An epoch of 35 attempts: 0 … 33 drop-outs, and one too many."""
    world = World(100, encoding=encoding_of(size=64))
    listed = world.begin(epoch_of(count=35))
    for drops in range(34):
        slot, out = slot_of(drops + 1, drops + 1), world.names[:drops]
        result = world.attempt(listed, slot, **{stage: out})
        assert result.members == tuple(world.names[drops if stage == "no_input" else 0 :])
        assert (result.levels == world.plain_sum(result.members)).all()
    with pytest.raises(QuorumLost):
        world.attempt(listed, slot_of(35, 35), **{stage: world.names[:34]})


@pytest.mark.chaos
@pytest.mark.parametrize("drops", range(34))
def test_a_hundred_of_whom_some_do_not_deal(drops: int) -> None:
    exact(World(100, encoding=encoding_of(size=64)), "no_deal", drops)


@pytest.mark.parametrize("bits", [32, 64])
def test_drop_outs_at_several_stages_and_both_rings(bits: int) -> None:
    encoding = replace(encoding_of(size=33), bits=bits)
    world = World(10, encoding=encoding)
    listed = world.begin(epoch_of(), no_deal=[node_name(0)])
    result = world.attempt(listed, slot_of(), no_input=[node_name(9)], no_opening=[node_name(4)])
    assert (result.levels == world.plain_sum(world.names[1:9])).all()


def test_losses_before_u1_shrink_the_cohort() -> None:
    world = World(10)
    listed = world.begin(epoch_of(), no_keys=world.names[:4])
    assert len(listed.offers) == 6
    assert (world.attempt(listed, slot_of()).levels == world.plain_sum(world.names[4:])).all()


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("count", [3, 5, 10])
def test_one_drop_out_too_many_aborts(count: int, stage: str) -> None:
    """n - t + 1: QuorumLost, whatever the stage, and the sum is still under masks."""
    world = World(count)
    with pytest.raises(QuorumLost):
        exact(world, stage, borne(count) + 1)


def test_too_few_keys() -> None:
    with pytest.raises(QuorumLost, match="expected at least 5"):
        World(5, minimum=5).begin(epoch_of(), no_keys=[node_name(0)])


@pytest.mark.parametrize(("here", "members"), [(8, 8), (7, 6), (6, 6)])
def test_a_cohort_of_a_size_that_bears_less_goes_on_with_one_less(here: int, members: int) -> None:
    """Six bear three colluders, seven two, eight three.

    Nodes that assume three refuse a cohort of seven.
    """
    world = World(8, 6, 3, assumed=3)
    listed = world.begin(epoch_of(), no_keys=world.names[here:])
    assert list(listed.offers) == world.names[:members]
    assert (world.attempt(listed, slot_of()).levels == world.plain_sum(world.names[:members])).all()


def test_the_last_to_offer_is_left_out_and_below_the_minimum_nobody_is() -> None:
    identities = {name: peer.identity for name, peer in peers_of(7).items()}
    for minimum in (6, 7):
        world, server = World(7), ServerEpoch(epoch_of(), identities, minimum, colluders=3)
        for name in reversed(world.names):
            server.add_offer(world.nodes[name].offer(epoch_of()))
        assert server.members == []
        if minimum == 6:
            server.close_offers()
            assert server.members == world.names[1:]
        else:
            with pytest.raises(
                QuorumLost, match="7 nodes offered, expected a cohort of at least 7 that bears 3"
            ):
                server.close_offers()


def test_an_abort_reveals_nothing() -> None:
    """t - 1 openings determine no secret; what the coordinator holds is uniform words.

    For the b of any survivor: t - 1 shares fit every secret. The masked sum passes a chi-squared
    test.
    """
    world = World(5, encoding=encoding_of(size=20_000))
    listed = world.begin(epoch_of())
    server = ServerAttempt(listed, slot_of(), world.encoding)
    for name in world.names:
        server.add_input(world.nodes[name].mask(slot_of(), world.encoding, world.values(name)))
    survivors = server.close_inputs()
    for name in world.names:
        server.add_confirmation(world.nodes[name].confirm(1, survivors))
    agreement = server.agreement()
    opened = [world.nodes[name].open(1, agreement) for name in world.names[: threshold(5) - 1]]
    for opening in opened:
        server.add_opening(opening)
    with pytest.raises(QuorumLost, match="3 shares of node-000 were opened, expected 4"):
        server.result()
    words = np.frombuffer(server._sum.body.tobytes(), np.uint8)
    counts = np.bincount(words, minlength=256)
    chi = float(((counts - len(words) / 256) ** 2 / (len(words) / 256)).sum())
    assert 150 < chi < 380, chi
    first = [shamir.from_bytes(Opening.from_bytes(each).shares[:32], "share") for each in opened]
    weights = shamir.weights_at_zero([1, 2, 3, 4])
    for secret in (0, 1, shamir.P - 1):  # a fourth share exists for each of them
        known = sum(w * s for w, s in zip(weights, first, strict=False))
        fourth = (secret - known) * pow(weights[3], -1, shamir.P) % shamir.P
        assert shamir.combine(weights, [*first, fourth]) == secret


def test_a_wrong_u2_secret_gives_noise_not_a_sum() -> None:
    """The linear check sees a sum that is still masked."""
    world = World(3)
    listed = world.begin(epoch_of())
    server = ServerAttempt(listed, slot_of(), world.encoding)
    for name in world.names:
        server.add_input(world.nodes[name].mask(slot_of(), world.encoding, world.values(name)))
    with pytest.raises(BadInput, match="sum check"):
        server._sum.check(3, bytes(32))


# --- messages that do not count -------------------------------------------------------------------


def opened(
    world: World, listed: Listed, no_input: tuple[str, ...] = ()
) -> tuple[ServerAttempt, dict[str, bytes]]:
    server = ServerAttempt(listed, slot_of(), world.encoding)
    here = [name for name in listed.deals if name not in no_input]
    for name in here:
        server.add_input(world.nodes[name].mask(slot_of(), world.encoding, world.values(name)))
    survivors = server.close_inputs()
    for name in here:
        server.add_confirmation(world.nodes[name].confirm(1, survivors))
    agreement = server.agreement()
    return server, {name: world.nodes[name].open(1, agreement) for name in here}


@pytest.mark.parametrize("dropped", [False, True])
def test_share_corrupt(dropped: bool) -> None:
    """`share-corrupt`: a liar's share is rejected, it is named, the sum is the same."""
    world = World(5)
    gone = (node_name(4),) if dropped else ()
    world_server, messages = opened(world, world.begin(epoch_of()), gone)
    liar = node_name(2)
    message = Opening.from_bytes(messages[liar])
    wrong = replace(message, shares=message.shares[:-32] + shamir.to_bytes(99))
    signed = wrong.signed(slot_of().context(epoch_of()), world_server._signed[-1])
    forged = replace(wrong, signature=IDENTITIES[2].sign(wire.OPENING_TAG, *signed))
    with pytest.raises(
        Refused, match="opening of node-002: found a share that node-004 did not deal"
    ):
        world_server.add_opening(forged.to_bytes())
    for name, each in messages.items():
        if name != liar:
            world_server.add_opening(each)
    if dropped:  # three openings are left of four: too few, and still nobody's update
        with pytest.raises(QuorumLost):
            world_server.result()
    else:
        result = world_server.result()
        assert (result.levels == world.plain_sum(world.names)).all()
    assert world_server.liars == (liar,)


def with_a_dealer(
    world: World, liar: str, of: Callable[[Deal, str], Deal]
) -> tuple[Listed, ServerEpoch]:
    """An epoch in which one deal is another than an honest node's."""
    epoch = epoch_of()
    server = world.server_epoch(epoch)
    for name in world.names:
        server.add_offer(world.nodes[name].offer(epoch))
    members = server.close_offers()
    for name in world.names:
        deal = Deal.from_bytes(world.nodes[name].deal(members))
        server.add_deal((of(deal, name) if name == liar else deal).to_bytes())
    listed = server.close_deals()
    for name in listed.deals:
        world.nodes[name].accept(server.delivery(name))
    return listed, server


def test_a_dealer_that_seals_garbage_for_many_is_suspected() -> None:
    """More nodes without a share of it than may have conspired; but what they say is no proof."""
    world, liar = World(5), node_name(2)

    def garbage(deal: Deal, name: str) -> Deal:
        return replace(deal, sealed=tuple(bytes(len(part)) for part in deal.sealed))

    listed, _ = with_a_dealer(world, liar, garbage)
    assert all(node.bad_dealers == (liar,) for name, node in world.nodes.items() if name != liar)
    server, messages = opened(world, listed)
    for each in messages.values():
        server.add_opening(each)
    with pytest.raises(
        QuorumLost, match="1 shares of node-002 were opened, expected 4; node-000, node-001, node-"
    ):
        server.result()
    assert server.liars == ()
    assert dict(server.suspected) == {liar: tuple(name for name in world.names if name != liar)}


@pytest.mark.parametrize("against", [1, 2])
def test_nobody_is_called_a_liar_on_the_word_of_others(against: int) -> None:
    """An honest dealer, of whom some say that its share does not open.

    With one (c) the sum goes on without it.
    """
    world, dealer = World(5), node_name(0)
    server, messages = opened(world, world.begin(epoch_of()))
    for number, data in enumerate(messages.values()):
        message = Opening.from_bytes(data)
        if number >= 5 - against:
            data = reopened(server, replace(message, shares=wire.NO_SHARE + message.shares[32:]))
        server.add_opening(data)
    if against == 1:
        assert (
            server.result().levels == world.plain_sum(world.names)
        ).all() and not server.suspected
    else:
        with pytest.raises(QuorumLost, match="; node-003, node-004 say that theirs do not open"):
            server.result()
        assert dict(server.suspected) == {dealer: (node_name(3), node_name(4))}
    assert server.liars == ()


def reopened(server: ServerAttempt, message: Opening) -> bytes:
    """Signed anew by its sender."""
    signed = message.signed(server._context, server._signed[-1])
    signature = IDENTITIES[int(message.name[-3:])].sign(wire.OPENING_TAG, *signed)
    return replace(message, signature=signature).to_bytes()


def test_c_words_and_too_few_openings_suspect_nobody() -> None:
    """One did not open and one (c) says "none".

    Fewer than t shares, and no more words than may conspire.
    """
    world = World(5)
    server, messages = opened(world, world.begin(epoch_of()))
    message = Opening.from_bytes(messages[node_name(3)])
    server.add_opening(
        reopened(server, replace(message, shares=wire.NO_SHARE + message.shares[32:]))
    )
    for name in world.names[:3]:
        server.add_opening(messages[name])
    with pytest.raises(
        QuorumLost, match="3 shares of node-000 were opened, expected 4; node-003 say"
    ):
        server.result()
    assert not server.suspected and not server.liars


def test_openings_that_do_not_count() -> None:
    """Not in U3, twice, unsigned, changed on the way, of another length: nothing changes."""
    world = World(5)
    listed = world.begin(epoch_of())
    late = world.nodes[node_name(4)]
    late.mask(slot_of(), world.encoding, world.values(node_name(4)))  # on its way, and too late
    server, messages = opened(world, listed, (node_name(4),))
    message = Opening.from_bytes(messages[node_name(0)])
    outside = reopened(server, replace(message, name=node_name(4)))
    short, long = (
        reopened(server, replace(message, shares=each))
        for each in (message.shares[:-32], message.shares + bytes(32))
    )
    for data, kind, why in (
        (outside, Refused, "who is not in U3"),
        (replace(message, signature=bytes(64)).to_bytes(), Refused, "did not make"),
        (
            replace(message, shares=wire.NO_SHARE + message.shares[32:]).to_bytes(),
            Refused,
            "did not make",
        ),
        (short, BadInput, "found a field of 128 bytes, expected 160"),
        (long, BadInput, "found a field of 192 bytes, expected 160"),
    ):
        with pytest.raises(kind, match=why):
            server.add_opening(data)
    assert not server._openers and not any(server._shares.values()) and not server.liars
    server.add_opening(messages[node_name(0)])
    nothing = reopened(server, replace(message, shares=wire.NO_SHARE * 5))
    for again in (messages[node_name(0)], nothing):
        with pytest.raises(Refused, match="or has opened"):
            server.add_opening(again)
    for name in world.names[1:4]:
        server.add_opening(messages[name])
    assert (server.result().levels == world.plain_sum(world.names[:4])).all()


def test_confirmations_that_do_not_count() -> None:
    world = World(5)
    server = ServerAttempt(world.begin(epoch_of()), slot_of(), world.encoding)
    for name in world.names:
        server.add_input(world.nodes[name].mask(slot_of(), world.encoding, world.values(name)))
    survivors = server.close_inputs()
    first, second = (
        wire.Confirmation.from_bytes(world.nodes[name].confirm(1, survivors))
        for name in world.names[:2]
    )
    for changed in (
        replace(first, signature=bytes(64)),
        replace(first, signature=second.signature),
    ):
        with pytest.raises(Refused, match="did not make"):
            server.add_confirmation(changed.to_bytes())
    server.add_confirmation(first.to_bytes())
    with pytest.raises(Refused, match="or has signed"):
        server.add_confirmation(first.to_bytes())


def test_a_rebuilt_mask_key_is_held_against_the_public_one() -> None:
    """A dealer that shares another s than the one it offered, and drops out.

    Named, and nothing is unmasked with it.
    """
    world, liar = World(5), node_name(4)
    epoch = epoch_of()
    server = world.server_epoch(epoch)
    for name in world.names:
        server.add_offer(world.nodes[name].offer(epoch))
    members = server.close_offers()
    state = world.nodes[liar]._state
    assert state is not None
    state.attempts[1].mask_key = keys.KeyPair.generate(os.urandom)
    for name in world.names:
        server.add_deal(world.nodes[name].deal(members))
    listed = server.close_deals()
    for name in listed.deals:
        world.nodes[name].accept(server.delivery(name))
    attempt, messages = opened(world, listed, (liar,))
    for data in messages.values():
        attempt.add_opening(data)
    with pytest.raises(BadInput, match="shares of node-004 do not rebuild"):
        attempt.result()
    assert attempt.liars == (liar,)


def test_of_a_liars_opening_no_share_is_kept() -> None:
    world = World(5)
    server, messages = opened(world, world.begin(epoch_of()))
    message = Opening.from_bytes(messages[node_name(2)])
    with pytest.raises(Refused, match="found a share that node-004 did not deal"):
        server.add_opening(
            reopened(server, replace(message, shares=message.shares[:-32] + shamir.to_bytes(99)))
        )
    assert not any(server._shares.values()) and not server._openers


def test_one_node_without_a_share_accuses_nobody() -> None:
    """As many as may conspire can't have a dealer left out; and the sum does without that share."""
    world, dealer = World(5), node_name(2)

    def garbage(deal: Deal, name: str) -> Deal:
        return replace(deal, sealed=(bytes(len(deal.sealed[0])), *deal.sealed[1:]))

    listed, _ = with_a_dealer(world, dealer, garbage)
    server, messages = opened(world, listed)
    for each in messages.values():
        server.add_opening(each)
    assert (server.result().levels == world.plain_sum(world.names)).all() and server.liars == ()
    with pytest.raises(Refused, match="not the next step"):
        server.result()  # the masks are off already


def test_sealed_parts_of_another_size_are_no_deal() -> None:
    """They would fill the coordinator's memory, and a delivery that the receiver refuses."""

    def long(deal: Deal, name: str) -> Deal:
        return replace(deal, sealed=(deal.sealed[0] + bytes(1), *deal.sealed[1:]))

    def own(deal: Deal, name: str) -> Deal:
        return replace(deal, sealed=tuple(part or bytes(80) for part in deal.sealed))

    for of in (long, own):
        with pytest.raises(BadInput, match="sealed parts of another size than 80 bytes"):
            with_a_dealer(World(5), node_name(2), of)


def test_a_sum_that_would_not_count_is_not_unmasked() -> None:
    world = World(5)
    listed = world.begin(epoch_of())
    server = ServerAttempt(listed, slot_of(), world.encoding, needed=5)
    for name in world.names[:4]:  # t is 4
        server.add_input(world.nodes[name].mask(slot_of(), world.encoding, world.values(name)))
    with pytest.raises(QuorumLost, match="4 nodes answered, expected at least 5"):
        server.close_inputs()


def test_a_dealer_whose_shares_do_not_rebuild_is_named() -> None:
    """Shares of two polynomials, properly signed.

    The seed they give is not the one that was committed to.
    """
    world = World(3)
    epoch = epoch_of()
    server = world.server_epoch(epoch)
    for name in world.names:
        server.add_offer(world.nodes[name].offer(epoch))
    members = server.close_offers()
    liar = node_name(1)
    state = world.nodes[liar]._state
    assert state is not None
    for name in world.names:
        if name != liar:
            server.add_deal(world.nodes[name].deal(members))
    honest = state.attempts[1].seed
    state.attempts[1].seed = shamir.to_bytes(5)
    deal = Deal.from_bytes(world.nodes[liar].deal(members))
    seeds = commit.seed_hash(state.cohort, liar, 1, honest)
    assert state.own is not None
    own = replace(state.own, seeds=seeds)
    own = replace(own, signature=IDENTITIES[1].sign(wire.SHARES_TAG, *own.signed(state.cohort)))
    state.own = own
    server.add_deal(replace(deal, seeds=seeds, signature=own.signature).to_bytes())
    listed = server.close_deals()
    for name in world.names:
        world.nodes[name].accept(server.delivery(name))
    attempt, messages = opened(world, listed)
    for message in messages.values():
        attempt.add_opening(message)
    with pytest.raises(BadInput, match="shares of node-001 do not rebuild"):
        attempt.result()
    assert attempt.liars == (liar,)


def test_inputs_that_do_not_count() -> None:
    """`vec-short`, `vec-long`, `late-input`, `msg-signature-flipped`, sent twice, and others.

    `msg-wrong-round` and `msg-wrong-sender`.
    """
    world = World(5)
    listed = world.begin(epoch_of(count=2))
    server = ServerAttempt(listed, slot_of(), world.encoding)
    sent = {n: world.nodes[n].mask(slot_of(), world.encoding, world.values(n)) for n in world.names}
    message = MaskedInput.from_bytes(sent[node_name(0)])
    vector = bytes(message.vector)
    for changed, kind, why in (
        (replace(message, vector=vector[:-1]), BadInput, "expected 80"),
        (replace(message, vector=vector + b"\0"), BadInput, "expected 80"),
        (replace(message, vector=bytes(len(vector))), Refused, "did not make"),
        (replace(message, signature=bytes(64)), Refused, "did not make"),
        (replace(message, name=node_name(1)), Refused, "did not make"),
        (replace(message, name="stranger"), Refused, "not in U2"),
        (replace(message, context=bytes(32)), Refused, "another federation, run, round"),
        (replace(message, dealers=bytes(32)), Refused, "another federation, run, round"),
    ):
        with pytest.raises(kind, match=why):
            server.add_input(changed.to_bytes())
    for name in world.names[:4]:
        server.add_input(sent[name])
    with pytest.raises(Refused, match="a second one"):
        server.add_input(sent[node_name(0)])
    server.close_inputs()
    with pytest.raises(Refused, match="too late"):
        server.add_input(sent[node_name(4)])
    with pytest.raises(BadInput):
        server.add_input(b"noise")


def test_steps_out_of_their_turn() -> None:
    world = World(4)
    epoch = epoch_of()
    server = world.server_epoch(epoch)
    unknown = world.nodes[node_name(3)].offer(epoch)
    world.count = 3
    found = {name: world.nodes[name].offer(epoch) for name in world.names}
    for step in (
        server.close_deals,
        lambda: server.add_deal(b""),
        lambda: server.delivery(node_name(0)),
    ):
        with pytest.raises(Refused):
            step()
    for offer in found.values():
        server.add_offer(offer)
    with pytest.raises(Refused, match="second offer"):
        server.add_offer(found[node_name(0)])
    members = server.close_offers()
    for late in (lambda: server.add_offer(unknown), server.close_offers):
        with pytest.raises(Refused, match=r"late offer|fixed already"):
            late()
    dealt = {name: world.nodes[name].deal(members) for name in world.names}
    right = Deal.from_bytes(dealt[node_name(0)])
    for changed, why in (
        (replace(right, cohort=bytes(32)), "another U1"),
        (replace(right, sealed=right.sealed[:2]), "another U1"),
        (replace(right, name="stranger"), "not in U1"),
        (replace(right, hashes=right.hashes[:-32] + bytes(32)), "did not make"),
        (replace(right, hashes=right.hashes[:-32]), "bytes of hashes"),
        (replace(right, seeds=bytes(32)), "did not make"),
    ):
        with pytest.raises(FedloraError, match=why):
            server.add_deal(changed.to_bytes())
    server.add_deal(dealt[node_name(0)])
    with pytest.raises(Refused, match="or has dealt"):
        server.add_deal(dealt[node_name(0)])
    for name in world.names[1:]:
        server.add_deal(dealt[name])
    listed = server.close_deals()
    for again in (lambda: server.add_deal(dealt[node_name(0)]), server.close_deals):
        with pytest.raises(Refused):
            again()
    with pytest.raises(Refused, match="not one of its epoch"):
        ServerAttempt(listed, slot_of(2), world.encoding)
    attempt = ServerAttempt(listed, slot_of(), world.encoding)
    for early in (attempt.agreement, attempt.result):
        with pytest.raises(Refused, match="not the next step"):
            early()


def signed(offer: wire.KeyOffer, number: int, **changes: Any) -> wire.KeyOffer:
    changed = replace(offer, **changes)
    return replace(changed, signature=IDENTITIES[number].sign(wire.KEYS_TAG, *changed.signed()))


def offers_in(
    world: World, epoch: wire.Epoch, seen: SumLog
) -> tuple[ServerEpoch, list[wire.KeyOffer]]:
    """An epoch at the coordinator, and what each node offers for it."""
    server = ServerEpoch(
        epoch, {name: peer.identity for name, peer in peers_of(world.count).items()}, 3, seen
    )
    return server, [
        wire.KeyOffer.from_bytes(world.nodes[name].offer(epoch)) for name in world.names
    ]


@pytest.mark.parametrize("owner", [3, 0])
def test_whoever_signs_an_old_key_is_left_out_and_named(owner: int, tmp_path: Path) -> None:
    """Else one member could make all nodes refuse every list.

    Also where a coordinator, started again, sees it first.
    """
    world = World(4)
    server, first = offers_in(world, epoch_of(), SumLog(tmp_path))
    for offer in first:
        server.add_offer(offer.to_bytes())
    server.close_offers()
    seen = SumLog(tmp_path)
    server, second = offers_in(world, epoch_of(2), seen)
    for stale in (
        signed(second[3], 3, mask_keys=first[owner].mask_keys),
        signed(second[3], 3, share_key=first[owner].mask_keys[0]),
    ):
        with pytest.raises(
            Refused, match=f"keys of node-003: .* node-00{owner} signed for an earlier epoch"
        ):
            server.add_offer(stale.to_bytes())
    assert seen.liars == {node_name(3)} == SumLog(tmp_path).liars
    for offer in second:
        server.add_offer(offer.to_bytes())
    assert (tmp_path / KEYS).read_text().count("liar") == 1


def test_an_offer_that_is_brought_twice_is_no_lie(tmp_path: Path) -> None:
    """A restored coordinator asks for an epoch again, and is brought what was offered then."""
    world, seen = World(4), SumLog(tmp_path)
    server, first = offers_in(world, epoch_of(), seen)
    for offer in first:
        server.add_offer(offer.to_bytes())
    server.close_offers()
    again = ServerEpoch(
        epoch_of(), {name: peer.identity for name, peer in peers_of(4).items()}, 3, seen
    )
    with pytest.raises(Refused, match="expected fresh ones"):
        again.add_offer(first[3].to_bytes())
    assert not seen.liars and not SumLog(tmp_path).liars


def test_keys_are_on_disk_before_a_list_of_them_leaves(tmp_path: Path) -> None:
    """And a line that a kill cut short is of a list that no node has seen."""
    world, seen = World(4), SumLog(tmp_path / "gone")
    server, first = offers_in(world, epoch_of(), seen)
    for offer in first:
        server.add_offer(offer.to_bytes())
    with pytest.raises(FileNotFoundError):
        server.close_offers()
    assert server.members == []
    (tmp_path / KEYS).write_text('{"epoch": "00", "ke')
    server, second = offers_in(world, epoch_of(2), SumLog(tmp_path))
    for offer in second:
        server.add_offer(offer.to_bytes())
    server.close_offers()
    server, third = offers_in(world, epoch_of(3), SumLog(tmp_path))
    with pytest.raises(Refused, match="node-001 signed for an earlier epoch"):
        server.add_offer(signed(third[1], 1, share_key=second[1].share_key).to_bytes())


def test_a_stranger_and_bad_keys_at_the_coordinator() -> None:
    world = World(4)
    server = World(3).server_epoch(epoch_of())
    with pytest.raises(Refused, match="not a member"):
        server.add_offer(world.nodes[node_name(3)].offer(epoch_of()))
    offer = wire.KeyOffer.from_bytes(world.nodes[node_name(0)].offer(epoch_of()))
    low = replace(offer, share_key=bytes(32))
    with pytest.raises(Refused, match="low order"):
        server.add_offer(
            replace(low, signature=IDENTITIES[0].sign(wire.KEYS_TAG, *low.signed())).to_bytes()
        )
    assert keys.LOW_ORDER


# --- what the coordinator sees --------------------------------------------------------------------


def test_a_transcript_holds_allow_listed_fields_only() -> None:
    """Every byte that leaves a node is a field of a message, and every field is on the list."""
    classes: dict[str, Any] = {
        each.__name__: each
        for each in (wire.KeyOffer, Deal, MaskedInput, wire.Confirmation, Opening)
    }
    assert set(classes) == set(wire.CLEAR_FIELDS)
    for name, each in classes.items():
        assert [field.name for field in fields(each)] == list(wire.CLEAR_FIELDS[name])
    world = World(4)
    transcript: list[tuple[str, bytes]] = []
    server = world.server_epoch(epoch_of())
    for name in world.names:
        transcript.append(("KeyOffer", world.nodes[name].offer(epoch_of())))
        server.add_offer(transcript[-1][1])
    members = server.close_offers()
    for name in world.names:
        transcript.append(("Deal", world.nodes[name].deal(members)))
        server.add_deal(transcript[-1][1])
    listed = server.close_deals()
    for name in world.names:
        world.nodes[name].accept(server.delivery(name))
    attempt = ServerAttempt(listed, slot_of(), world.encoding)
    for name in world.names:
        transcript.append(
            ("MaskedInput", world.nodes[name].mask(slot_of(), world.encoding, world.values(name)))
        )
        attempt.add_input(transcript[-1][1])
    survivors = attempt.close_inputs()
    for name in world.names:
        transcript.append(("Confirmation", world.nodes[name].confirm(1, survivors)))
        attempt.add_confirmation(transcript[-1][1])
    agreement = attempt.agreement()
    for name in world.names:
        transcript.append(("Opening", world.nodes[name].open(1, agreement)))
    for kind, data in transcript:
        assert classes[kind].from_bytes(data).to_bytes() == data
    plain = [world.values(name).astype(world.encoding.dtype).tobytes() for name in world.names]
    assert not any(each[:16] in data for each in plain for _, data in transcript)
