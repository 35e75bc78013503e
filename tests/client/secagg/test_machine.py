"""A hostile coordinator with one colluding institution, at random.

Whatever it sends in whatever order,

    * no honest node opens both shares of one peer in one attempt
    * never are t shares of both kinds within its reach (honest openings and what the colluder
      holds)
    * no node makes two inputs for one attempt, nor, without noise, two for one round
    * no node opens anything for a list below max(t, minimum cohort), or one that it did not confirm
    * no node confirms two lists for one attempt of an epoch; no key is offered twice
    * no node deals to somebody unapproved or revoked, or to fewer than its minimum

Shares are told apart by their dealers' signed hashes, not by what a node says. 1,000 steps in CI,
10,000 in `make chaos`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from fedlora.common.errors import FedloraError
from fedlora.common.secagg import commit, keys, shamir, wire
from fedlora.common.secagg.cohort import dealers_digest, survivors_digest, threshold
from fedlora.common.secagg.wire import (
    Confirmation,
    Deal,
    Dealer,
    Delivery,
    Epoch,
    KeyOffer,
    Opening,
    Slot,
)
from fedlora.common.trust.identity import Identity
from tests.secure_world import (
    ADAPTER,
    FEDERATION,
    IDENTITIES,
    RUN,
    World,
    encoding_of,
    remove,
    slot_of,
)

T = TypeVar("T")
# what the random coordinators got as far as; the tests below look at it
REACHED: Counter[str] = Counter()
ENCODING = encoding_of(size=3)
ADAPTERS = (ADAPTER, "sha256:another")
STRANGER = Identity.generate()


class HostileCoordinator(RuleBasedStateMachine):
    @initialize(
        count=st.integers(3, 6),
        minimum=st.sampled_from([3, 3, 4, 5]),
        noised=st.sampled_from([True, True, False]),
    )
    def begin(self, count: int, minimum: int, noised: bool) -> None:
        self.world = World(count, min(minimum, count), 1, noised, ENCODING)
        self.names = self.world.names
        self.colluder, self.honest = self.names[-1], self.names[:-1]
        self.epoch = Epoch(FEDERATION, RUN, 1, 1, 1)
        self.offers: dict[str, KeyOffer] = {}
        self.older: list[KeyOffer] = []
        self.lists: dict[str, tuple[str, ...]] = {}  # U1 that a node dealt to
        self.deals: dict[tuple[bytes, str], Deal] = {}  # by H(U1) and dealer
        self.cohort_of: dict[str, bytes] = {}
        self.dealers_of: dict[str, tuple[Dealer, ...]] = {}
        self.slots: dict[str, Slot] = {}
        self.confirmed: dict[tuple[str, bytes, int], set[tuple[str, ...]]] = defaultdict(set)
        self.signatures: list[Confirmation] = []
        self.u3: dict[str, tuple[str, ...]] = {}
        self.opened: dict[tuple[bytes, int, str], dict[str, set[str]]] = defaultdict(
            lambda: {"b": set(), "s": set()}
        )
        self.inputs: dict[tuple[str, int], set[bytes]] = defaultdict(set)
        self.rounds: dict[tuple[str, int], set[int]] = defaultdict(set)
        self.offered: Counter[bytes] = Counter()
        self.revoked: dict[str, set[str]] = defaultdict(set)
        self.sizes: dict[bytes, int] = {}
        self.rng, self.moves, self.stage, self.calm = Random(0), 0, -1, True

    def ask(self, what: str, step: Callable[..., T], *given: object) -> T | None:
        """What a node answers, or None where it refuses; nothing else may be raised."""
        try:
            answer = step(*given)
        except FedloraError:
            REACHED["refused " + what] += 1
            return None
        REACHED[what] += 1
        return answer

    @rule(seed=st.integers(0, 2**64))
    def move(self, seed: int) -> None:
        """Mostly the step of an honest coordinator, so that it gets somewhere; else any."""
        self.moves += 1
        self.rng = Random(f"{seed} {self.moves}")
        legal = [self.new_epoch, self.deal, self.accept, self.mask, self.confirm, self.open]
        self.calm = self.rng.random() < 0.8
        if self.rng.random() < 0.85:
            self.stage = (self.stage + 1) % len(legal)
            legal[self.stage]()
        else:
            self.rng.choice([*legal, self.restart, self.revoke])()

    def some(self, names: list[str]) -> list[str]:
        """Mostly everybody, sometimes fewer."""
        if self.calm or self.rng.random() < 0.6:
            return list(names)
        return sorted(self.rng.sample(names, self.rng.randint(0, len(names))))

    def pick(self, options: list[T]) -> T:
        """The first one is the honest one."""
        return options[0] if self.calm else self.rng.choice(options)

    # --- epochs ---

    def new_epoch(self) -> None:
        count, number = self.pick([2, 1]), self.pick([1, 1, 1, 1, 0, -1])
        first = self.pick([1, 1, 1, 1, 0, -1])
        start = max(1, self.epoch.first + self.epoch.count - 1 + first)
        epoch = Epoch(FEDERATION, RUN, max(1, self.epoch.number + number), start, count)
        self.older += list(self.offers.values())[-2:]
        self.epoch, self.offers = epoch, {}
        for name in self.some(self.names):
            sent = self.ask("offer", self.world.nodes[name].offer, epoch)
            if sent is not None:
                self.offers[name] = KeyOffer.from_bytes(sent)
                self.offered.update([self.offers[name].share_key, *self.offers[name].mask_keys])

    def deal(self) -> None:
        hostile = self.pick(["", "", "", "", "older", "twice", "swap", "sybil", "low", "drop"])
        listed = [self.offers[name] for name in self.some(sorted(self.offers))]
        listed = self.changed(listed, hostile)
        sent = wire.cohort_to_bytes([offer.to_bytes() for offer in listed])
        names = tuple(offer.name for offer in listed)
        for name in self.some(self.names):
            answer = self.ask("deal", self.world.nodes[name].deal, sent)
            if answer is None:
                continue
            deal = Deal.from_bytes(answer)
            self.lists[name], self.cohort_of[name] = names, deal.cohort
            self.sizes[deal.cohort] = len(names)
            self.deals[deal.cohort, name] = deal
            self.dealers_of.pop(name, None)
            assert set(names) <= set(self.names) - self.revoked[name], "dealt to a stranger"
            assert len(set(names)) == len(names) >= self.world.minimum
            assert hostile in ("", "drop") or name == self.colluder, hostile

    def changed(self, listed: list[KeyOffer], hostile: str) -> list[KeyOffer]:
        """One change that must be seen; the colluder signs whatever it is asked to."""
        if not listed or (hostile == "older" and not self.older):
            return listed[:0]
        place = self.rng.randrange(len(listed))
        chosen, mine = listed[place], keys.KeyPair(b"\x07" * 32).public
        if hostile == "drop":
            return listed[:place] + listed[place + 1 :]
        if hostile == "twice":
            return [*listed, chosen]
        if hostile == "older":
            chosen = self.rng.choice(self.older)
            return sorted(
                [o for o in listed if o.name != chosen.name] + [chosen], key=lambda o: o.name
            )
        if hostile == "swap":
            chosen = replace(chosen, share_key=mine)
        elif hostile == "sybil":
            chosen = replace(chosen, name="zzz")
            chosen = replace(chosen, signature=STRANGER.sign(wire.KEYS_TAG, *chosen.signed()))
            return [*listed, chosen]
        elif hostile == "low":
            place = len(listed) - 1
            chosen = replace(listed[place], mask_keys=(bytes(32),) * len(listed[place].mask_keys))
            chosen = replace(
                chosen,
                signature=IDENTITIES[len(self.names) - 1].sign(wire.KEYS_TAG, *chosen.signed()),
            )
        return [*listed[:place], chosen, *listed[place + 1 :]]

    def accept(self) -> None:
        hostile = self.pick(["", "", "", "", "root", "mixed"])
        for name in self.some(sorted(self.cohort_of)):
            cohort, u1 = self.cohort_of[name], self.lists[name]
            have = [each for each in u1 if (cohort, each) in self.deals]
            if not have:
                continue
            sent = self.delivery(name, cohort, u1, self.some(have))
            if hostile == "root" and sent.dealers:
                sent = replace(
                    sent, dealers=(*sent.dealers[:-1], replace(sent.dealers[-1], root=bytes(32)))
                )
            if hostile == "mixed":
                sent = replace(sent, sealed=tuple(reversed(sent.sealed)))
            encoded = sent.to_bytes()
            before = REACHED["accept"]
            self.ask("accept", self.world.nodes[name].accept, encoded)
            if REACHED["accept"] > before:
                self.dealers_of[name] = sent.dealers
                assert len(sent.dealers) >= max(threshold(len(u1)), self.world.minimum)
                assert hostile != "root"

    def delivery(self, to: str, cohort: bytes, u1: tuple[str, ...], only: list[str]) -> Delivery:
        place, dealers, sealed, paths = u1.index(to), [], [], []
        for name in only:
            deal = self.deals[cohort, name]
            size = len(deal.hashes) // len(u1)
            leaves = [
                commit.leaf(deal.hashes[at : at + size]) for at in range(0, len(deal.hashes), size)
            ]
            tree = commit.MerkleTree(leaves)
            dealers.append(Dealer(name, tree.root, deal.seeds, deal.signature))
            sealed.append(deal.sealed[place])
            paths.append(tree.path(place))
        return Delivery(tuple(dealers), tuple(sealed), tuple(paths))

    # --- attempts ---

    def mask(self) -> None:
        ahead, round_number = self.pick([0, 0, 0, 1]), self.pick([0, 0, 0, 0, 1, 2])
        adapter = self.pick([ADAPTERS[0], ADAPTERS[0], ADAPTERS[0], ADAPTERS[1]])
        attempt = self.epoch.first + ahead
        slot = slot_of(attempt, round_number or attempt, adapter)
        for name in self.some(sorted(self.dealers_of)):
            values = self.world.values(name)
            sent = self.ask("mask", self.world.nodes[name].mask, slot, ENCODING, values)
            if sent is not None:
                self.slots[name] = slot
                self.inputs[name, attempt].add(sent)
                self.rounds[name, slot.round].add(attempt)

    def confirm(self) -> None:
        hostile = self.pick(["", "", "", "", "stranger", "twice"])
        survivors = self.some(self.names)
        sent = list(survivors)
        if hostile == "stranger":
            sent.append("zzz")
        if hostile == "twice":
            sent = [*sent[:1], *sent]
        message = wire.survivors_to_bytes(sent)
        for name in self.some(sorted(self.slots)):
            attempt = self.slots[name].attempt
            answer = self.ask("confirm", self.world.nodes[name].confirm, attempt, message)
            if answer is not None:
                self.signatures.append(Confirmation.from_bytes(answer))
                self.u3[name] = tuple(sent)
                self.confirmed[name, self.cohort_of[name], attempt].add(tuple(sent))
                assert not hostile and name in sent

    def open(self) -> None:
        hostile = self.pick(["", "", "", "few", "twice", "all"])
        for name in self.some(sorted(self.u3)):
            if name not in self.dealers_of or name not in self.slots:
                continue
            signed = self.signed_by(name)
            found = [
                each
                for each in self.signatures
                if self.is_over(each, signed) and each.name in self.u3[name]
            ]
            found = list({each.name: each for each in found if each.name != self.colluder}.values())
            # whatever helps the coordinator
            forged = IDENTITIES[len(self.names) - 1].sign(wire.CONFIRM_TAG, *signed)
            if self.colluder in self.u3[name]:
                found.append(Confirmation(self.colluder, forged))
            if hostile == "few":
                found = found[: self.rng.randint(0, len(found))]
            if hostile == "twice":
                found = [*found, *found]
            if hostile == "all":
                found = self.signatures[-len(self.names) :]
            attempt, message = self.slots[name].attempt, wire.agreement_to_bytes(found)
            answer = self.ask("open", self.world.nodes[name].open, attempt, message)
            if answer is not None:
                assert len({each.name for each in found}) >= threshold(len(self.lists[name]))
                self.look_at(name, attempt, Opening.from_bytes(answer))

    def signed_by(self, name: str) -> tuple[bytes, ...]:
        epoch = self.world.nodes[name]._state.epoch if self.world.nodes[name]._state else self.epoch  # type: ignore[union-attr]
        context, cohort = self.slots[name].context(epoch), self.cohort_of[name]
        dealers = dealers_digest(cohort, self.dealers_of[name])
        return context, cohort, dealers, survivors_digest(context, dealers, self.u3[name])

    def is_over(self, each: Confirmation, signed: tuple[bytes, ...]) -> bool:
        try:
            IDENTITIES[int(each.name[-3:])].public.verify(each.signature, wire.CONFIRM_TAG, *signed)
        except FedloraError:
            return False
        return True

    def look_at(self, name: str, attempt: int, opening: Opening) -> None:
        """Which share of whom was opened, by the dealers' hashes."""
        cohort, opened_b = self.cohort_of[name], 0
        for place, dealer in enumerate(self.dealers_of[name]):
            share = opening.shares[shamir.BYTES * place : shamir.BYTES * (place + 1)]
            if share == wire.NO_SHARE:
                opened_b += dealer.name in self.u3[name]
                continue
            hashes = self.deals[cohort, dealer.name].hashes
            known = {hashes[at : at + 32] for at in range(0, len(hashes), 32)}
            kinds = [
                kind
                for kind in ("b", "s")
                if commit.share_hash(cohort, dealer.name, name, attempt, kind, share) in known
            ]
            assert len(kinds) == 1, "opened something else than one share of this attempt"
            self.opened[cohort, attempt, dealer.name][kinds[0]].add(name)
            opened_b += kinds == ["b"]
            assert (kinds == ["b"]) == (dealer.name in self.u3[name])
        assert opened_b >= max(threshold(len(self.lists[name])), self.world.minimum)
        REACHED["looked at"] += 1

    # --- accidents ---

    def restart(self) -> None:
        if self.rng.random() < 0.3:
            name = self.rng.choice(self.names)
            self.world.nodes[name] = self.world.node(name)
            self.revoked[name] = set()
            for known in (self.dealers_of, self.slots, self.u3, self.cohort_of):
                known.pop(name, None)

    def revoke(self) -> None:
        if self.rng.random() < 0.3:
            name, gone = self.rng.sample(self.names, 2)
            remove(self.world.nodes[name], gone)
            self.revoked[name].add(gone)

    # --- what must hold ---

    @invariant()
    def never_both_shares_of_one_peer(self) -> None:
        for (cohort, _, _), by in getattr(self, "opened", {}).items():
            honest = {kind: names - {self.colluder} for kind, names in by.items()}
            assert not honest["b"] & honest["s"]
            t = threshold(self.sizes[cohort])
            assert not (len(honest["b"]) + 1 >= t and len(honest["s"]) + 1 >= t)

    @invariant()
    def never_two_inputs_or_two_lists(self) -> None:
        assert all(len(each) == 1 for each in getattr(self, "inputs", {}).values())
        assert all(len(each) == 1 for each in getattr(self, "confirmed", {}).values())
        if hasattr(self, "world") and not self.world.noised:
            assert all(len(each) == 1 for each in self.rounds.values())

    @invariant()
    def never_a_key_twice(self) -> None:
        assert all(times == 1 for times in getattr(self, "offered", {}).values())


def played(examples: int, steps: int) -> Counter[str]:
    """Hypothesis counts the beginning of an example as one of its steps: it makes one move less."""
    REACHED.clear()
    run_state_machine_as_test(
        HostileCoordinator,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
    return REACHED


def test_a_hostile_coordinator_a_thousand_steps() -> None:
    reached = played(26, 40)
    for what in ("offer", "deal", "accept", "mask", "confirm", "open"):
        assert reached[what] and reached["refused " + what], (what, reached)
    assert reached["looked at"] >= 10, reached


@pytest.mark.chaos
def test_a_hostile_coordinator_ten_thousand_steps() -> None:
    reached = played(257, 40)
    assert reached["looked at"] >= 100, reached
