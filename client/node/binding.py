"""What a data file is bound to: one budget of the policy, and one ledger.

A budget belongs to a population. Two ledgers that charged one file would each let its whole budget
be spent. So the first ledger whose node consents to a run leaves a mark beside the run's data,
`NAME.fedlora-ledger`, which holds the ledger's id, and every other ledger that meets the mark
refuses. A folder has one mark for what lies in it; what a link in it leads to, and each file that a
glob finds, has its own. Where the data are read-only, marks lie in the folder that `[ledger] marks`
names. A mark is of a place: a copy of the data, a second hard link, or a mark that somebody
removed, is not noticed.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fedlora.client.node.policy import DataPolicy
from fedlora.common.codec.strict import from_canonical, to_canonical
from fedlora.common.data.data_file import parts_of
from fedlora.common.disk.files import bounded, create_once
from fedlora.common.errors import BadInput, Refused

MARK = ".fedlora-ledger"
MAX_MARK_BYTES = 4096


@dataclass(frozen=True)
class _Mark:
    """What stands in the file: the id of the ledger that its data charge."""

    ledger: str


def check_budgets(data: Mapping[str, DataPolicy], root: Path, where: str) -> None:
    """BadInput where two data sets are one file, by whatever name, and charge two budgets.

    Relative paths start in `root`.
    """
    faults, seen = [], list[tuple[str, Path]]()
    for name, each in data.items():
        path = root / each.path
        for other, known in seen:
            if data[other].budget != each.budget and _same_file(path, known):
                faults.append(
                    f"{where} [data.{name}] path: found the file of [data.{other}], which charges"
                    f" [budgets.{data[other].budget}], expected one budget for one file"
                )
        seen.append((name, path))
    if faults:
        raise BadInput(faults)


def check_mark(path: Path, ledger: str, marks: Path | None) -> bool:
    """Whether this ledger, by its id, has marked all of the data; Refused where another one has."""
    for mark in _readable(path, marks):
        found = _owner(mark)
        if found not in ("", ledger):
            raise Refused(
                f"{mark}: found the mark of ledger {found}, expected {ledger}, this node's: these"
                " data charge the other one; name it under [ledger] path"
            )
    return all(_owner(mark) for mark in _writable(path, marks))


def bind(path: Path, ledger: str, marks: Path | None) -> None:
    """Mark data as this ledger's; Refused where they are another's, or no mark can be made."""
    if check_mark(path, ledger, marks):
        return
    made = []
    try:
        for mark in _writable(path, marks):
            if not _owner(mark):
                _make(mark, ledger, marks)
                made.append(mark)
        check_mark(path, ledger, marks)  # another ledger may have been first
    except Refused:
        for mark in made:  # else two that began at once would keep each other out for good
            if _owner(mark) == ledger:
                mark.unlink(missing_ok=True)
        raise


def _make(mark: Path, ledger: str, marks: Path | None) -> None:
    """Write the mark, unless another one is there by now."""
    try:
        if marks is not None:
            marks.mkdir(parents=True, exist_ok=True)
        create_once(mark, to_canonical(_Mark(ledger)))
    except OSError as error:
        raise Refused(
            f"{mark}: could not be written ({error.strerror}), expected the mark of the ledger"
            " that these data charge; for read-only data name a folder under [ledger] marks,"
            " one for all nodes that have these data"
        ) from error


def _writable(path: Path, marks: Path | None) -> list[Path]:
    """Where this node writes its marks of the data.

    A folder of marks has them side by side, by name: there each file has its own, in a folder too.
    """
    if marks is None:
        return [each.with_name(each.name + MARK) for each in _marked(path)]
    names = {each.name for each in (*_marked(path), *_files(path))}
    return [marks / (name + MARK) for name in sorted(names)]


def _readable(path: Path, marks: Path | None) -> list[Path]:
    """Where a mark may lie: of the data, of a folder round them, and of what is in them."""
    around = {
        each.with_name(each.name + MARK)
        # the path itself, too: of a glob, earlier versions marked the name
        for real in (*_marked(path), path.resolve())
        for each in (real, *real.parents)
        if each.name
    }
    inside = sorted(path.rglob("*" + MARK)) if path.is_dir() else []
    kept = [] if marks is None else _writable(path, marks)
    return [*sorted(around), *inside, *kept]


def _marked(path: Path) -> list[Path]:
    """What has a mark of its own, without links: the path itself, unless it is a glob, and each of
    its files that doesn't lie in it.
    """
    real, parts = path.resolve(), _files(path)
    roots = [real] if real.exists() or not parts else []
    return [*roots, *(each for each in parts if each != real and real not in each.parents)]


def _files(path: Path) -> list[Path]:
    """The files that a path means, without links; none where there are none yet."""
    try:
        return sorted({each.resolve() for each in parts_of(path)})
    except BadInput:
        return []


def _owner(mark: Path) -> str:
    """The id of the ledger that wrote a mark, or "" where there is none."""
    try:
        descriptor = os.open(mark, os.O_RDONLY | os.O_NOFOLLOW)
        with os.fdopen(descriptor, "rb") as stream:
            data = bounded(stream, mark.name, MAX_MARK_BYTES)
        return from_canonical(_Mark, data, mark.name).ledger
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return ""
        raise Refused(f"{mark}: can't be read ({error.strerror}), expected a mark") from error
    except BadInput as error:
        raise Refused(f"{mark}: found none that a ledger wrote ({error.faults[0]})") from error


def _same_file(one: Path, other: Path) -> bool:
    """Whether both are one file, have one in common, or one is a folder that holds the other."""
    mine, theirs = one.resolve(), other.resolve()
    if mine == theirs or mine in theirs.parents or theirs in mine.parents:
        return True
    return not _inodes(one).isdisjoint(_inodes(other))


def _inodes(path: Path) -> set[tuple[int, int]]:
    """Each file's, so that hard links are seen too; of what is there."""
    found = set()
    for each in _files(path):
        with suppress(OSError):
            stat = each.stat()
            found.add((stat.st_dev, stat.st_ino))
    return found
