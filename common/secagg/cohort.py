"""Whom a node counts, and the checks of every list that a coordinator names.

A peer counts after this node's own operator approved its identity; a coordinator can remove one,
never add one. With n = |U1| and t = ⌊2n/3⌋ + 1 a node goes on only where

    2t - n > c     two sets of t signers share an honest one, who signs one list only: no two lists
                   are confirmed
    t - c >= 2     a sum holds at least two honest inputs

for the c colluders that its policy assumes beside the coordinator.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedlora.common.codec.framing import digest, framed
from fedlora.common.errors import BadInput, Refused
from fedlora.common.secagg import keys, wire
from fedlora.common.secagg.wire import Confirmation, Dealer, Epoch, KeyOffer
from fedlora.common.trust.enrolment import Peer
from fedlora.common.trust.identity import PublicIdentity
from fedlora.common.trust.organisations import folded

SMALLEST_COHORT = 3
THRESHOLD_RULE = "2n/3+1"  # what a manifest has to say
DEFAULT_COHORT = 5
DEFAULT_COLLUDERS = 1


def threshold(members: int) -> int:
    """t: shares that give a secret back, and signatures that a list of survivors needs."""
    return 2 * members // 3 + 1


def borne(members: int, minimum: int = SMALLEST_COHORT) -> int:
    """Drop-outs that a round of `members` survives after U1 is fixed."""
    return max(0, members - max(threshold(members), minimum))


def most_colluders(members: int) -> int:
    """The largest c for which both conditions hold; -1 where none does."""
    t = threshold(members)
    return max(-1, min(2 * t - members - 1, t - 2))


@dataclass(frozen=True)
class CohortPolicy:
    """What one institution asks of any cohort it joins; `peers` is its own list, with itself."""

    me: str
    peers: Mapping[str, Peer]
    minimum_cohort: int = DEFAULT_COHORT
    max_colluders: int = DEFAULT_COLLUDERS

    def __post_init__(self) -> None:
        faults = []
        if type(self.minimum_cohort) is not int or self.minimum_cohort < SMALLEST_COHORT:
            faults.append(
                f"policy minimum_cohort: found {self.minimum_cohort!r}, expected at least"
                f" {SMALLEST_COHORT}"
            )
        if type(self.max_colluders) is not int or self.max_colluders < 0:
            faults.append(
                f"policy max_colluders: found {self.max_colluders!r}, expected at least 0"
            )
        if self.me not in self.peers:
            faults.append(f"policy peers: found no entry for {self.me} itself")
        if any(name != peer.name for name, peer in self.peers.items()):
            faults.append("policy peers: found an entry under another's name")
        if faults:
            raise BadInput(faults)

    def member(self, name: str) -> Peer:
        """The approved peer of that name; Refused for a stranger."""
        if name not in self.peers:
            raise Refused(f"cohort: {name} was not approved by this institution's operator")
        return self.peers[name]


def cohort_digest(
    policy_identities: Sequence[bytes], epoch: Epoch, offers: Sequence[KeyOffer]
) -> bytes:
    """H(U1): names, identities as the reader knows them, and all keys."""
    members = [
        framed("member", offer.name.encode(), identity, offer.share_key, *offer.mask_keys)
        for offer, identity in zip(offers, policy_identities, strict=True)
    ]
    return digest(wire.COHORT_TAG, epoch.digest, *members)


def dealers_digest(cohort: bytes, dealers: Sequence[Dealer]) -> bytes:
    """H(U2): the cohort, and who dealt what."""
    entries = [framed("dealer", each.name.encode(), each.root, each.seeds) for each in dealers]
    return digest(wire.DEALERS_TAG, cohort, *entries)


def survivors_digest(context: bytes, dealers: bytes, names: Sequence[str]) -> bytes:
    """H(U3)."""
    return wire.names_digest(wire.SURVIVORS_TAG, context, dealers, names=names)


def check_cohort(
    policy: CohortPolicy, epoch: Epoch, offers: Sequence[KeyOffer], own: KeyOffer
) -> bytes:
    """H(U1), once every condition on U1 holds; Refused or BadInput with the one that does not."""
    names = [offer.name for offer in offers]
    _check_order("cohort", names)
    if own not in offers:
        raise Refused("cohort: found another entry for this node than the one that it sent")
    peers = [policy.member(name) for name in names]
    organisations = [folded(peer.organisation) for peer in peers]
    if len(set(organisations)) != len(organisations):
        raise Refused("cohort: found two members of one organisation")
    if len({peer.identity for peer in peers}) != len(peers):
        raise Refused("cohort: found two members with one identity")
    if len(offers) < policy.minimum_cohort:
        raise Refused(
            f"cohort: found {len(offers)} members, expected at least {policy.minimum_cohort}"
        )
    check_colluders(len(offers), policy.max_colluders)
    for offer, peer in zip(offers, peers, strict=True):
        check_offer(offer, peer.identity, epoch)
    check_distinct_keys(offers)
    return cohort_digest([peer.identity.key for peer in peers], epoch, offers)


def check_colluders(members: int, colluders: int) -> None:
    """Refused unless both conditions on t, n and c hold."""
    t = threshold(members)
    if 2 * t - members <= colluders:
        raise Refused(
            f"cohort: {members} members with t = {t} allow two lists to {colluders} colluders, "
            f"expected at most {most_colluders(members)}"
        )
    if t - colluders < 2:
        raise Refused(
            f"cohort: {colluders} of t = {t} may collude, expected at least two honest inputs in"
            " a sum"
        )


def check_offer(offer: KeyOffer, identity: PublicIdentity, epoch: Epoch) -> None:
    """Refused or BadInput unless the keys are whole, sound, and signed for this epoch."""
    where = f"keys of {offer.name}"
    if offer.epoch != epoch.digest:
        raise Refused(f"{where}: found keys for another federation, run or epoch")
    if len(offer.mask_keys) != epoch.count:
        raise BadInput(f"{where}: found {len(offer.mask_keys)} mask keys, expected {epoch.count}")
    for public in (offer.share_key, *offer.mask_keys):
        keys.check_public(public, where)
    identity.verify(offer.signature, wire.KEYS_TAG, *offer.signed())


def check_distinct_keys(offers: Sequence[KeyOffer]) -> None:
    """Refused where a key occurs twice, with whomever and for whichever attempt."""
    public = [key for offer in offers for key in (offer.share_key, *offer.mask_keys)]
    if len(set(public)) != len(public):
        raise Refused(
            "cohort: found one key twice, expected a fresh one for each member and attempt"
        )


def check_dealers(
    policy: CohortPolicy,
    cohort: bytes,
    members: Sequence[str],
    dealers: Sequence[Dealer],
    own: Dealer,
) -> bytes:
    """H(U2), once U2 is within U1, large enough, and dealt by its members themselves."""
    names = [dealer.name for dealer in dealers]
    check_subset(policy, "dealers", names, members, len(members))
    if own not in dealers:
        raise Refused("dealers: found another entry for this node than the one that it sent")
    for dealer in dealers:
        policy.member(dealer.name).identity.verify(
            dealer.signature, wire.SHARES_TAG, *dealer.signed(cohort)
        )
    return dealers_digest(cohort, dealers)


def check_subset(
    policy: CohortPolicy, what: str, names: Sequence[str], whole: Sequence[str], members: int
) -> None:
    """Refused unless `names` are in `whole`, hold this node, and are >= max(t, minimum cohort)."""
    _check_order(what, names)
    strangers = set(names) - set(whole)
    if strangers:
        raise Refused(f"{what}: found {min(strangers)}, who is not in the list before")
    if policy.me not in names:
        raise Refused(f"{what}: this node is not one of them")
    needed = max(threshold(members), policy.minimum_cohort)
    if len(names) < needed:
        raise Refused(f"{what}: found {len(names)}, expected at least {needed}")


def check_agreement(
    policy: CohortPolicy,
    confirmations: Sequence[Confirmation],
    survivors: Sequence[str],
    members: int,
    signed: Sequence[bytes],
) -> None:
    """Refused unless at least t distinct members of U3 signed exactly these lists."""
    names = [each.name for each in confirmations]
    if len(set(names)) != len(names):
        raise Refused("agreement: found one signer twice")
    if not set(names) <= set(survivors):
        raise Refused("agreement: found a signer who is not in U3")
    if len(names) < threshold(members):
        raise Refused(
            f"agreement: found {len(names)} signatures, expected at least {threshold(members)}"
        )
    for each in confirmations:
        policy.member(each.name).identity.verify(each.signature, wire.CONFIRM_TAG, *signed)


def _check_order(what: str, names: Sequence[str]) -> None:
    if list(names) != sorted(set(names)):
        raise Refused(f"{what}: found names that are not in order, or one twice")
