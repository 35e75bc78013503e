"""The coordinator's half of secure aggregation: it routes, adds and unmasks, and learns the sum.

    an epoch      add_offer … -> close_offers (U1) -> add_deal … -> close_deals (U2)
                  -> delivery to each
    an attempt    add_input … -> close_inputs (U3) -> add_confirmation … -> agreement
                  -> add_opening … -> result

Inputs are added as they come and forgotten: memory is one sum, whatever the number of nodes. A
message that does not count raises BadInput or Refused and changes nothing; whoever sent it is a
drop-out. Too few at any stage is QuorumLost: nothing was unmasked. Openings are checked against
what their dealers signed: a liar is who signed the proof of it. That a share did not open is a word
against a word: more than c such words make a dealer suspected.
"""

from __future__ import annotations

from collections.abc import Mapping

from fedlora.common.errors import BadInput, QuorumLost, Refused
from fedlora.common.secagg import cohort, commit, keys, shamir, wire
from fedlora.common.secagg.wire import Deal, Dealer, Delivery, Epoch, KeyOffer
from fedlora.common.trust.identity import PublicIdentity
from fedlora.server.secagg.attempt import Listed, identity_of
from fedlora.server.secagg.log import SumLog


class ServerEpoch:
    """Keys and shares of one epoch. `identities` are the registry's, `minimum` the smallest cohort.

    `kept` knows the keys of earlier epochs: nodes refuse a list with one of them, so whoever offers
    one is left out. `colluders` are assumed at most, beside the coordinator.
    """

    def __init__(
        self,
        epoch: Epoch,
        identities: Mapping[str, PublicIdentity],
        minimum: int,
        kept: SumLog | None = None,
        colluders: int = 1,
    ) -> None:
        self._epoch, self._identities = epoch, dict(identities)
        self._minimum = max(minimum, cohort.SMALLEST_COHORT)
        self._kept, self._colluders = SumLog() if kept is None else kept, colluders
        self._offers: dict[str, KeyOffer] = {}
        self._cohort = b""
        self._deals: dict[str, Deal] = {}
        self._trees: dict[str, commit.MerkleTree] = {}
        self._dealers: tuple[Dealer, ...] = ()
        self._listed: Listed | None = None

    def add_offer(self, data: bytes) -> str:
        """Stage 1: a node's keys; returns its name."""
        if self._cohort:
            raise Refused("keys: found a late offer: U1 is fixed")
        offer = KeyOffer.from_bytes(data)
        if offer.name in self._offers:
            raise Refused(f"keys: found a second offer of {offer.name}")
        cohort.check_offer(offer, identity_of(self._identities, offer.name), self._epoch)
        cohort.check_distinct_keys([*self._offers.values(), offer])
        self._kept.check_keys(offer)
        self._offers[offer.name] = offer
        return offer.name

    def close_offers(self) -> bytes:
        """U1, for all its members.

        All who offered, less as many of the last as it takes to bear the colluders.
        """
        if self._cohort:
            raise Refused("keys: U1 is fixed already")
        if len(self._offers) < self._minimum:
            raise QuorumLost(
                f"keys: {len(self._offers)} nodes offered, expected at least {self._minimum}"
            )
        self._offers = dict(sorted(list(self._offers.items())[: self._bearing()]))
        self._kept.add_keys(self._offers.values())
        known = [self._identities[name].key for name in self._offers]
        self._cohort = cohort.cohort_digest(known, self._epoch, list(self._offers.values()))
        return wire.cohort_to_bytes([offer.to_bytes() for offer in self._offers.values()])

    @property
    def members(self) -> list[str]:
        """U1, once it is fixed."""
        return list(self._offers) if self._cohort else []

    def _bearing(self) -> int:
        """The largest cohort of those who offered that nodes accept.

        What it bears does not grow with each member.
        """
        for size in range(len(self._offers), self._minimum - 1, -1):
            if cohort.most_colluders(size) >= self._colluders:
                return size
        raise QuorumLost(
            f"keys: {len(self._offers)} nodes offered, expected a cohort of at least"
            f" {self._minimum} that bears {self._colluders} colluders"
        )

    def add_deal(self, data: bytes) -> str:
        """Stage 2: a node's sealed shares; returns its name."""
        if not self._cohort or self._listed is not None:
            raise Refused("shares: found a deal before U1 or after U2 was fixed")
        deal = Deal.from_bytes(data)
        if deal.name not in self._offers or deal.name in self._deals:
            raise Refused(f"shares: found a deal of {deal.name}, who is not in U1 or has dealt")
        members, count = len(self._offers), self._epoch.count
        if deal.cohort != self._cohort or len(deal.sealed) != members:
            raise Refused(f"shares of {deal.name}: found another U1 than the one that is fixed")
        size = 2 * commit.DIGEST_BYTES * count
        if len(deal.hashes) != members * size or len(deal.seeds) != commit.DIGEST_BYTES * count:
            raise BadInput(f"shares of {deal.name}: found {len(deal.hashes)} bytes of hashes")
        full = keys.TAG_BYTES + 2 * shamir.BYTES * count
        expected = [0 if name == deal.name else full for name in self._offers]
        if [len(part) for part in deal.sealed] != expected:
            raise BadInput(
                f"shares of {deal.name}: found sealed parts of another size than {full} bytes"
            )
        parts = [deal.hashes[at : at + size] for at in range(0, len(deal.hashes), size)]
        tree = commit.MerkleTree([commit.leaf(part) for part in parts])
        dealer = Dealer(deal.name, tree.root, deal.seeds, deal.signature)
        self._identities[deal.name].verify(
            deal.signature, wire.SHARES_TAG, *dealer.signed(self._cohort)
        )
        self._deals[deal.name], self._trees[deal.name] = deal, tree
        return deal.name

    def close_deals(self) -> Listed:
        """Fix U2."""
        if not self._cohort or self._listed is not None:
            raise Refused("shares: not the next step of this epoch")
        needed = max(cohort.threshold(len(self._offers)), self._minimum)
        if len(self._deals) < needed:
            raise QuorumLost(f"shares: {len(self._deals)} nodes dealt, expected at least {needed}")
        self._deals = dict(sorted(self._deals.items()))
        self._dealers = tuple(
            Dealer(name, self._trees[name].root, deal.seeds, deal.signature)
            for name, deal in self._deals.items()
        )
        self._listed = Listed(
            self._epoch,
            self._minimum,
            self._identities,
            self._offers,
            self._cohort,
            self._deals,
            cohort.dealers_digest(self._cohort, self._dealers),
            self._colluders,
        )
        return self._listed

    def delivery(self, name: str) -> bytes:
        """U2 and what its members sealed for `name`."""
        if self._listed is None or name not in self._deals:
            raise Refused(f"shares: nothing is to be delivered to {name}")
        place = list(self._offers).index(name)
        sealed = tuple(deal.sealed[place] for deal in self._deals.values())
        paths = tuple(self._trees[dealer].path(place) for dealer in self._deals)
        return Delivery(self._dealers, sealed, paths).to_bytes()
