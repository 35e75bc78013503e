"""What a dealer signs about its shares: a Merkle root over one leaf for each receiver.

A leaf is made of the hashes of that receiver's shares, two for each attempt (of b, then of s). A
receiver proves its own leaf by a path of about log2(n) hashes; the coordinator keeps all hashes and
checks every opened share. A share is 256 bits that t - 1 others say nothing about, so its hash says
nothing about it either.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedlora.common.codec.framing import digest
from fedlora.common.errors import BadInput, Refused

DIGEST_BYTES = 32


def share_hash(
    cohort: bytes, dealer: str, receiver: str, attempt: int, kind: str, share: bytes
) -> bytes:
    """The hash of one share; `kind` is "b" or "s"."""
    fields = (
        cohort,
        dealer.encode(),
        receiver.encode(),
        attempt.to_bytes(8, "big"),
        kind.encode(),
        share,
    )
    return digest("fedlora-secagg-1 share", *fields)


def seed_hash(cohort: bytes, dealer: str, attempt: int, seed: bytes) -> bytes:
    """The hash of a dealer's b itself, so that a rebuilt b can be checked."""
    return digest(
        "fedlora-secagg-1 seed", cohort, dealer.encode(), attempt.to_bytes(8, "big"), seed
    )


def leaf(hashes: bytes) -> bytes:
    """The leaf of a receiver, from the hashes of all its shares."""
    return digest("fedlora-secagg-1 leaf", hashes)


class MerkleTree:
    """Over the leaves of one dealer; a last one without a sibling moves up as it is."""

    def __init__(self, leaves: Sequence[bytes]) -> None:
        self._levels = [list(leaves)]
        while len(self._levels[-1]) > 1:
            below = self._levels[-1]
            pairs = [below[at : at + 2] for at in range(0, len(below), 2)]
            self._levels.append([_parent(*pair) if len(pair) == 2 else pair[0] for pair in pairs])

    @property
    def root(self) -> bytes:
        """What the dealer signs, 32 bytes."""
        return self._levels[-1][0]

    def path(self, index: int) -> bytes:
        """The siblings from a leaf to the root, one after the other."""
        path = []
        for level in self._levels[:-1]:
            if index ^ 1 < len(level):
                path.append(level[index ^ 1])
            index //= 2
        return b"".join(path)


def check_path(root: bytes, found: bytes, index: int, count: int, path: bytes, where: str) -> None:
    """Refused unless `found` is the leaf at `index` of the `count` leaves under `root`."""
    if len(path) % DIGEST_BYTES:
        raise BadInput(
            f"{where}: found a path of {len(path)} bytes, expected hashes of {DIGEST_BYTES}"
        )
    siblings = [path[at : at + DIGEST_BYTES] for at in range(0, len(path), DIGEST_BYTES)]
    node = found
    while count > 1:
        if index ^ 1 < count:
            if not siblings:
                raise Refused(f"{where}: found too short a path")
            sibling = siblings.pop(0)
            node = _parent(sibling, node) if index & 1 else _parent(node, sibling)
        index, count = index // 2, (count + 1) // 2
    if siblings or node != root:
        raise Refused(f"{where}: found shares that its dealer did not sign")


def _parent(left: bytes, right: bytes) -> bytes:
    return digest("fedlora-secagg-1 node", left, right)
