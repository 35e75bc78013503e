"""Tables: their one spelling as bytes, and frozen dataclasses from what somebody else wrote.

Canonical JSON is UTF-8 with sorted keys, no white space and Python's shortest floats.

A field's type says what it may be: str, int, float, bool or bytes, another dataclass (a table), a
tuple (a list of one kind), one of these or None, or a type that reads itself from text. A `rule`
in its metadata may say more, and an `unwritten` value there is one that is never written: a later
field whose absence means what was so before. Every field that is missing, extra or not that is
named, in one BadInput. What no canonical bytes can hold is refused: surrogates, numbers that are
not finite, and integers beyond 64 bits.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from fedlora.common.errors import BadInput
from fedlora.common.terminal import printable

MAX_MESSAGE_BYTES = 1 << 20
MOST_PORT = 65535
T = TypeVar("T")
NOUNS = {str: "a string", int: "an integer", float: "a finite number", bool: "true or false"}


def canonical(value: Mapping[str, Any]) -> bytes:
    """The one spelling of a table; ValueError for what JSON or UTF-8 can't hold."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def check_port(port: int, zero: str) -> None:
    """BadInput unless `--port` is one of TCP's, or 0, which stands for what `zero` says."""
    if not 0 <= port <= MOST_PORT:
        raise BadInput(f"--port {port}: expected 1 to {MOST_PORT}, or 0: {zero}")


def digest_of(data: bytes) -> str:
    """`sha256:` and the hash of what somebody wrote or signed."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def json_table(data: bytes, where: str, limit: int = MAX_MESSAGE_BYTES) -> dict[str, Any]:
    """A JSON table in whatever spelling; BadInput for anything else, or more than `limit` bytes."""
    if len(data) > limit:
        raise BadInput(f"{where}: found {len(data)} bytes, expected at most {limit}")
    try:
        table = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{where}: found bytes that are not JSON ({error})") from error
    if not isinstance(table, dict):
        raise BadInput(f"{where}: found {type(table).__name__}, expected a table")
    return table


def build(cls: type[T], table: Any, where: str) -> T:
    """An instance of `cls`; BadInput has a line for each fault, which begins with `where`."""
    if not isinstance(table, Mapping):
        raise BadInput(f"{where}: found {type(table).__name__}, expected a table")
    kinds = get_type_hints(cls)
    known = {field.name: field.metadata.get("rule") for field in fields(cls)}  # type: ignore[arg-type]
    faults = [
        f"{where} {printable(str(name)[:80])}: unknown field" for name in table if name not in known
    ]
    values: dict[str, Any] = {}
    unwritten = unwritten_values(cls)
    for name, rule in known.items():
        place = f"{where} {name}"
        if name not in table and name in unwritten:
            values[name] = unwritten[name]
            continue
        if name not in table:
            faults.append(f"{place}: missing")
            continue
        try:
            values[name] = _read(kinds[name], table[name], place)
            if rule is not None and (fault := rule.fault(values[name], noun_of(kinds[name]))):
                faults.append(f"{place}: {fault}")
        except BadInput as error:
            faults += error.faults
    if faults:
        raise BadInput(faults)
    return cls(**values)


def to_canonical(value: Any) -> bytes:
    """A dataclass as canonical JSON."""
    table = asdict(value)
    for name, at in unwritten_values(type(value)).items():
        if table[name] == at:
            del table[name]
    return canonical(table)


def unwritten_values(cls: type) -> dict[str, Any]:
    """Of the fields of `cls` itself that have one, by name."""
    return {
        each.name: each.metadata["unwritten"]
        for each in fields(cls)
        if "unwritten" in each.metadata
    }


def from_canonical(cls: type[T], data: bytes, where: str, limit: int = MAX_MESSAGE_BYTES) -> T:
    """The instance of `cls` whose `to_canonical` gives exactly `data`; BadInput otherwise."""
    found = build(cls, json_table(data, where, limit), where)
    if to_canonical(found) != data:
        raise BadInput(f"{where}: found another spelling than the canonical one")
    return found


def noun_of(kind: Any) -> str:
    """What a scalar of this type is called, or an item of a tuple's; the first of a union's."""
    first = (get_args(kind) or (kind,))[0]
    return NOUNS.get(first, "a value")


def is_kind(value: Any, kind: Any) -> bool:
    """Whether a scalar is of this type, or one of a union's; an int is a float, a bool neither."""
    if get_args(kind):
        return any(is_kind(value, each) for each in get_args(kind))
    if isinstance(value, bool):
        return kind is bool
    if isinstance(value, str):
        return kind is str and not any(0xD800 <= ord(letter) < 0xE000 for letter in value)
    if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
        return False
    if kind is float:
        return isinstance(value, int | float) and math.isfinite(value)
    return isinstance(value, kind)


def converted(value: Any, kind: Any) -> Any:
    """A scalar of this kind as it stands in a field: a number is a float where one may be."""
    takes_float = float in (get_args(kind) or (kind,))
    return float(value) if takes_float and isinstance(value, int | float) else value


def _read(kind: Any, found: Any, where: str) -> Any:
    args = get_args(kind)
    if NoneType in args:
        return None if found is None else _read(args[args[0] is NoneType], found, where)
    if is_dataclass(kind) and not hasattr(kind, "from_text"):
        return build(kind, found, where)  # type: ignore[arg-type]
    if get_origin(kind) is tuple:
        if not isinstance(found, list):
            raise BadInput(f"{where}: found {type(found).__name__}, expected a list")
        return tuple(_read(args[0], each, where) for each in found)
    if hasattr(kind, "from_text"):
        return kind.from_text(_read(str, found, where), where)
    if not is_kind(found, kind):
        raise BadInput(f"{where}: found {_shown(found, kind)}, expected {kind.__name__}")
    return converted(found, kind)


def _shown(value: Any, kind: Any) -> str:
    """The type of a value that has another one, and else the value, in short."""
    if kind is float and type(value) is int:
        return "an integer out of range"
    return ascii(value)[:80] if type(value) is kind else type(value).__name__
