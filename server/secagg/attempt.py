"""The coordinator's half of one attempt: inputs, confirmations, openings, and the sum."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fedlora.common.errors import BadInput, QuorumLost, Refused
from fedlora.common.secagg import cohort, commit, keys, masks, shamir, wire
from fedlora.common.secagg.ring import Encoding, Ints, Masked
from fedlora.common.secagg.wire import (
    NO_SHARE,
    Confirmation,
    Deal,
    Epoch,
    KeyOffer,
    MaskedInput,
    Opening,
    Slot,
)
from fedlora.common.trust.identity import PublicIdentity


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
        """Of whom the list names, in its order."""
        return list(self.offers)

    @property
    def threshold(self) -> int:
        """t: how many must answer to the end."""
        return cohort.threshold(len(self.offers))


@dataclass(frozen=True, eq=False)
class SecureSum:
    """An attempt's sum: levels of `members` inputs, who dropped out after dealing, who lied."""

    levels: Ints
    members: tuple[str, ...]
    dropped: tuple[str, ...]
    liars: tuple[str, ...]
    threshold: int
    cohort: int  # |U1|


class ServerAttempt:
    """One attempt of an epoch: from masked inputs to the sum.

    With fewer inputs than `needed` nothing is unmasked.
    """

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
        # by dealer and place
        self._shares: dict[str, dict[int, int]] = {name: {} for name in listed.deals}
        # openers without its share
        self._without: dict[str, list[str]] = {name: [] for name in listed.deals}
        self._unmasked = False

    @property
    def liars(self) -> tuple[str, ...]:
        """Who opened what its dealer did not sign, or dealt what does not rebuild.

        Each signed the proof.
        """
        return tuple(sorted(self._liars))

    @property
    def suspected(self) -> Mapping[str, tuple[str, ...]]:
        """Dealers without whose secret there is no sum, and who says its share does not open.

        Only where more say so than may conspire: no signature proves it, and with more colluders it
        is false.
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
            raise Refused(
                f"{where}: found one for another federation, run, round, attempt, model or cohort"
            )
        masked = Masked.from_bytes(self._encoding, message.vector, where)
        self._listed.identities[message.name].verify(
            message.signature, wire.INPUT_TAG, *message.signed()
        )
        self._sum.add(masked)
        self._inputs.add(message.name)
        return message.name

    def close_inputs(self) -> bytes:
        """U3, for all its members."""
        if self._survivors:
            raise Refused("survivors: U3 is fixed already")
        if len(self._inputs) < self._needed:
            raise QuorumLost(
                f"input: {len(self._inputs)} nodes answered, expected at least {self._needed}"
            )
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
            raise Refused(
                f"confirmation: found one of {message.name}, who is not in U3 or has signed"
            )
        self._listed.identities[message.name].verify(
            message.signature, wire.CONFIRM_TAG, *self._signed
        )
        self._confirmations[message.name] = message
        return message.name

    def agreement(self) -> bytes:
        """t signatures over U3, for all its members."""
        if self._agreed or not self._survivors:
            raise Refused("confirmation: not the next step of this attempt")
        if len(self._confirmations) < self._listed.threshold:
            raise QuorumLost(
                f"confirmation: {len(self._confirmations)} nodes signed, expected"
                f" {self._listed.threshold}"
            )
        self._agreed = True
        enough = sorted(self._confirmations.items())[: self._listed.threshold]
        return wire.agreement_to_bytes([each for _, each in enough])

    def add_opening(self, data: bytes) -> str:
        """Stage 5: a node's shares, each checked against its dealer's signed hash.

        Returns the sender's name. Of a message with a share that was not dealt nothing is kept but
        that its sender lied.
        """
        message = Opening.from_bytes(data)
        if not self._agreed:
            raise Refused("opening: found one before the agreement")
        if message.name not in self._survivors or message.name in self._openers:
            raise Refused(f"opening: found one of {message.name}, who is not in U3 or has opened")
        signed = message.signed(self._context, self._signed[-1])
        self._listed.identities[message.name].verify(message.signature, wire.OPENING_TAG, *signed)
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
        """Unmask, once; QuorumLost for too few shares, BadInput for a liar or a check word."""
        if not self._agreed or self._unmasked:
            raise Refused("result: not the next step of this attempt")
        weights: dict[tuple[int, ...], list[int]] = {}
        secrets = {
            name: shamir.to_bytes(self._rebuilt(name, weights)) for name in self._listed.deals
        }
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
            raise QuorumLost(
                f"unmask: {len(shares)} shares of {name} were opened, expected {t}{said}"
            )
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
        self._sum.apply_mask(
            masks.seed_mask(seed, self._context, self._listed.dealers), positive=False
        )

    def _remove_pair_masks(self, name: str, secret: bytes) -> None:
        """Of one who dropped out: take off what each survivor added or subtracted for it."""
        place = self._slot.attempt - self._listed.epoch.first
        pair = keys.KeyPair(secret)
        if pair.public != self._listed.offers[name].mask_keys[place]:
            raise self._lied(name)
        for survivor in self._survivors:
            secret_of_two = pair.agree(self._listed.offers[survivor].mask_keys[place])
            key = masks.pair_mask(
                secret_of_two,
                self._context,
                self._listed.cohort,
                self._listed.dealers,
                name,
                survivor,
            )
            self._sum.apply_mask(key, positive=survivor > name)

    def _lied(self, name: str) -> BadInput:
        self._liars.add(name)
        return BadInput(f"unmask: the shares of {name} do not rebuild what it committed to")


def identity_of(identities: Mapping[str, PublicIdentity], name: str) -> PublicIdentity:
    """A member's key; Refused for whom the federation does not know."""
    if name not in identities:
        raise Refused(f"{name}: not a member of this federation")
    return identities[name]
