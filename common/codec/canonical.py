"""JSON that has one spelling: UTF-8, sorted keys, no white space, Python's shortest floats."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fedlora.common.errors import BadInput

MAX_MESSAGE_BYTES = 1 << 20


def canonical(value: Mapping[str, Any]) -> bytes:
    """The one spelling of a table; ValueError for what JSON or UTF-8 can't hold."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


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
