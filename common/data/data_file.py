"""Data as it lies: which files are meant, their columns, within bounds, and the digest of bytes.

A file, a folder of them, shards by a glob, or what `datasets` saves to disk; with or without .gz,
endings in any case. Rows of several files are counted on, in the order of their names. Every fault
is one line that names file, and row or line.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from fedlora.common.config.toml import shown
from fedlora.common.data.formats import READERS, Values, check_size, kind_of
from fedlora.common.data.origin import Origin
from fedlora.common.errors import BadInput

STATE, SPLITS = "state.json", "dataset_dict.json"  # of a folder that `datasets` saved
# What lies beside parts and is none: a writer's own marks, and what is hidden.
_ASIDE, _MARKS = ("_", "."), (".crc", ".fedlora-ledger")
# Images and sounds, which a table beside them names: read by their path, row by row.
_MEDIA = frozenset(
    [".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".wav", ".flac", ".ogg", ".mp3"]
)
_GLOB = frozenset("*?[")
TELLING = 4096  # bytes of one of several files from which its digest tells it from others


def columns_of(path: Path, wanted: Sequence[str], root: Path | None) -> dict[str, Values]:
    """The wanted columns as they stand in the files: name to one value a record, in their order.

    BadInput where one can't be read, lacks a column, or, `root` given, lies outside of it.
    """
    found: dict[str, Values] = {name: [] for name in wanted}
    parts = parts_of(path, root)
    check_size(sum(part.stat().st_size for part in parts), path.name)
    for part in parts:
        try:
            columns = READERS[kind_of(part)](part, wanted, part.name)
        except OSError as error:
            reason = error.strerror or str(error).splitlines()[0]
            raise BadInput(f"{part}: can't be read ({reason}), expected a data file") from error
        for name in wanted:
            found[name] += columns[name]
    return found


def named_data(name: str, where: str) -> Path:
    """The path that a configuration or a policy names; `where` is the file and field that did.

    BadInput, which says so, where it means no data files.
    """
    path = Path(name)
    try:
        parts_of(path)
    except BadInput as error:
        known = f"{path}: ", f"{path.name}: "  # said once
        faults = [fault.removeprefix(known[0]).removeprefix(known[1]) for fault in error.faults]
        raise BadInput([f"{where} = {shown(name)}: {fault}" for fault in faults]) from error
    return path


def parts_of(path: Path, root: Path | None = None) -> tuple[Path, ...]:
    """The files that a path means, sorted; BadInput where there is none, or one can't serve."""
    if path.is_dir():
        parts = _of_folder(path)
    elif _GLOB & set(path.name) and not path.exists():
        parts = [each for each in path.parent.glob(path.name) if each.is_file()]
    else:
        parts = [path]
    known = ", ".join(READERS)
    if not parts:
        raise BadInput(f"{path}: found no data files, expected at least one of {known}")
    for part in parts:
        if kind_of(part) not in READERS:
            raise BadInput(
                f"{part.name}: found {kind_of(part) or 'no ending'}, expected one of {known}, or"
                " with .gz"
            )
        if root is not None and not part.resolve().is_relative_to(root.resolve()):
            raise BadInput(
                f"{part.name}: leads to a place outside {root.name}, expected a file inside it"
            )
        if not part.is_file():
            found = "a link that leads to no file" if part.is_symlink() else "no such file"
            raise BadInput(f"{part}: found {found}, expected one of {known}")
    return tuple(sorted(parts))


def _of_folder(folder: Path) -> list[Path]:
    """All data files below it, media apart; of what `datasets` saved, those of its state."""
    if (folder / SPLITS).is_file():
        splits = [each.name for each in sorted(folder.iterdir()) if (each / STATE).is_file()]
        raise BadInput(
            f"{folder}: found a folder of the splits {', '.join(splits)}, expected one of them"
        )
    if (folder / STATE).is_file():
        try:
            files = json.loads((folder / STATE).read_text(encoding="utf-8"))["_data_files"]
            return [folder / Path(str(each["filename"])).name for each in files]
        except (ValueError, KeyError, TypeError) as error:
            raise BadInput(f"{folder / STATE}: found no list of data files") from error
    return [
        each
        for each in _inside(folder)
        if not any(name.startswith(_ASIDE) for name in each.relative_to(folder).parts)
        and each.suffix not in _MARKS
        and each.suffix.lower() not in _MEDIA
    ]


def _inside(folder: Path) -> Iterator[Path]:
    """All files below, with links that lead nowhere, which may have been data.

    BadInput where a folder can't be looked into: what it holds would be left out unsaid.
    """

    def refuse(error: OSError) -> None:
        reason = f"can't be read ({error.strerror}), expected a folder of data files"
        raise BadInput(f"{error.filename}: {reason}") from error

    for place, _, names in os.walk(folder, onerror=refuse):
        found = (Path(place, name) for name in names)
        yield from (each for each in found if each.is_file() or not each.exists())


def origin_of(path: Path) -> Origin:
    """Which files a path means, and the digest of their bytes; BadInput where they can't be read.

    The digest of one file is that of its bytes; of several, of their names and digests, in order.
    """
    try:
        found = [(part, _digest(part)) for part in parts_of(path)]
    except OSError as error:
        raise BadInput(f"{path}: can't be read ({error.strerror}), expected a data file") from error
    whole = found[0][1] if path.is_file() else _digest_of_several(path, found)
    files = tuple((str(part.resolve()), _telling(part, digest)) for part, digest in found)
    return Origin(str(path.resolve()), f"sha256:{whole}", files)


def _telling(part: Path, digest: str) -> str:
    """The digest, or "" of a file so small that others may be equal by chance, as empty shards are:
    it is known by its place.
    """
    return f"sha256:{digest}" if part.stat().st_size >= TELLING else ""


def file_digest(path: Path) -> str:
    """`origin_of`'s digest alone."""
    return origin_of(path).digest


def _digest_of_several(path: Path, found: Sequence[tuple[Path, str]]) -> str:
    root = path if path.is_dir() else path.parent
    lines = (f"{part.relative_to(root).as_posix()}\0{digest}\n" for part, digest in found)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def files_stamp(path: Path) -> str:
    """sha256 of names, sizes, places and times of the files that a path means; reads none.

    A path that means no data files has a stamp too. OSError where a file can't be looked at.
    """
    try:
        parts = parts_of(path)
    except BadInput:
        parts = ()
    hasher = hashlib.sha256()
    for part in parts:
        found = part.stat()
        facts = (found.st_size, found.st_dev, found.st_ino, found.st_mtime_ns, found.st_ctime_ns)
        hasher.update(f"{part}\0{facts}\n".encode(errors="surrogateescape"))
    return "sha256:" + hasher.hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
