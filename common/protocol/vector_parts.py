"""A vector that is too large for one message: parts of a public size, each known by its digest.

Who sends it signs one list of digests. So each part is held against that list before it is kept,
nothing is kept beyond the size that the run's manifest names, and what a cut left is gone on with.
A vector is cut where its coordinates end, and never in memory twice: parts are made when they are
sent, and added to a file as they come.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from fedlora.common.config.toml import Bounds, Each, Pattern
from fedlora.common.disk.files import sync_folder
from fedlora.common.disk.mapped import let_go
from fedlora.common.errors import BadInput
from fedlora.common.model.state import Vector
from fedlora.common.protocol.vectors import BYTES, vector_to_bytes

# What is larger travels in parts of this size: a node takes messages of 64 MiB, unless its policy
# says otherwise. Divisible by a word of 8 bytes.
PART_BYTES = 48 << 20
MOST_BYTES = 1 << 30  # of a vector
MOST_LISTED = 2 * MOST_BYTES + (1 << 20)  # masked words have 8 bytes, and something beside them
_DIGEST = Pattern(r"[0-9a-f]{64}", "64 hexadecimal digits")


@dataclass(frozen=True)
class Parts:
    """The list: `size` bytes in all, `part` of each but the last, and the SHA-256 of each."""

    size: int = field(metadata={"rule": Bounds(1, MOST_LISTED)})
    part: int = field(metadata={"rule": Bounds(1, PART_BYTES)})
    digests: tuple[str, ...] = field(metadata={"rule": Each(_DIGEST, distinct=False)})

    def check(self, least: int, most: int, where: str) -> None:
        """BadInput unless it is of `least` to `most` bytes, and of as many parts as these have."""
        if not least <= self.size <= most:
            raise BadInput(f"{where}: found {self.size} bytes, expected {least} to {most}")
        expected = -(-self.size // self.part)
        if len(self.digests) != expected:
            raise BadInput(f"{where}: found {len(self.digests)} digests, expected {expected}")

    def length(self, number: int) -> int:
        """Bytes of part `number`, from 0."""
        return min(self.part, self.size - number * self.part)

    def check_part(self, number: int, data: bytes, where: str) -> None:
        """BadInput unless these are the bytes of that part."""
        if not 0 <= number < len(self.digests):
            raise BadInput(f"{where}: found part {number}, expected 0 to {len(self.digests) - 1}")
        if len(data) != self.length(number):
            raise BadInput(
                f"{where} part {number}: found {len(data)} bytes, expected {self.length(number)}"
            )
        if hashlib.sha256(data).hexdigest() != self.digests[number]:
            raise BadInput(f"{where} part {number}: found other bytes than were signed for")


def is_large(size: int) -> bool:
    """Whether so many bytes are more than one part."""
    return size > PART_BYTES


def vector_size(size: int) -> int:
    """What a manifest says of an adapter of `size` coordinates: that many, where it travels in
    parts; 0 where one message takes it, or where none of them could.
    """
    return size if PART_BYTES < BYTES["float32"] * size <= MOST_BYTES else 0


def check_travels(size: int) -> None:
    """BadInput for an adapter of `size` coordinates that no institution could be sent."""
    if BYTES["float32"] * size > MOST_BYTES:
        raise BadInput(
            f"[lora]: found an adapter of {BYTES['float32'] * size} bytes, expected at most"
            f" {MOST_BYTES}: a smaller rank, or fewer targets or layers"
        )


def cut(vector: Vector, wire: str = "float32") -> Iterator[bytes]:
    """The parts of a (size,) vector as `wire` has it, made one after the other."""
    for number in range(-(-BYTES[wire] * len(vector) // PART_BYTES)):
        yield part_of(vector, number, wire)


def part_of(vector: Vector, number: int, wire: str = "float32") -> bytes:
    """Part `number` of them."""
    count = PART_BYTES // BYTES[wire]
    part = vector[number * count : (number + 1) * count]
    data = vector_to_bytes(part, wire)
    let_go(part)
    return data


def listed(parts: Iterable[bytes]) -> Parts:
    """The list of parts that were cut to the public size; they are looked at once, in order."""
    size, digests = 0, []
    for part in parts:
        size += len(part)
        digests.append(hashlib.sha256(part).hexdigest())
    return Parts(size, PART_BYTES, tuple(digests))


def cut_bytes(data: bytes) -> Iterator[bytes]:
    """The parts of bytes that are in memory."""
    for start in range(0, len(data), PART_BYTES):
        yield data[start : start + PART_BYTES]


def cut_file(path: Path) -> Iterator[bytes]:
    """The parts of a file's bytes."""
    number = 0
    while part := part_in_file(path, number):
        yield part
        number += 1


def part_in_file(path: Path, number: int) -> bytes:
    """Part `number` of a file's bytes; empty where it has none."""
    if not path.is_file():
        return b""
    with path.open("rb") as stream:
        stream.seek(number * PART_BYTES)
        return stream.read(PART_BYTES)


@dataclass(frozen=True)
class Arrival:
    """What has come of `parts`: a file that they are added to in their order, each durably.

    A part that a kill cut short is written over when it comes again.
    """

    path: Path
    parts: Parts

    @property
    def count(self) -> int:
        """How many parts are there: the number of the next one."""
        size = self.path.stat().st_size if self.path.is_file() else 0
        return len(self.parts.digests) if size == self.parts.size else size // self.parts.part

    @property
    def whole(self) -> bool:
        """Whether all of them are."""
        return self.count == len(self.parts.digests)

    def add(self, number: int, data: bytes, where: str) -> int:
        """Keep part `number` where it is the next one; the number of the next one after that.

        BadInput for other bytes than were signed for. One that is there already is not kept again.
        """
        self.parts.check_part(number, data, where)
        count = self.count
        if number != count:
            return count
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with os.fdopen(os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o600), "wb") as stream:
            _put(stream, number * self.parts.part, data)
        if number == 0:
            sync_folder(self.path.parent)
        return count + 1


def _put(stream: BinaryIO, place: int, data: bytes) -> None:
    stream.truncate(place)
    stream.seek(place)
    stream.write(data)
    stream.flush()
    os.fsync(stream.fileno())
