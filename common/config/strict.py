"""Frozen dataclasses from tables that somebody else wrote, with every wrong field named."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from fedlora.common.errors import BadInput

MAX_MESSAGE_BYTES = 1 << 20


def canonical(value: Mapping[str, Any]) -> bytes:
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def json_table(data: bytes, where: str) -> dict[str, Any]:
    if len(data) > MAX_MESSAGE_BYTES:
        raise BadInput(f"{where}: found {len(data)} bytes, expected at most {MAX_MESSAGE_BYTES}")
    try:
        table = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{where}: found bytes that are not JSON ({error})") from error
    if not isinstance(table, dict):
        raise BadInput(f"{where}: found {type(table).__name__}, expected a table")
    return table


T = TypeVar("T")
_KINDS: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
}


def build_strictly(cls: type[T], table: Mapping[str, Any], where: str) -> T:
    """A frozen dataclass from outside data; every missing, extra or mistyped field is named."""
    if not isinstance(table, Mapping):
        raise BadInput(f"{where}: found {type(table).__name__}, expected a table")
    names = {field.name: str(field.type) for field in fields(cls)}  # type: ignore[arg-type]
    faults = [f"{where} {name}: unknown field" for name in table if name not in names]
    for name, kind in names.items():
        if name not in table:
            faults.append(f"{where} {name}: missing")
        elif kind in _KINDS and not is_kind(table[name], kind):
            faults.append(f"{where} {name}: found {table[name]!r}, expected {kind}")
    if faults:
        raise BadInput(faults)
    values = {name: float(v) if names[name] == "float" else v for name, v in table.items()}
    return cls(**values)


def is_kind(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "bool"
    if isinstance(value, str):
        # can't be written
        return kind == "str" and not any(0xD800 <= ord(letter) < 0xE000 for letter in value)
    if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
        return False
    return isinstance(value, _KINDS[kind]) and (
        not isinstance(value, float) or math.isfinite(value)
    )
