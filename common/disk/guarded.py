"""Files that decide what a node does: whoever could write one could decide in its owner's place."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from fedlora.common.disk.files import bounded
from fedlora.common.errors import BadInput, Refused


def read_guarded(path: Path, expected: str, limit: int) -> bytes:
    """The bytes, at most `limit`, of a file that only its owner can write, or replace by another.

    Refused where others can, or where it is a link; BadInput where it can't be read. `expected`
    says in a message what it is.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise Refused(f"{path}: found a link, expected {expected} itself") from error
        raise BadInput(f"{path}: can't be read ({error.strerror}), expected {expected}") from error
    with os.fdopen(descriptor, "rb") as stream:
        held = os.fstat(descriptor)
        folder = path.resolve().parent.stat()
        if not stat.S_ISREG(held.st_mode):
            raise BadInput(f"{path}: found no plain file, expected {expected}")
        if held.st_mode & 0o022 or held.st_uid not in (0, os.geteuid()):
            raise Refused(
                f"{path}: found a file that others can write (mode {held.st_mode & 0o777:04o},"
                f" owner {held.st_uid}), expected mode 0644 or less and this user's or root's"
            )
        if folder.st_mode & 0o022 and not folder.st_mode & stat.S_ISVTX:
            raise Refused(
                f"{path.parent}: found a folder that others can write, expected mode 0755 or less"
            )
        return bounded(stream, path.name, limit)
