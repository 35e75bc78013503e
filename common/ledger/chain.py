"""An append-only chain of entries in SQLite, whose signed head lies in a second place.

Each entry holds the hash of the one before. The head (count and hash of the last entry) is a sealed
text of the ledger's own key, written after every entry, so that a chain that was deleted,
truncated, edited or restored from an older copy is refused, at opening and before every further
entry. An entry is durable before `append` returns; a kill between the entry and its head leaves the
head one behind, and the next one who looks signs it anew.

What this can't see: both places, or all three files, restored to the same older moment or deleted
together. Keep them on different disks, or have an anchor (`common.ledger.signed_head`), where that
matters.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.common.codec.strict import canonical
from fedlora.common.disk import locks
from fedlora.common.disk.files import sync_folder, write_atomically
from fedlora.common.errors import BadInput, FedloraError, Refused
from fedlora.common.ledger.signed_head import Anchor, Head, HeadFile, signed_head
from fedlora.common.terminal import SHORT_OF, one_line
from fedlora.common.trust.identity import Identity

KEYED_TAG = "fedlora-ledger-keyed-1"
# what SQLite calls a machine that ran out, in the low byte of its codes
SHORT_OF_IN_SQLITE = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_NOMEM)

_TABLE = (
    "CREATE TABLE entries (number INTEGER PRIMARY KEY, body TEXT NOT NULL, hash TEXT NOT NULL)"
    " STRICT"
)
_INSERT = "INSERT INTO entries VALUES (?, ?, ?)"
_HASH = "SELECT hash FROM entries WHERE number = ?"
_AFTER = "SELECT number, body, hash FROM entries WHERE number > ? ORDER BY number"


@dataclass(frozen=True)
class Entry:
    """One line of the chain; `body` has a key `kind`, and the rest by kind."""

    number: int
    body: dict[str, Any]
    hash: str


@dataclass(frozen=True)
class _Position:
    """How far a chain goes; `before` is the hash of the last entry but one."""

    count: int = 0
    hash: str = ""
    before: str = ""

    def next(self, text: str) -> _Position:
        digest = hashlib.sha256(f"{self.hash}\n{self.count + 1}\n{text}".encode()).hexdigest()
        return _Position(self.count + 1, digest, self.hash)


class Chain:
    """One open chain. `take` gets every entry's body once, in order, whoever wrote it."""

    def __init__(
        self,
        path: Path,
        head: Path,
        key: Identity,
        take: Callable[[Mapping[str, Any]], None],
        anchor: Path | None,
    ) -> None:
        self._path = path
        self._head = HeadFile(head, key)
        self._key = key
        self._take = take
        self._anchor = None if anchor is None else Anchor(anchor, key)
        self._at = _Position()
        self._connection = _connect(path, "rw")
        self.close = weakref.finalize(self, self._connection.close)
        self.close.atexit = False

    @classmethod
    def open(
        cls,
        path: Path,
        head: Path,
        key: Path,
        opening: Mapping[str, Any],
        take: Callable[[Mapping[str, Any]], None],
        anchor: Path | None = None,
    ) -> Chain:
        """Open a chain, or begin one with the entry `opening` where there was none.

        Refused where the chain is not the one that the head was signed for, or one of the three
        files is missing, or the anchor, if there is to be one, is ahead of the chain. BadInput
        where something else lies there, which a beginning would remove.
        """
        for each in (path, head, key):
            if each.is_dir():
                raise BadInput(f"ledger {each}: found a folder, expected a file, or none yet")
        with _refusing(path):
            for each in (path, head, key):
                each.parent.mkdir(parents=True, exist_ok=True)
        with _refusing(path), _exclusive(path):
            if not key.exists():
                _check_no_others(path)
            if _never_used(path, head, key):
                _begin(path, head, key, opening)
            missing = [each for each in (path, head, key) if not each.exists()]
            if missing:
                raise Refused(
                    f"ledger {path}: {', '.join(map(str, missing))} is missing, expected ledger,"
                    " head and key; it was deleted or moved, and without it nothing can be spent"
                )
            chain = cls(path, head, _loaded(key), take, anchor)
            try:
                chain._catch_up()
            except BaseException:
                chain.close()
                raise
        return chain

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One writer at a time over all processes, knowing every entry that others have added."""
        with _refusing(self._path), _exclusive(self._path):
            self._catch_up()
            yield

    @property
    def head(self) -> Head:
        """How far it goes, as far as this process has looked."""
        return Head(self._at.count, self._at.hash)

    @property
    def lacks_anchor(self) -> bool:
        """Whether there is to be an anchor, and none is there."""
        return self._anchor is not None and self._anchor.missing

    def keyed(self, text: str) -> str:
        """The same for the same text, and nothing to anybody without this chain's key.

        What an entry has of data: a plain digest would let guesses be tried on a head that leaves.
        """
        return "keyed:" + hashlib.sha256(self._key.sign(KEYED_TAG, text.encode())).hexdigest()

    def append(self, body: Mapping[str, Any]) -> None:
        """Add an entry, durable when this returns; only under `locked`."""
        text = _canonical(body)
        position = self._at.next(text)
        try:
            self._connection.execute(_INSERT, (position.count, text, position.hash))
        except sqlite3.Error as error:
            raise _kind(error)(
                f"ledger {self._path}: could not be written ({error}); nothing may be used"
            ) from error
        self._take(body)
        self._at = position
        self._write_head()

    def entries(self) -> list[Entry]:
        """All entries, oldest first, verified again."""
        with self.locked():
            entries = [entry for entry, _ in self._verified(_Position())]
            if len(entries) != self._at.count:
                raise Refused(
                    f"ledger {self._path}: found {len(entries)} entries, expected {self._at.count}"
                )
            return entries

    def _catch_up(self) -> None:
        """Verify and take in the entries after the last known, then hold them to the head."""
        for entry, position in self._verified(self._at):
            self._take(entry.body)
            self._at = position
        self._check_head()
        if self._anchor is not None:
            self._anchor.check(self.head, self._hash_of)

    def _hash_of(self, number: int) -> str:
        found = self._connection.execute(_HASH, (number,)).fetchone()
        return "" if found is None else str(found[0])

    def _verified(self, position: _Position) -> Iterator[tuple[Entry, _Position]]:
        for number, text, digest in self._connection.execute(_AFTER, (position.count,)).fetchall():
            position = position.next(text)
            if (number, digest) != (position.count, position.hash):
                raise Refused(
                    f"ledger {self._path} entry {number}: found other bytes than were written"
                )
            yield Entry(number, json.loads(text), digest), position

    def _check_head(self) -> None:
        """Refused unless the head is of this very chain; one entry behind, it is signed anew."""
        head = self._head.read()
        count, digest = head.count, head.hash
        if count > self._at.count:
            raise Refused(
                f"ledger {self._path}: found {self._at.count} entries, but {count} were signed: "
                "it was truncated or restored from an older copy"
            )
        if count < self._at.count - 1:
            raise Refused(
                f"ledger head {self._head.path}: found {count} entries, expected"
                f" {self._at.count}: it is an older copy"
            )
        if digest != (self._at.hash if count == self._at.count else self._at.before):
            raise Refused(f"ledger {self._path} entry {count}: found another hash than was signed")
        if count < self._at.count:
            self._write_head()  # somebody was killed between the entry and its head

    def _write_head(self) -> None:
        self._head.write(self.head)
        if self._anchor is not None:
            self._anchor.write(self.head)


def _loaded(key: Path) -> Identity:
    """The ledger's key; Refused where there is none, for without it nothing can be spent."""
    try:
        return Identity.load(key)
    except BadInput as error:
        raise Refused(str(error)) from error


def _never_used(path: Path, head: Path, key: Path) -> bool:
    """No key, and at most the opening entry: nothing was spent, at most a beginning killed.

    The key is the last file that a beginning writes. A deleted key with anything spent is not this.
    """
    if key.exists():
        return False
    try:
        found = json.loads(head.read_bytes()) if head.exists() else {"count": 0}
        signed = int(found.get("body", found)["count"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False
    return signed <= 1 and _count(path) <= 1


def _count(path: Path) -> int:
    if not path.exists():
        return 0
    with closing(_connect(path, "rw")) as connection:
        if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'entries'").fetchone():
            return 0
        (count,) = connection.execute("SELECT COUNT(*) FROM entries").fetchone()
        return int(count)


def _check_no_others(path: Path) -> None:
    """BadInput where a database lies that is no ledger: somebody's data, perhaps."""
    if not path.exists():
        return
    with closing(_opened(path, "ro")) as connection:
        found = connection.execute("SELECT name, sql FROM sqlite_master").fetchall()
    if any(each != ("entries", _TABLE) for each in found):
        names = ", ".join(one_line(str(name), 40) for name, _ in found[:3])
        raise BadInput(f"ledger {path}: found a database of {names}, expected a ledger, or no file")


def _begin(path: Path, head: Path, key: Path, opening: Mapping[str, Any]) -> None:
    for leftover in (
        path,
        path.with_name(path.name + "-wal"),
        path.with_name(path.name + "-shm"),
        head,
    ):
        leftover.unlink(missing_ok=True)
    private, text = Identity.generate(), _canonical(opening)
    first = _Position().next(text)
    with closing(_connect(path, "rwc")) as connection:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute(_TABLE)
        connection.execute(_INSERT, (first.count, text, first.hash))
        connection.execute("COMMIT")
    sync_folder(path.parent)
    write_atomically(head, signed_head(private, Head(first.count, first.hash)))
    private.write(key)


def _opened(path: Path, mode: str) -> sqlite3.Connection:
    where = f"{path.resolve().as_uri()}?mode={mode}"  # only a beginning may create the file
    # the lock keeps threads apart as well as processes: the connection need not insist on one
    return sqlite3.connect(
        where, uri=True, isolation_level=None, timeout=60, check_same_thread=False
    )


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    connection = _opened(path, mode)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    return connection


def _exclusive(path: Path) -> AbstractContextManager[None]:
    lock = path.with_name(path.name + ".lock")
    held = Refused(
        f"ledger {path}: found {lock.name} held by another process for {locks.SECONDS:g} s,"
        " expected it free"
    )
    return locks.exclusive(lock, held, locks.SECONDS)


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """Nothing may be spent on top of a file that can't be read or written."""
    try:
        yield
    except (sqlite3.DatabaseError, OSError) as error:
        kind = _kind(error)
        damaged = isinstance(error, sqlite3.Error) and kind is Refused
        found = "found a damaged file" if damaged else "could not be read or written"
        raise kind(f"ledger {path}: {found} ({error})") from error


def _kind(error: sqlite3.Error | OSError) -> type[FedloraError]:
    """A refusal; but where the machine ran out, a full disk say, nobody refused."""
    if isinstance(error, OSError):
        return FedloraError if error.errno in SHORT_OF else Refused
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_OK)  # Python's own faults have none
    return FedloraError if code & 0xFF in SHORT_OF_IN_SQLITE else Refused


def _canonical(body: Mapping[str, Any]) -> str:
    return canonical(body).decode()
