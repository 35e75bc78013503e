"""Files that are read back only as they were written: tables that carry their digest, and pages."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedlora.common.disk.mapped import by_stretches
from fedlora.common.errors import BadInput


def hashed(pieces: Iterable[bytes | memoryview], hasher: Any) -> Iterator[bytes | memoryview]:
    """The pieces, each added to the hash as it goes by."""
    for piece in pieces:
        hasher.update(piece)
        yield piece


def digest_of_pages(data: memoryview) -> str:
    """The SHA-256 of a mapped file's bytes, in hexadecimal digits."""
    hasher = hashlib.sha256()
    for (part,) in by_stretches(np.frombuffer(data, np.uint8)):
        hasher.update(part.data)
    return hasher.hexdigest()


def sealed(table: Mapping[str, Any]) -> bytes:
    """JSON that carries its own digest, so that a flipped bit is seen."""
    body = json.dumps(table, sort_keys=True)
    return json.dumps({"body": body, "sha256": hashlib.sha256(body.encode()).hexdigest()}).encode()


def unsealed(path: Path) -> dict[str, Any]:
    """The table of a sealed file; BadInput unless sealing it again gives the same bytes."""
    try:
        data = path.read_bytes()
        table = json.loads(json.loads(data)["body"])
        if isinstance(table, dict) and sealed(table) == data:
            return table
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadInput(
            f"{path}: found a checkpoint that can't be read ({type(error).__name__})"
        ) from error
    raise BadInput(f"{path}: found other bytes than were written")
