"""The coordinator's half of secure aggregation: it routes, adds and unmasks, and learns the sum.

    an epoch      add_offer … -> close_offers (U1) -> add_deal … -> close_deals (U2) -> delivery to each
    an attempt    add_input … -> close_inputs (U3) -> add_confirmation … -> agreement -> add_opening … -> result

Inputs are added as they come and forgotten: memory is one sum, whatever the number of nodes. A message that does
not count raises BadInput or Refused and changes nothing; whoever sent it is a drop-out. Too few at any stage is
QuorumLost: nothing was unmasked. Openings are checked against what their dealers signed: a liar is who signed the
proof of it. That a share did not open is a word against a word: more than c such words make a dealer suspected.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fedlora.common.errors import BadInput, QuorumLost, Refused
from fedlora.common.identity import PublicIdentity
from fedlora.common.secagg import cohort, commit, keys, masks, shamir, wire
from fedlora.common.secagg.ring import Encoding, Ints, Masked
from fedlora.common.secagg.wire import (
    NO_SHARE,
    Confirmation,
    Deal,
    Dealer,
    Delivery,
    Epoch,
    KeyOffer,
    MaskedInput,
    Opening,
    Slot,
)
from fedlora.server.seen_keys import SeenKeys


@dataclass(frozen=True)
class Listed:
    """What the coordinator knows of an epoch once U2 is fixed."""

    epoch: Epoch
    minimum: int
    identities: Mapping[str, PublicIdentity]
    offers: Mapping[str, KeyOffer]  # U1, in order
    cohort: bytes
    deals: Mapping[str, Deal]  # U2, in order
    dealers: bytes
    colluders: int  # assumed, beside the coordinator

    @property
    def names(self) -> list[str]:
        return list(self.offers)

    @property
    def threshold(self) -> int:
        return cohort.threshold(len(self.offers))


@dataclass(frozen=True, eq=False)
class SecureSum:
    """The sum of one attempt: levels of `members` inputs, who dropped out after dealing, and who lied."""

    levels: Ints
    members: tuple[str, ...]
    dropped: tuple[str, ...]
    liars: tuple[str, ...]
    threshold: int
    cohort: int  # |U1|


class ServerEpoch:
    """Keys and shares of one epoch. `identities` are the registry's, `minimum` the manifest's minimum cohort.

    `seen` are the keys of earlier epochs: nodes refuse a list with one of them, so whoever offers one is left out.
    `colluders` are assumed at most, beside the coordinator.
    """

    def __init__(
        self,
        epoch: Epoch,
        identities: Mapping[str, PublicIdentity],
        minimum: int,
        seen: SeenKeys | None = None,
        colluders: int = 1,
    ) -> None:
        self._epoch, self._identities = epoch, dict(identities)
        self._minimum = max(minimum, cohort.SMALLEST_COHORT)
        self._seen, self._colluders = SeenKeys() if seen is None else seen, colluders
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
        cohort.check_offer(offer, _identity(self._identities, offer.name), self._epoch)
        cohort.check_distinct_keys([*self._offers.values(), offer])
        self._seen.check(offer)
        self._offers[offer.name] = offer
        return offer.name

    def close_offers(self) -> bytes:
        """U1, for all its members: as many as offered, or as few less, the last, as it takes to bear the colluders."""
        if self._cohort:
            raise Refused("keys: U1 is fixed already")
        if len(self._offers) < self._minimum:
            raise QuorumLost(f"keys: {len(self._offers)} nodes offered, expected at least {self._minimum}")
        self._offers = dict(sorted(list(self._offers.items())[: self._bearing()]))
        self._seen.add(self._offers.values())
        known = [self._identities[name].key for name in self._offers]
        self._cohort = cohort.cohort_digest(known, self._epoch, list(self._offers.values()))
        return wire.cohort_to_bytes([offer.to_bytes() for offer in self._offers.values()])

    @property
    def members(self) -> list[str]:
        """U1, once it is fixed."""
        return list(self._offers) if self._cohort else []

    def _bearing(self) -> int:
        """The largest cohort of those who offered that nodes accept: what it bears does not grow with each member."""
        for size in range(len(self._offers), self._minimum - 1, -1):
            if cohort.most_colluders(size) >= self._colluders:
                return size
        raise QuorumLost(
            f"keys: {len(self._offers)} nodes offered, expected a cohort of at least {self._minimum} that bears "
            f"{self._colluders} colluders"
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
            raise BadInput(f"shares of {deal.name}: found sealed parts of another size than {full} bytes")
        parts = [deal.hashes[at : at + size] for at in range(0, len(deal.hashes), size)]
        tree = commit.MerkleTree([commit.leaf(part) for part in parts])
        dealer = Dealer(deal.name, tree.root, deal.seeds, deal.signature)
        self._identities[deal.name].verify(deal.signature, wire.SHARES, *dealer.signed(self._cohort))
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


class ServerAttempt:
    """One attempt of an epoch: from masked inputs to the sum. With fewer inputs than `needed` nothing is unmasked."""

    def __init__(self, listed: Listed, slot: Slot, encoding: Encoding, needed: int = 0) -> None:
        if slot.attempt not in listed.epoch.attempts:
            raise Refused(f"attempt {slot.attempt}: not one of its epoch's")
        encoding.check(len(listed.offers))
        self._listed, self._slot, self._encoding = listed, slot, encoding
        self._context = slot.context(listed.epoch)
        self._needed = max(listed.threshold, listed.minimum, needed)
        self._sum = Masked.zeros(encoding)
        self._inputs: set[str] = set()
        self._survivors: tuple[str, ...] = ()
        self._signed: tuple[bytes, ...] = ()
        self._confirmations: dict[str, Confirmation] = {}
        self._agreed = False
        self._openers: set[str] = set()
        self._liars: set[str] = set()
        self._shares: dict[str, dict[int, int]] = {name: {} for name in listed.deals}  # by dealer and place
        self._without: dict[str, list[str]] = {name: [] for name in listed.deals}  # openers without its share
        self._unmasked = False

    @property
    def liars(self) -> tuple[str, ...]:
        """Who opened what its dealer did not sign, or dealt what does not rebuild: each signed the proof."""
        return tuple(sorted(self._liars))

    @property
    def suspected(self) -> Mapping[str, tuple[str, ...]]:
        """Dealers without whose secret the sum can't be had, and who says that its share does not open.

        Only where more say so than may conspire: no signature proves it, and with more colluders it is false.
        """
        t, colluders = self._listed.threshold, self._listed.colluders
        return {
            name: tuple(sorted(without))
            for name, without in self._without.items()
            if len(self._shares[name]) < t and len(without) > colluders
        }

    def add_input(self, data: bytes) -> str:
        """Stage 3: add a masked input to the sum, and forget it; returns the sender's name."""
        message = MaskedInput.from_bytes(data)
        where = f"input of {message.name}"
        if self._survivors:
            raise Refused(f"{where}: found it after U3 was fixed: too late")
        if message.name not in self._listed.deals or message.name in self._inputs:
            raise Refused(f"{where}: found one of somebody who is not in U2, or a second one")
        if (message.context, message.dealers) != (self._context, self._listed.dealers):
            raise Refused(f"{where}: found one for another federation, run, round, attempt, model or cohort")
        masked = Masked.from_bytes(self._encoding, message.vector, where)
        self._listed.identities[message.name].verify(message.signature, wire.INPUT, *message.signed())
        self._sum.add(masked)
        self._inputs.add(message.name)
        return message.name

    def close_inputs(self) -> bytes:
        """U3, for all its members."""
        if self._survivors:
            raise Refused("survivors: U3 is fixed already")
        if len(self._inputs) < self._needed:
            raise QuorumLost(f"input: {len(self._inputs)} nodes answered, expected at least {self._needed}")
        self._survivors = tuple(sorted(self._inputs))
        listed = cohort.survivors_digest(self._context, self._listed.dealers, self._survivors)
        self._signed = (self._context, self._listed.cohort, self._listed.dealers, listed)
        return wire.survivors_to_bytes(self._survivors)

    def add_confirmation(self, data: bytes) -> str:
        """Stage 4: a signature over U3; returns the signer's name."""
        message = Confirmation.from_bytes(data)
        if not self._survivors or self._agreed:
            raise Refused("confirmation: found one before U3 or after its agreement")
        if message.name not in self._survivors or message.name in self._confirmations:
            raise Refused(f"confirmation: found one of {message.name}, who is not in U3 or has signed")
        self._listed.identities[message.name].verify(message.signature, wire.CONFIRM, *self._signed)
        self._confirmations[message.name] = message
        return message.name

    def agreement(self) -> bytes:
        """t signatures over U3, for all its members."""
        if self._agreed or not self._survivors:
            raise Refused("confirmation: not the next step of this attempt")
        if len(self._confirmations) < self._listed.threshold:
            raise QuorumLost(
                f"confirmation: {len(self._confirmations)} nodes signed, expected {self._listed.threshold}"
            )
        self._agreed = True
        enough = sorted(self._confirmations.items())[: self._listed.threshold]
        return wire.agreement_to_bytes([each for _, each in enough])

    def add_opening(self, data: bytes) -> str:
        """Stage 5: a node's shares, each checked against its dealer's signed hash; returns the sender's name.

        Of a message with a share that was not dealt nothing is kept but that its sender lied.
        """
        message = Opening.from_bytes(data)
        if not self._agreed:
            raise Refused("opening: found one before the agreement")
        if message.name not in self._survivors or message.name in self._openers:
            raise Refused(f"opening: found one of {message.name}, who is not in U3 or has opened")
        signed = message.signed(self._context, self._signed[-1])
        self._listed.identities[message.name].verify(message.signature, wire.OPENING, *signed)
        wire.sized(message.shares, shamir.BYTES * len(self._listed.deals))
        shares = self._shares_of(message)
        for name, share, as_signed in shares:
            if not as_signed and share != NO_SHARE:
                self._liars.add(message.name)
                raise Refused(f"opening of {message.name}: found a share that {name} did not deal")
        self._openers.add(message.name)
        for name, share, as_signed in shares:
            self._keep(message.name, name, share, as_signed)
        return message.name

    def result(self) -> SecureSum:
        """Unmask, once; QuorumLost with too few shares, BadInput where a dealer lied or a check word is off."""
        if not self._agreed or self._unmasked:
            raise Refused("result: not the next step of this attempt")
        weights: dict[tuple[int, ...], list[int]] = {}
        secrets = {name: shamir.to_bytes(self._rebuilt(name, weights)) for name in self._listed.deals}
        self._unmasked = True
        for name, secret in secrets.items():
            if name in self._survivors:
                self._remove_seed_mask(name, secret)
            else:
                self._remove_pair_masks(name, secret)
        levels = self._sum.check(len(self._survivors), masks.check_key(self._context))
        dropped = tuple(name for name in self._listed.deals if name not in self._survivors)
        return SecureSum(
            levels,
            self._survivors,
            dropped,
            self.liars,
            self._listed.threshold,
            len(self._listed.offers),
        )

    def _shares_of(self, message: Opening) -> list[tuple[str, bytes, bool]]:
        """By dealer: the share that an opening gives, and whether it is what the dealer signed."""
        place, found = self._listed.names.index(message.name), []
        for index, (name, deal) in enumerate(self._listed.deals.items()):
            share = message.shares[shamir.BYTES * index : shamir.BYTES * (index + 1)]
            hashed = commit.share_hash(*self._labels(name, message.name), share)
            found.append((name, share, hashed == self._signed_hash(deal, place, name)))
        return found

    def _keep(self, opener: str, dealer: str, share: bytes, as_signed: bool) -> None:
        if not as_signed:
            self._without[dealer].append(opener)
            return
        try:
            value = shamir.from_bytes(share, f"share of {dealer}")
        except BadInput:
            self._liars.add(dealer)  # it dealt and signed what is no share
        else:
            self._shares[dealer][self._listed.names.index(opener) + 1] = value

    def _labels(self, dealer: str, receiver: str) -> tuple[bytes, str, str, int, str]:
        kind = "b" if dealer in self._survivors else "s"
        return self._listed.cohort, dealer, receiver, self._slot.attempt, kind

    def _signed_hash(self, deal: Deal, place: int, dealer: str) -> bytes:
        epoch = self._listed.epoch
        which = 0 if dealer in self._survivors else 1
        at = (place * epoch.count + self._slot.attempt - epoch.first) * 2 + which
        return deal.hashes[commit.DIGEST_BYTES * at : commit.DIGEST_BYTES * (at + 1)]

    def _rebuilt(self, name: str, weights: dict[tuple[int, ...], list[int]]) -> int:
        shares, t = self._shares[name], self._listed.threshold
        if len(shares) < t:
            without = sorted(self._without[name])
            said = f"; {', '.join(without)} say that theirs do not open" if without else ""
            raise QuorumLost(f"unmask: {len(shares)} shares of {name} were opened, expected {t}{said}")
        places = tuple(sorted(shares)[:t])
        if places not in weights:
            weights[places] = shamir.weights_at_zero(places)
        return shamir.combine(weights[places], [shares[place] for place in places])

    def _remove_seed_mask(self, name: str, seed: bytes) -> None:
        deal, epoch, attempt = self._listed.deals[name], self._listed.epoch, self._slot.attempt
        at = commit.DIGEST_BYTES * (attempt - epoch.first)
        expected = deal.seeds[at : at + commit.DIGEST_BYTES]
        if commit.seed_hash(self._listed.cohort, name, attempt, seed) != expected:
            raise self._lied(name)
        self._sum.apply_mask(masks.seed_mask(seed, self._context, self._listed.dealers), positive=False)

    def _remove_pair_masks(self, name: str, secret: bytes) -> None:
        """Of one who dropped out: take off what each survivor added or subtracted for it."""
        place = self._slot.attempt - self._listed.epoch.first
        pair = keys.KeyPair(secret)
        if pair.public != self._listed.offers[name].mask_keys[place]:
            raise self._lied(name)
        for survivor in self._survivors:
            secret_of_two = pair.agree(self._listed.offers[survivor].mask_keys[place])
            key = masks.pair_mask(
                secret_of_two, self._context, self._listed.cohort, self._listed.dealers, name, survivor
            )
            self._sum.apply_mask(key, positive=survivor > name)

    def _lied(self, name: str) -> BadInput:
        self._liars.add(name)
        return BadInput(f"unmask: the shares of {name} do not rebuild what it committed to")


def _identity(identities: Mapping[str, PublicIdentity], name: str) -> PublicIdentity:
    if name not in identities:
        raise Refused(f"{name}: not a member of this federation")
    return identities[name]
