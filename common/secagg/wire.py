"""Contexts and messages of secure aggregation, as values and as canonical bytes.

Every message is a frame (`common.codec.framing`): its `TAG`, and its fields in the order of its
class. Names are UTF-8. `CLEAR_FIELDS` is all that a coordinator sees of a node.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated

from fedlora.common.codec.framing import (
    Digest,
    Framed,
    Key,
    Most,
    Plain,
    Signature,
    Text,
    digest,
    framed,
    parts_of,
    unframed,
)
from fedlora.common.errors import BadInput

PROTOCOL = "fedlora-secagg-1"
KEYS_TAG = f"{PROTOCOL} keys"
COHORT_TAG = f"{PROTOCOL} cohort"
SHARES_TAG = f"{PROTOCOL} shares"
DEALERS_TAG = f"{PROTOCOL} dealers"
INPUT_TAG = f"{PROTOCOL} masked"
SURVIVORS_TAG = f"{PROTOCOL} survivors"
CONFIRM_TAG = f"{PROTOCOL} confirm"
AGREEMENT_TAG = f"{PROTOCOL} agreement"
OPENING_TAG = f"{PROTOCOL} opening"
MOST_MEMBERS = 1000  # a complete graph is quadratic: see docs/secure-aggregation.md
MOST_ATTEMPTS = 256  # of an epoch
MOST_NAME_BYTES = 256
NO_SHARE = b"\xff" * 32  # no element of the field

NAME = Text(1, MOST_NAME_BYTES)
Name = Annotated[str, NAME]
Each = Annotated[tuple[bytes, ...], Most(MOST_MEMBERS)]  # bytes for each member of a list

# What a coordinator sees of a node, and why it says nothing about that node's update.
# docs/secure-aggregation.md holds this as a table; a test compares it, and all messages' fields.
CLEAR_FIELDS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "KeyOffer": {
            "epoch": "hash of federation, run, epoch and its attempts",
            "name": "who speaks",
            "share_key": "fresh X25519 public key",
            "mask_keys": "fresh X25519 public keys, one for each attempt",
            "signature": "Ed25519",
        },
        "Deal": {
            "name": "who speaks",
            "cohort": "hash of U1",
            "sealed": "ciphertexts of ChaCha20-Poly1305, one for each peer",
            "hashes": "hashes of shares of 256 bits",
            "seeds": "hashes of random seeds of 256 bits",
            "signature": "Ed25519",
        },
        "MaskedInput": {
            "name": "who speaks",
            "context": "hash of setup, round, adapter and base model",
            "dealers": "hash of U2",
            "vector": "update and check words under masks: uniform words",
            "signature": "Ed25519",
        },
        "Confirmation": {"name": "who speaks", "signature": "Ed25519 over the lists"},
        "Opening": {
            "name": "who speaks",
            "shares": "for each of U2 one share: of b for those in U3, of s for the others",
            "signature": "Ed25519",
        },
    }
)


def number(value: int) -> bytes:
    """A whole number in 8 bytes, big-endian."""
    return value.to_bytes(8, "big")


def names_digest(tag: str, *fields: bytes, names: Sequence[str]) -> bytes:
    """SHA-256 of the framed fields, followed by the names."""
    return digest(tag, *fields, *(name.encode() for name in names))


@dataclass(frozen=True)
class Epoch(Framed):
    """Keys and shares for the attempts `first` … `first + count - 1` of a run.

    As bytes it is stage 1, coordinator to node.
    """

    TAG = f"{PROTOCOL} epoch"

    federation: Name
    run: Name  # the manifest's digest
    number: int
    first: int
    count: int

    def __post_init__(self) -> None:
        faults = []
        for name, value, most in (
            ("number", self.number, 1 << 63),
            ("first", self.first, 1 << 63),
            ("count", self.count, MOST_ATTEMPTS),
        ):
            if type(value) is not int or not 1 <= value <= most:
                faults.append(f"epoch {name}: found {value!r}, expected 1 to {most}")
        if faults:
            raise BadInput(faults)

    @property
    def attempts(self) -> range:
        """The attempts that its keys and shares are for."""
        return range(self.first, self.first + self.count)

    @property
    def digest(self) -> bytes:
        """Of its bytes, 32."""
        return digest(self.TAG, *parts_of(self))

    def setup(self, attempt: int) -> bytes:
        """What everything about one attempt is bound to before the adapter is known."""
        return digest(f"{PROTOCOL} setup", self.digest, number(attempt))


@dataclass(frozen=True)
class Slot:
    """One attempt at one round, with the model that it starts from."""

    round: int
    attempt: int
    adapter: str  # digest of the global adapter
    base: str  # digest of the base model

    def context(self, epoch: Epoch) -> bytes:
        """What masks, inputs and lists of this attempt are bound to."""
        fields = (number(self.round), self.adapter.encode(), self.base.encode())
        return digest(f"{PROTOCOL} input", epoch.setup(self.attempt), *fields)


@dataclass(frozen=True)
class KeyOffer(Framed):
    """Stage 1, node to coordinator: fresh keys for an epoch."""

    TAG = KEYS_TAG

    epoch: Digest
    name: Name
    share_key: Key
    mask_keys: Annotated[tuple[Key, ...], Most(MOST_ATTEMPTS)]
    signature: Signature = b""

    def signed(self) -> tuple[bytes, ...]:
        """What the signature covers."""
        return parts_of(self)[:-1]


@dataclass(frozen=True)
class Deal(Framed):
    """Stage 2, node to coordinator: sealed shares for every peer of U1, in order, and what is
    signed of them.
    """

    TAG = SHARES_TAG

    name: Name
    cohort: Digest
    sealed: Each  # empty at the dealer's own place
    # for each receiver in order, for each attempt: of the share of b, of the share of s
    hashes: bytes
    seeds: bytes  # for each attempt: of b
    signature: Signature = b""


@dataclass(frozen=True)
class Dealer(Framed):
    """An entry of U2: the root and the seed hashes that a member signed for this U1."""

    TAG = "dealer"

    name: Name
    root: Digest
    seeds: bytes
    signature: Signature

    def signed(self, cohort: bytes) -> tuple[bytes, ...]:
        """What the signature covers, given H(U1)."""
        return (cohort, *parts_of(self)[:-1])


@dataclass(frozen=True)
class Delivery(Framed):
    """Stage 2, coordinator to one node.

    U2, and for each of its dealers that node's sealed shares and path.
    """

    TAG = DEALERS_TAG

    dealers: Annotated[tuple[Dealer, ...], Most(MOST_MEMBERS)]
    sealed: Each
    paths: Each

    def __post_init__(self) -> None:
        dealers, sealed, paths = len(self.dealers), len(self.sealed), len(self.paths)
        if not dealers == sealed == paths:
            raise BadInput(f"{self.TAG}: found lists of {dealers}, {sealed} and {paths}")


@dataclass(frozen=True, eq=False)
class MaskedInput(Framed):
    """Stage 3, node to coordinator: the masked update."""

    TAG = INPUT_TAG

    name: Name
    context: Digest
    dealers: Digest  # H(U2)
    vector: Annotated[bytes | memoryview, Plain()]
    signature: Signature = b""

    def signed(self) -> tuple[bytes, ...]:
        """What the signature covers: the vector by its hash."""
        name, context, dealers, vector, _ = parts_of(self)
        return (context, dealers, name, digest("vector", vector))


@dataclass(frozen=True)
class Confirmation(Framed):
    """Stage 4, node to coordinator: a signature over context, H(U1), H(U2) and H(U3)."""

    TAG = CONFIRM_TAG

    name: Name
    signature: Signature


@dataclass(frozen=True)
class Opening(Framed):
    """Stage 5, node to coordinator: one share for each of U2, in order.

    `NO_SHARE` where the dealer's was bad.
    """

    TAG = OPENING_TAG

    name: Name
    shares: bytes
    signature: Signature = b""

    def signed(self, context: bytes, survivors: bytes) -> tuple[bytes, ...]:
        """What the signature covers, given the attempt's context and H(U3)."""
        return (context, survivors, *parts_of(self)[:-1])


def cohort_to_bytes(offers: Sequence[bytes]) -> bytes:
    """Stage 1, coordinator to all: U1, as its members' own signed offers."""
    return framed(COHORT_TAG, *offers)


def cohort_from_bytes(data: bytes) -> tuple[KeyOffer, ...]:
    """BadInput where it is no list of offers; whether they make a cohort is not asked."""
    return tuple(KeyOffer.from_bytes(each) for each in unframed(data, COHORT_TAG, MOST_MEMBERS))


def survivors_to_bytes(names: Sequence[str]) -> bytes:
    """Stage 4, coordinator to all: U3."""
    return framed(SURVIVORS_TAG, *(name.encode() for name in names))


def survivors_from_bytes(data: bytes) -> tuple[str, ...]:
    """BadInput where it is no list of names."""
    found = unframed(data, SURVIVORS_TAG, MOST_MEMBERS)
    return tuple(NAME.read(each, f"{SURVIVORS_TAG} name") for each in found)


def agreement_to_bytes(confirmations: Sequence[Confirmation]) -> bytes:
    """Stage 5, coordinator to all: the signatures over U3."""
    return framed(AGREEMENT_TAG, *(each.to_bytes() for each in confirmations))


def agreement_from_bytes(data: bytes) -> tuple[Confirmation, ...]:
    """BadInput where it is no list of confirmations; whose they are is not asked."""
    found = unframed(data, AGREEMENT_TAG, MOST_MEMBERS)
    return tuple(Confirmation.from_bytes(each) for each in found)


def sized(data: bytes, size: int) -> bytes:
    """`data`; BadInput where it has another length."""
    return Plain(size).read(data, PROTOCOL)
