"""Frozen dataclasses as bytes: a tag and the fields, each behind its length in 8 bytes, big-endian.

So no two lists of fields give the same bytes. A field's type says how it is written: `bytes` as
they are, `int` as 8 bytes, big-endian, a value that says itself how it is written by its own
`to_bytes`, a tuple as a frame of its items with the tag `list`; `Annotated` says what else holds,
as `Digest`, `Key` and `Signature` below. One value has one encoding: what `unframe` accepts,
`frame` gives back byte for byte.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from functools import cache
from typing import Annotated, Any, ClassVar, Protocol, Self, TypeVar, get_args, get_origin
from typing import get_type_hints as hints_of

from fedlora.common.errors import BadInput

KEY_BYTES, SIGNATURE_BYTES = 32, 64
LIST_TAG = "list"
MOST_FIELDS = 16
_LENGTH = 8


def framed(tag: str, *parts: bytes) -> bytes:
    """The bytes that are hashed, signed or sent: tag and parts, each behind its length."""
    return b"".join(_pieces(tag, parts))


def digest(tag: str, *parts: bytes) -> bytes:
    """SHA-256 (32 bytes) of the framed parts."""
    hasher = hashlib.sha256()
    for piece in _pieces(tag, parts):  # a part may have megabytes: it is not copied
        hasher.update(piece)
    return hasher.digest()


def unframed(data: bytes | memoryview, tag: str, most: int = MOST_FIELDS) -> list[bytes]:
    """The parts behind `tag`, at most `most`; BadInput where `data` is not exactly such a frame."""
    found, *parts = _split(data, tag, most + 1) or [b""]
    if found != tag.encode():
        raise BadInput(f"{tag}: found another kind of message")
    return parts


def kind_of(data: bytes | memoryview, where: str) -> str:
    """The tag of a frame, printable and of at most 40 characters; BadInput where there is none."""
    end = _LENGTH + int.from_bytes(data[:_LENGTH], "big")
    kind = bytes(data[_LENGTH : min(end, _LENGTH + 160)]).decode(errors="replace")[:40]
    if not _LENGTH < end <= len(data) or not kind.isprintable():
        raise BadInput(f"{where}: found no kind")
    return kind


class Part(Protocol):
    """How one field is written, and what it must be to be read."""

    def write(self, value: Any) -> bytes:
        """A value that fits, as bytes; what does not is no input, and not checked."""

    def read(self, data: bytes, where: str) -> Any:
        """BadInput, which begins with `where`, for what `write` never gives."""


@dataclass(frozen=True)
class Plain(Part):
    """Bytes as they are, `size` of them where one is given."""

    size: int | None = None

    def write(self, value: bytes | memoryview) -> bytes:
        return bytes(value)

    def read(self, data: bytes, where: str) -> bytes:
        if self.size is not None and len(data) != self.size:
            raise BadInput(f"{where}: found a field of {len(data)} bytes, expected {self.size}")
        return data


@dataclass(frozen=True)
class Text(Part):
    """UTF-8 of `least` to `most` bytes; on one printable line where that is asked."""

    least: int
    most: int
    line: bool = False

    def write(self, value: str) -> bytes:
        return value.encode()

    def read(self, data: bytes, where: str) -> str:
        if not self.least <= len(data) <= self.most:
            raise BadInput(
                f"{where}: found {len(data)} bytes, expected {self.least} to {self.most}"
            )
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            raise BadInput(f"{where}: found bytes that are not UTF-8") from error
        if self.line and not text.isprintable():
            raise BadInput(f"{where}: expected one line of printable characters")
        return text


@dataclass(frozen=True)
class Whole(Part):
    """A whole number from 0 to `most`, as 8 bytes, big-endian."""

    most: int = (1 << 64) - 1

    def write(self, value: int) -> bytes:
        return value.to_bytes(_LENGTH, "big")

    def read(self, data: bytes, where: str) -> int:
        value = int.from_bytes(data, "big")
        if len(data) != _LENGTH or value > self.most:
            raise BadInput(f"{where}: found no number of {_LENGTH} bytes up to {self.most}")
        return value


@dataclass(frozen=True)
class Listed(Part):
    """At most `most` items of one kind, framed under LIST_TAG."""

    item: Part
    most: int

    def write(self, value: Sequence[Any]) -> bytes:
        return framed(LIST_TAG, *(self.item.write(each) for each in value))

    def read(self, data: bytes, where: str) -> tuple[Any, ...]:
        return tuple(self.item.read(each, where) for each in unframed(data, LIST_TAG, self.most))


@dataclass(frozen=True)
class OneOf(Part):
    """A member of a string enumeration, by its value."""

    kind: type[StrEnum]

    def write(self, value: StrEnum) -> bytes:
        return value.encode()

    def read(self, data: bytes, where: str) -> StrEnum:
        known = {each.encode(): each for each in self.kind}
        if data not in known:
            found = data[:40].decode(errors="replace")
            raise BadInput(f"{where}: found {found!r}, expected one of {', '.join(self.kind)}")
        return known[data]


@dataclass(frozen=True)
class Own(Part):
    """A value of a type that says itself how it is written."""

    kind: Any

    def write(self, value: Any) -> bytes:
        return bytes(value.to_bytes())

    def read(self, data: bytes, where: str) -> Any:
        return self.kind.from_bytes(data)


@dataclass(frozen=True)
class Most:
    """Beside a tuple's type: how many items it may have."""

    count: int


Digest = Annotated[bytes, Plain(hashlib.sha256().digest_size)]
Key = Annotated[bytes, Plain(KEY_BYTES)]
Signature = Annotated[bytes, Plain(SIGNATURE_BYTES)]


class Framed:
    """A frozen dataclass that is written as a frame under its `TAG`."""

    TAG: ClassVar[str]

    def to_bytes(self) -> bytes:
        """Its frame."""
        return frame(self)

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """BadInput for anything but the bytes that `to_bytes` gives."""
        return unframe(cls, data)


def parts_of(value: Any) -> tuple[bytes, ...]:
    """Each field of a framed dataclass as it is written, in order."""
    kind: Any = type(value)
    return tuple(part.write(getattr(value, name)) for name, part in _parts(kind))


def frame(value: Any, tag: str = "") -> bytes:
    """A framed dataclass as bytes, under another tag than its own where one is given."""
    return framed(tag or value.TAG, *parts_of(value))


T = TypeVar("T")


def unframe(cls: type[T], data: bytes | memoryview, tag: str = "") -> T:
    """The value whose frame `data` is; BadInput names the field that is not what it must be."""
    kind: Any = cls
    tag, known = tag or kind.TAG, _parts(kind)
    found = unframed(data, tag)
    if len(found) != len(known):
        raise BadInput(f"{tag}: found {len(found)} fields, expected {len(known)}")
    values = {
        name: part.read(each, f"{tag} {name}")
        for (name, part), each in zip(known, found, strict=True)
    }
    return cls(**values)


@cache
def _parts(cls: type[Any]) -> tuple[tuple[str, Part], ...]:
    hints = hints_of(cls, include_extras=True)
    return tuple((field.name, _part(hints[field.name])) for field in fields(cls))


def _part(hint: Any, most: int = MOST_FIELDS) -> Part:
    """How a field of this type is written; TypeError for a type that none of these can write."""
    if get_origin(hint) is Annotated:
        kind, more = get_args(hint)
        return _part(kind, more.count) if isinstance(more, Most) else more
    if get_origin(hint) is tuple:
        return Listed(_part(get_args(hint)[0]), most)
    if hint is bytes:
        return Plain()
    if hint is int:
        return Whole()
    if hasattr(hint, "from_bytes"):
        return Own(hint)
    raise TypeError(f"{hint}: expected bytes, int, a tuple, or a type that is written as bytes")


def _pieces(tag: str, parts: Sequence[bytes]) -> Iterator[bytes]:
    for part in (tag.encode(), *parts):
        yield struct.pack(">Q", len(part))
        yield part


def _split(data: bytes | memoryview, where: str, most: int) -> list[bytes]:
    """The parts of a frame; nothing is copied before its length is known to lie within `data`."""
    parts: list[bytes] = []
    at = 0
    while at < len(data):
        start = at + _LENGTH
        length = int.from_bytes(data[at:start], "big") if start <= len(data) else len(data)
        if length > len(data) - start or len(parts) == most:
            raise BadInput(
                f"{where}: found a field that does not end within the message, or too many fields"
            )
        parts.append(bytes(data[start : start + length]))
        at = start + length
    return parts
