"""What a node knows of its epoch: its secrets, shared out to the cohort, and shares of theirs.

For each attempt two: b, the seed of its own mask, and s, its key of the masks with each peer. A
member's share of both is sealed for that member alone, and bound by hash to what the dealer signed,
so that a lie is its dealer's (Bonawitz et al. 2017; docs/secure-aggregation.md).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from fedlora.common.errors import FedloraError
from fedlora.common.secagg import cohort, commit, keys, masks, shamir, wire
from fedlora.common.secagg.wire import Deal, Dealer, Epoch, KeyOffer
from fedlora.common.trust.identity import Identity

NEVER = b""


@dataclass(eq=False)
class Attempt:
    """The secrets of one attempt of the epoch, and how far it has come."""

    seed: bytes
    mask_key: keys.KeyPair
    # by dealer: of its b, of its s
    shares: dict[str, tuple[bytes, bytes]] = field(default_factory=dict)
    context: bytes = NEVER
    round: int = 0
    survivors: tuple[str, ...] = ()
    signed: tuple[bytes, ...] = ()  # context, H(U1), H(U2), H(U3): set when this node has confirmed


@dataclass(eq=False)
class EpochState:
    """What a node knows of its epoch."""

    epoch: Epoch
    share_key: keys.KeyPair
    offer: KeyOffer
    attempts: dict[int, Attempt]
    members: tuple[KeyOffer, ...] = ()
    cohort: bytes = NEVER  # H(U1): set when this node has dealt
    own: Dealer | None = None
    dealers: bytes = NEVER  # H(U2): set when this node has accepted
    dealer_names: tuple[str, ...] = ()
    bad_dealers: list[str] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """Of the members, in the list's order."""
        return [offer.name for offer in self.members]


def deal_shares(state: EpochState, me: str, identity: Identity, draw: shamir.RandomBytes) -> Deal:
    """Shares of every b and s of this node for each member; those for itself it keeps."""
    shares = _split(state, draw)
    hashes = [
        b"".join(
            commit.share_hash(state.cohort, me, name, number, kind, shares[number][kind][place])
            for number in state.epoch.attempts
            for kind in ("b", "s")
        )
        for place, name in enumerate(state.names)
    ]
    seeds = b"".join(
        commit.seed_hash(state.cohort, me, number, each.seed)
        for number, each in state.attempts.items()
    )
    root = commit.MerkleTree([commit.leaf(each) for each in hashes]).root
    own = Dealer(me, root, seeds, b"")
    own = replace(own, signature=identity.sign(wire.SHARES_TAG, *own.signed(state.cohort)))
    sealed = []
    for place, member in enumerate(state.members):
        pairs = [(kinds["b"][place], kinds["s"][place]) for kinds in shares.values()]
        if member.name == me:
            for attempt, pair in zip(state.attempts.values(), pairs, strict=True):
                attempt.shares[me] = pair
            sealed.append(b"")
        else:
            sealed.append(_sealed(state, me, member, b"".join(b + s for b, s in pairs)))
    state.own = own
    return Deal(me, state.cohort, tuple(sealed), b"".join(hashes), seeds, own.signature)


def take_shares(state: EpochState, me: str, dealer: Dealer, sealed: bytes, path: bytes) -> None:
    """Keep the dealer's shares; where they are not what it signed, note it: its own loss."""
    public = next(offer.share_key for offer in state.members if offer.name == dealer.name)
    key = masks.sealing_key(state.share_key.agree(public), state.cohort, dealer.name, me)
    try:
        parts = _opened(state, me, dealer, key, sealed, path)
    except FedloraError:
        state.bad_dealers.append(dealer.name)
        return
    for index, number in enumerate(state.epoch.attempts):
        state.attempts[number].shares[dealer.name] = (parts[2 * index], parts[2 * index + 1])


def _sealed(state: EpochState, me: str, member: KeyOffer, text: bytes) -> bytes:
    key = masks.sealing_key(state.share_key.agree(member.share_key), state.cohort, me, member.name)
    return keys.seal(key, text, masks.sealed_for(state.cohort, me, member.name))


def _opened(
    state: EpochState, me: str, dealer: Dealer, key: bytes, sealed: bytes, path: bytes
) -> list[bytes]:
    """For each attempt the dealer's b and s; FedloraError where they are not what it signed."""
    where = f"shares of {dealer.name}"
    text = keys.unseal(key, sealed, masks.sealed_for(state.cohort, dealer.name, me), where)
    wire.sized(text, 2 * shamir.BYTES * state.epoch.count)
    parts = [text[at : at + shamir.BYTES] for at in range(0, len(text), shamir.BYTES)]
    labels = [(number, kind) for number in state.epoch.attempts for kind in ("b", "s")]
    hashes = b"".join(
        commit.share_hash(state.cohort, dealer.name, me, number, kind, part)
        for (number, kind), part in zip(labels, parts, strict=True)
    )
    place = state.names.index(me)
    commit.check_path(dealer.root, commit.leaf(hashes), place, len(state.members), path, where)
    return parts


def _split(state: EpochState, draw: shamir.RandomBytes) -> dict[int, dict[str, list[bytes]]]:
    """By attempt and kind, the shares for every member in order."""
    members = len(state.members)
    t = cohort.threshold(members)
    result = {}
    for number, attempt in state.attempts.items():
        secrets = {"b": attempt.seed, "s": attempt.mask_key.secret}
        result[number] = {
            kind: [
                shamir.to_bytes(share)
                for share in shamir.split(int.from_bytes(secret, "big"), t, members, draw)
            ]
            for kind, secret in secrets.items()
        }
    return result
