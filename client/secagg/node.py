"""The node's half of secure aggregation: refuses whatever is not the next legal step.

    an epoch      offer -> deal -> accept
    an attempt    check -> (policy, ledger, training) -> mask -> confirm -> open, each once

A refused message changes nothing and yields nothing. Sets are computed here, from lists that were
checked here; no message says what to open. Secrets live in this object only: they are dropped after
`open`, when a later attempt is masked, when the epoch ends, and when the process does. A node that
was restarted is a drop-out until the next epoch; what it sent before it can send again, the same
bytes, and nothing else (`sent`).
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from fedlora.client.node.outbox import MaskedOutbox
from fedlora.client.secagg.shares import Attempt, EpochState, deal_shares, take_shares
from fedlora.common.errors import BadInput, Refused
from fedlora.common.secagg import cohort, commit, keys, masks, shamir, wire
from fedlora.common.secagg.cohort import CohortPolicy
from fedlora.common.secagg.ring import Encoding, Ints, Masked
from fedlora.common.secagg.wire import (
    Confirmation,
    Delivery,
    Epoch,
    KeyOffer,
    MaskedInput,
    Opening,
    Slot,
)
from fedlora.common.trust.identity import Identity


@dataclass(frozen=True)
class Possible:
    """A sum that may hold this node's input.

    From the moment it leaves, t others can make it legible. For its report.
    """

    round: int
    attempt: int
    cohort: int  # |U1|
    threshold: int
    colluders: int  # that this node assumed
    dealt: int  # |U2|
    # whose inputs are in the sum; None: this node was not asked to confirm it
    members: int | None = None
    dropped: int | None = None  # dealt, and are not in it


class SecureNode:
    """One institution in one run. `noised`: its updates carry their own fresh noise each attempt.

    An update without noise of its own leaves once a round, whatever happens to that attempt: in two
    cohorts, the difference of the sums would be the update.
    """

    def __init__(
        self,
        identity: Identity,
        policy: CohortPolicy,
        federation: str,
        run: str,
        outbox: MaskedOutbox,
        noised: bool = True,
        draw: shamir.RandomBytes = os.urandom,
    ) -> None:
        if policy.peers[policy.me].identity != identity.public:
            raise BadInput(
                f"policy peers: found another identity for {policy.me} than its own key's"
            )
        self._identity, self._policy = identity, policy
        self._federation, self._run = federation, run
        self._outbox, self._noised, self._draw = outbox, noised, draw
        self._last_epoch = 0
        self._last_attempt = max((attempt for _, attempt in outbox.used()), default=0)
        self._seen_keys: set[bytes] = set()
        self._state: EpochState | None = None
        self.confirmed: Possible | None = None  # the last one

    @property
    def policy(self) -> CohortPolicy:
        """What this node asks of any cohort."""
        return self._policy

    @property
    def bad_dealers(self) -> tuple[str, ...]:
        """Peers whose shares for this node did not open, or were not what they had signed."""
        return tuple(self._state.bad_dealers) if self._state else ()

    def offer(self, epoch: Epoch) -> bytes:
        """Fresh keys for a new epoch; what was before is dropped. Refused for an old one."""
        if (epoch.federation, epoch.run) != (self._federation, self._run):
            raise Refused(
                "epoch: found another federation or run than the one that was consented to"
            )
        if epoch.number <= self._last_epoch:
            raise Refused(
                f"epoch: found number {epoch.number}, expected one above {self._last_epoch}"
            )
        if epoch.first <= self._last_attempt:
            raise Refused(
                f"epoch: found attempt {epoch.first}, expected one above {self._last_attempt}: used"
                " before"
            )
        self._last_epoch, self._state = epoch.number, None
        share_key = keys.KeyPair.generate(self._draw)
        attempts = {
            each: Attempt(
                shamir.to_bytes(shamir.below_p(self._draw)), keys.KeyPair.generate(self._draw)
            )
            for each in epoch.attempts
        }
        public = tuple(each.mask_key.public for each in attempts.values())
        offer = KeyOffer(epoch.digest, self._policy.me, share_key.public, public)
        offer = replace(offer, signature=self._identity.sign(wire.KEYS_TAG, *offer.signed()))
        self._state = EpochState(epoch, share_key, offer, attempts)
        return offer.to_bytes()

    def deal(self, cohort_list: bytes) -> bytes:
        """Check U1; share every b and s with it. Refused with the condition that does not hold."""
        state = self._epoch()
        if state.cohort:
            raise Refused("cohort: found a second list for one epoch")
        members = wire.cohort_from_bytes(cohort_list)
        digest_of_cohort = cohort.check_cohort(self._policy, state.epoch, members, state.offer)
        for each in members:
            if self._seen_keys & {each.share_key, *each.mask_keys}:
                raise Refused(
                    f"cohort: found a key of an earlier epoch in the entry of {each.name}, expected"
                    " fresh ones"
                )
        self._seen_keys.update(*((each.share_key, *each.mask_keys) for each in members))
        state.members, state.cohort = members, digest_of_cohort
        return deal_shares(state, self._policy.me, self._identity, self._draw).to_bytes()

    def accept(self, delivery: bytes) -> None:
        """Check U2, and open the shares that its dealers sealed for this node."""
        state = self._epoch()
        if not state.cohort or state.own is None or state.dealers:
            raise Refused("dealers: not the next step of this epoch")
        read = Delivery.from_bytes(delivery)
        dealers = cohort.check_dealers(
            self._policy, state.cohort, state.names, read.dealers, state.own
        )
        for dealer in read.dealers:
            if len(dealer.seeds) != commit.DIGEST_BYTES * state.epoch.count:
                raise BadInput(
                    f"dealers: found {len(dealer.seeds)} bytes of seed hashes of {dealer.name}"
                )
        for dealer, sealed, path in zip(read.dealers, read.sealed, read.paths, strict=True):
            if dealer.name != self._policy.me:
                take_shares(state, self._policy.me, dealer, sealed, path)
        state.dealer_names = tuple(dealer.name for dealer in read.dealers)
        state.dealers = dealers

    @property
    def accepted(self) -> bool:
        """Whether this node has a U2 that it checked."""
        return self._state is not None and bool(self._state.dealers)

    @property
    def members(self) -> int:
        """|U1| of this node's epoch, which it checked; Refused where there is none."""
        return len(self._epoch().members)

    def check(self, slot: Slot, encoding: Encoding) -> None:
        """Refused unless this attempt may have an input: before data or budget are touched."""
        state = self._epoch()
        if not state.dealers:
            raise Refused("input: this epoch has no list of dealers yet")
        encoding.check(len(state.members))
        if slot.attempt not in state.attempts or slot.attempt <= self._last_attempt:
            raise Refused(
                f"input: attempt {slot.attempt} is not open at this node: used, or not of its epoch"
            )
        if not self._noised and any(used == slot.round for used, _ in self._outbox.used()):
            raise Refused(
                f"input: round {slot.round} was answered once, and an update without noise leaves"
                " once only: the difference of two cohorts would show it"
            )

    def mask(self, slot: Slot, encoding: Encoding, values: Ints) -> bytes:
        """The signed, masked input; durable before it is returned, and one for each attempt."""
        self.check(slot, encoding)
        state = self._epoch()
        attempt = state.attempts[slot.attempt]
        context = slot.context(state.epoch)
        masked = Masked.of(encoding, values, masks.check_key(context))
        masked.apply_mask(masks.seed_mask(attempt.seed, context, state.dealers), positive=True)
        for name, public in self._mask_keys_of_others(state, slot.attempt):
            secret, me = attempt.mask_key.agree(public), self._policy.me
            key = masks.pair_mask(secret, context, state.cohort, state.dealers, me, name)
            masked.apply_mask(key, positive=me < name)
        message = MaskedInput(self._policy.me, context, state.dealers, masked.to_bytes())
        message = replace(message, signature=self._identity.sign(wire.INPUT_TAG, *message.signed()))
        data = message.to_bytes()
        self._drop_before(state, slot.attempt)
        self._last_attempt = slot.attempt  # used, even where the disk fails in the next line
        self._outbox.put(slot.round, slot.attempt, data)
        attempt.context, attempt.round = context, slot.round
        return data

    def possible(self, round_number: int, attempt: int) -> Possible:
        """What an input of this attempt may become a part of."""
        state = self._epoch()
        n, c = len(state.members), self._policy.max_colluders
        return Possible(round_number, attempt, n, cohort.threshold(n), c, len(state.dealer_names))

    def sent(self, round_number: int, attempt: int) -> bytes | None:
        """The very bytes made for this attempt, also after a restart; None where there are none."""
        return self._outbox.get(round_number, attempt)

    def confirm(self, attempt_number: int, survivors: bytes) -> bytes:
        """Check U3 and sign context, H(U1), H(U2), H(U3): one list an attempt."""
        state, attempt = self._masked(attempt_number)
        if attempt.signed:
            raise Refused("survivors: found a second list for one attempt")
        names = wire.survivors_from_bytes(survivors)
        cohort.check_subset(
            self._policy, "survivors", names, state.dealer_names, len(state.members)
        )
        listed = cohort.survivors_digest(attempt.context, state.dealers, names)
        attempt.survivors = names
        attempt.signed = (attempt.context, state.cohort, state.dealers, listed)
        possible = self.possible(attempt.round, attempt_number)
        self.confirmed = replace(possible, members=len(names), dropped=possible.dealt - len(names))
        signature = self._identity.sign(wire.CONFIRM_TAG, *attempt.signed)
        return Confirmation(self._policy.me, signature).to_bytes()

    def open(self, attempt_number: int, agreement: bytes) -> bytes:
        """One share for each of U2: of b for U3, of s for the others. Then the secrets are gone."""
        state, attempt = self._masked(attempt_number)
        if not attempt.signed:
            raise Refused("unmask: this node has confirmed no list of survivors")
        confirmations = wire.agreement_from_bytes(agreement)
        cohort.check_agreement(
            self._policy, confirmations, attempt.survivors, len(state.members), attempt.signed
        )
        del state.attempts[attempt_number]
        missing = (wire.NO_SHARE, wire.NO_SHARE)
        opened = [
            attempt.shares.get(name, missing)[0 if name in attempt.survivors else 1]
            for name in state.dealer_names
        ]
        message = Opening(self._policy.me, b"".join(opened))
        signed = message.signed(attempt.context, attempt.signed[-1])
        return replace(message, signature=self._identity.sign(wire.OPENING_TAG, *signed)).to_bytes()

    def adopt(self, policy: CohortPolicy) -> None:
        """The roster as it is now: an epoch with a member no longer on it ends here."""
        state, before, self._policy = self._state, self._policy.peers, policy
        if state is not None and any(
            policy.peers.get(name) != before.get(name) for name in state.names
        ):
            self._state = None

    def _mask_keys_of_others(self, state: EpochState, attempt: int) -> list[tuple[str, bytes]]:
        """The other dealers' mask keys for one attempt."""
        place = attempt - state.epoch.first
        dealt = set(state.dealer_names) - {self._policy.me}
        return [
            (offer.name, offer.mask_keys[place]) for offer in state.members if offer.name in dealt
        ]

    def _drop_before(self, state: EpochState, attempt: int) -> None:
        for earlier in [number for number in state.attempts if number < attempt]:
            del state.attempts[earlier]

    def _epoch(self) -> EpochState:
        if self._state is None:
            raise Refused("epoch: this node is in none; it joins the next")
        return self._state

    def _masked(self, attempt_number: int) -> tuple[EpochState, Attempt]:
        state = self._epoch()
        attempt = state.attempts.get(attempt_number)
        if attempt is None or not attempt.context:
            raise Refused(f"attempt {attempt_number}: this node sent no input that is still open")
        return state, attempt
