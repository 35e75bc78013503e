"""Files that decide what a node does: whoever could write one could decide in its owner's place."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from fedlora.common.disk.files import bounded
from fedlora.common.errors import BadInput, Refused

_MOST_PARTS = 4096  # of a path whose links are followed


def read_guarded(path: Path, expected: str, limit: int) -> bytes:
    """The bytes, at most `limit`, of a file that only its owner can write, or replace by another.

    Refused where others can, by any folder on the way from the root, or where it is a link;
    BadInput where it can't be read. `expected` says in a message what it is.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise Refused(f"{path}: found a link, expected {expected} itself") from error
        raise BadInput(f"{path}: can't be read ({error.strerror}), expected {expected}") from error
    held = os.fstat(descriptor)
    if not stat.S_ISREG(held.st_mode):
        os.close(descriptor)
        raise BadInput(f"{path}: found no plain file, expected {expected}")
    with os.fdopen(descriptor, "rb") as stream:
        if held.st_mode & 0o022 or not _is_ours(held):
            raise Refused(
                f"{path}: found a file that others can write (mode {held.st_mode & 0o777:04o},"
                f" owner {held.st_uid}), expected mode 0644 or less and this user's or root's"
            )
        for each in _on_the_way(path):
            _check_place(each, os.lstat(each), path.name)
        return bounded(stream, path.name, limit)


def _check_place(place: Path, at: os.stat_result, name: str) -> None:
    """Refused where others could put another thing in the place of what is in a folder, or of a
    link.

    In a folder with the sticky bit, as /tmp, nobody but its owner moves what is another's.
    """
    link = stat.S_ISLNK(at.st_mode)  # whose mode says nothing
    free = at.st_mode & 0o022 and not at.st_mode & stat.S_ISVTX and not link
    if free or not _is_ours(at):
        raise Refused(
            f"{place}: found a {'link' if link else 'folder'} that others can write on the way to"
            f" {name} (mode {at.st_mode & 0o7777:04o}, owner {at.st_uid}), expected mode 0755 or"
            " less, or a sticky bit, and this user's or root's"
        )


def _is_ours(at: os.stat_result) -> bool:
    return at.st_uid in (0, os.geteuid())


def _on_the_way(path: Path) -> Iterator[Path]:
    """Every folder and link by which the system finds `path`, from the root on."""
    place, parts = Path("/"), list(path.absolute().parts[1:])
    yield place
    for _ in range(_MOST_PARTS):
        if len(parts) <= 1:  # the file, which is no link
            return
        place = place.parent if (part := parts.pop(0)) == ".." else place / part
        yield place
        if place.is_symlink():
            target = place.readlink()
            parts = [*target.parts[target.is_absolute() :], *parts]
            place = Path("/") if target.is_absolute() else place.parent
    raise Refused(f"{path}: found links that lead to links, expected a file")
