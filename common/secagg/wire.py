"""Contexts and messages as canonical bytes.

Every message is `framed`: a tag and its fields, each behind its length in 8 bytes, big-endian; a
list is a field that is framed itself. Numbers have 8 bytes, big-endian; names are UTF-8. One value
has one encoding: whatever does not read back to the same bytes is refused. `CLEAR_FIELDS` is all
that a coordinator sees of a node.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from fedlora.common.errors import BadInput
from fedlora.common.trust.identity import KEY_BYTES, SIGNATURE_BYTES, digest, framed

PROTOCOL = "fedlora-secagg-1"
KEYS, COHORT, SHARES, DEALERS = (
    f"{PROTOCOL} {stage}" for stage in ("keys", "cohort", "shares", "dealers")
)
INPUT, SURVIVORS, CONFIRM, AGREEMENT, OPENING = (
    f"{PROTOCOL} {stage}" for stage in ("masked", "survivors", "confirm", "agreement", "opening")
)
MOST_MEMBERS = 1000  # a complete graph is quadratic: see docs/secure-aggregation.md
MOST_ATTEMPTS = 256  # of an epoch
MOST_NAME_BYTES = 256
_LENGTH = 8

# What a coordinator sees of a node, and why it says nothing about that node's update.
# docs/secure-aggregation.md holds this as a table; a test compares it, and all messages' fields.
CLEAR_FIELDS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "KeyOffer": {
            "name": "who speaks",
            "epoch": "hash of federation, run, epoch and its attempts",
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
    return value.to_bytes(8, "big")


def names_digest(tag: str, *fields: bytes, names: Sequence[str]) -> bytes:
    return digest(tag, *fields, *(name.encode() for name in names))


@dataclass(frozen=True)
class Epoch:
    """Keys and shares for the attempts `first` … `first + count - 1` of a run."""

    federation: str
    run: str  # the manifest's digest
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
        return range(self.first, self.first + self.count)

    @property
    def digest(self) -> bytes:
        fields = (self.federation.encode(), self.run.encode())
        numbers = (number(self.number), number(self.first), number(self.count))
        return digest(f"{PROTOCOL} epoch", *fields, *numbers)

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
class KeyOffer:
    """Stage 1, node to coordinator: fresh keys for an epoch."""

    name: str
    epoch: bytes
    share_key: bytes
    mask_keys: tuple[bytes, ...]
    signature: bytes = b""

    def signed(self) -> tuple[bytes, ...]:
        return (self.epoch, self.name.encode(), self.share_key, framed("list", *self.mask_keys))

    def to_bytes(self) -> bytes:
        return framed(KEYS, *self.signed(), self.signature)

    @classmethod
    def from_bytes(cls, data: bytes) -> KeyOffer:
        epoch, name, share_key, masks, signature = fields_of(data, KEYS, 5)
        mask_keys = tuple(fields_of(masks, "list", None, MOST_ATTEMPTS, KEY_BYTES))
        return cls(
            name_of(name), sized(epoch, 32), sized(share_key, 32), mask_keys, _signature(signature)
        )


@dataclass(frozen=True)
class Deal:
    """Stage 2, node to coordinator: U1's sealed shares, in order, and what is signed of them."""

    name: str
    cohort: bytes
    sealed: tuple[bytes, ...]  # empty at the dealer's own place
    # for each receiver in order, for each attempt: of the share of b, of the share of s
    hashes: bytes
    seeds: bytes  # for each attempt: of b
    signature: bytes = b""

    def to_bytes(self) -> bytes:
        sealed = framed("list", *self.sealed)
        return framed(
            SHARES, self.name.encode(), self.cohort, sealed, self.hashes, self.seeds, self.signature
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> Deal:
        name, cohort, sealed, hashes, seeds, signature = fields_of(data, SHARES, 6)
        parts = tuple(fields_of(sealed, "list", None, MOST_MEMBERS))
        return cls(name_of(name), sized(cohort, 32), parts, hashes, seeds, _signature(signature))


@dataclass(frozen=True)
class Dealer:
    """An entry of U2: the root and the seed hashes that a member signed for this U1."""

    name: str
    root: bytes
    seeds: bytes
    signature: bytes

    def signed(self, cohort: bytes) -> tuple[bytes, ...]:
        return (cohort, self.name.encode(), self.root, self.seeds)

    def to_bytes(self) -> bytes:
        return framed("dealer", self.name.encode(), self.root, self.seeds, self.signature)

    @classmethod
    def from_bytes(cls, data: bytes) -> Dealer:
        name, root, seeds, signature = fields_of(data, "dealer", 4)
        return cls(name_of(name), sized(root, 32), seeds, _signature(signature))


@dataclass(frozen=True)
class Delivery:
    """Stage 2, coordinator to one node.

    U2, and for each of its dealers that node's sealed shares and path.
    """

    dealers: tuple[Dealer, ...]
    sealed: tuple[bytes, ...]
    paths: tuple[bytes, ...]

    def to_bytes(self) -> bytes:
        dealers = framed("list", *(dealer.to_bytes() for dealer in self.dealers))
        return framed(DEALERS, dealers, framed("list", *self.sealed), framed("list", *self.paths))

    @classmethod
    def from_bytes(cls, data: bytes) -> Delivery:
        dealers, sealed, paths = fields_of(data, DEALERS, 3)
        read = tuple(
            Dealer.from_bytes(each) for each in fields_of(dealers, "list", None, MOST_MEMBERS)
        )
        parts = [tuple(fields_of(each, "list", None, MOST_MEMBERS)) for each in (sealed, paths)]
        if not len(read) == len(parts[0]) == len(parts[1]):
            raise BadInput(
                f"{DEALERS}: found lists of {len(read)}, {len(parts[0])} and {len(parts[1])}"
            )
        return cls(read, *parts)


@dataclass(frozen=True, eq=False)
class MaskedInput:
    """Stage 3, node to coordinator: the masked update."""

    name: str
    context: bytes
    dealers: bytes  # H(U2)
    vector: bytes | memoryview
    signature: bytes = b""

    def signed(self) -> tuple[bytes, ...]:
        return (
            self.context,
            self.dealers,
            self.name.encode(),
            digest("vector", bytes(self.vector)),
        )

    def to_bytes(self) -> bytes:
        return framed(
            INPUT,
            self.name.encode(),
            self.context,
            self.dealers,
            bytes(self.vector),
            self.signature,
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> MaskedInput:
        name, context, dealers, vector, signature = fields_of(data, INPUT, 5)
        return cls(
            name_of(name), sized(context, 32), sized(dealers, 32), vector, _signature(signature)
        )


@dataclass(frozen=True)
class Confirmation:
    """Stage 4, node to coordinator: a signature over context, H(U1), H(U2) and H(U3)."""

    name: str
    signature: bytes

    def to_bytes(self) -> bytes:
        return framed(CONFIRM, self.name.encode(), self.signature)

    @classmethod
    def from_bytes(cls, data: bytes) -> Confirmation:
        name, signature = fields_of(data, CONFIRM, 2)
        return cls(name_of(name), _signature(signature))


@dataclass(frozen=True)
class Opening:
    """Stage 5, node to coordinator: one share for each of U2, in order.

    `NO_SHARE` where the dealer's was bad.
    """

    name: str
    shares: bytes
    signature: bytes = b""

    def signed(self, context: bytes, survivors: bytes) -> tuple[bytes, ...]:
        return (context, survivors, self.name.encode(), self.shares)

    def to_bytes(self) -> bytes:
        return framed(OPENING, self.name.encode(), self.shares, self.signature)

    @classmethod
    def from_bytes(cls, data: bytes) -> Opening:
        name, shares, signature = fields_of(data, OPENING, 3)
        return cls(name_of(name), shares, _signature(signature))


NO_SHARE = b"\xff" * 32  # no element of the field


def cohort_to_bytes(offers: Sequence[bytes]) -> bytes:
    """Stage 1, coordinator to all: U1, as its members' own signed offers."""
    return framed(COHORT, *offers)


def cohort_from_bytes(data: bytes) -> tuple[KeyOffer, ...]:
    return tuple(KeyOffer.from_bytes(each) for each in fields_of(data, COHORT, None, MOST_MEMBERS))


def survivors_to_bytes(names: Sequence[str]) -> bytes:
    """Stage 4, coordinator to all: U3."""
    return framed(SURVIVORS, *(name.encode() for name in names))


def survivors_from_bytes(data: bytes) -> tuple[str, ...]:
    return tuple(name_of(each) for each in fields_of(data, SURVIVORS, None, MOST_MEMBERS))


def agreement_to_bytes(confirmations: Sequence[Confirmation]) -> bytes:
    """Stage 5, coordinator to all: the signatures over U3."""
    return framed(AGREEMENT, *(each.to_bytes() for each in confirmations))


def agreement_from_bytes(data: bytes) -> tuple[Confirmation, ...]:
    return tuple(
        Confirmation.from_bytes(each) for each in fields_of(data, AGREEMENT, None, MOST_MEMBERS)
    )


def fields_of(
    data: bytes, tag: str, count: int | None, most: int = 16, size: int | None = None
) -> list[bytes]:
    """The fields behind `tag`; BadInput unless exactly `count` (None: at most `most`) follow."""
    parts: list[bytes] = []
    at = 0
    while at < len(data):
        end = at + _LENGTH
        length = struct.unpack(">Q", data[at:end])[0] if end <= len(data) else len(data)
        if length > len(data) - end or len(parts) > (most if count is None else count):
            raise BadInput(
                f"{tag}: found a field that does not end within the message, or too many fields"
            )
        parts.append(bytes(data[end : end + length]))
        at = end + length
    if not parts or parts[0] != tag.encode():
        raise BadInput(f"{tag}: found another kind of message")
    found = parts[1:]
    if count is not None and len(found) != count:
        raise BadInput(f"{tag}: found {len(found)} fields, expected {count}")
    if size is not None:
        return [sized(each, size) for each in found]
    return found


def sized(data: bytes, size: int) -> bytes:
    if len(data) != size:
        raise BadInput(f"{PROTOCOL}: found a field of {len(data)} bytes, expected {size}")
    return data


def name_of(data: bytes) -> str:
    try:
        name = data.decode()
    except UnicodeDecodeError as error:
        raise BadInput(f"{PROTOCOL} name: found bytes that are not UTF-8") from error
    if not 1 <= len(data) <= MOST_NAME_BYTES:
        raise BadInput(f"{PROTOCOL} name: found {len(data)} bytes, expected 1 to {MOST_NAME_BYTES}")
    return name


def _signature(data: bytes) -> bytes:
    return sized(data, SIGNATURE_BYTES)
