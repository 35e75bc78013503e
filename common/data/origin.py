"""Where data were read from: what tells whether two names mean the same bytes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Origin:
    """Empty where nothing is known. Digests are "sha256:" and hexadecimal digits."""

    path: str = ""  # as it was named, without links
    digest: str = ""  # of all bytes
    # Each file's place, without links, and its digest, or "" of a small one. A folder and a glob
    # mean their files.
    files: tuple[tuple[str, str], ...] = ()


NOWHERE = Origin()
