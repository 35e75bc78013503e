"""The privacy ledger: append-only, hash-chained, and the only owner of a budget.

    consent   reserves a run's whole (ε, δ), all attempts of all phases, against a budget's caps
    reserve   one attempt at one round, durable before data is touched; each (round, attempt) once
    commit    the digest of what left

Nothing is ever refunded. Each entry holds the hash of the one before; the head (count and hash) is signed and
kept in a second place, so that a ledger that is deleted, truncated, edited or restored from an older copy
refuses service. What this can't see: both places restored to the same older moment; keep them on different
disks, or send heads away, where that matters. Budgets have names: data never opens one, a policy does.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedlora.common.errors import BadInput, Refused
from fedlora.common.files import write_atomically
from fedlora.common.privacy import Spend

SCHEMA = 1
SLACK = 1e-9  # of a cap: sums of floats, nothing else
_TABLE = "CREATE TABLE entries (number INTEGER PRIMARY KEY, body TEXT NOT NULL, hash TEXT NOT NULL) STRICT"


@dataclass(frozen=True)
class Budget:
    """A named budget of one population, and what it may spend over all runs."""

    name: str
    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        for field, value in (("epsilon", self.epsilon), ("delta", self.delta)):
            if not (math.isfinite(value) and value > 0):
                raise BadInput(f"budget {self.name} {field}: found {value}, expected a finite number > 0")


@dataclass(frozen=True)
class Entry:
    """One line of the ledger; `body` has a key `kind`, and the rest by kind."""

    number: int
    body: dict[str, Any]
    hash: str


@dataclass(frozen=True)
class _Consent:
    spend: Spend
    attempts: tuple[int, ...]


class Ledger:
    """One ledger file, its key, and its head in a second place. Safe for several processes at once."""

    def __init__(self, path: Path, head: Path, key: Ed25519PrivateKey) -> None:
        self.path = path
        self._head = head
        self._key = key
        self._connection = sqlite3.connect(path, isolation_level=None, timeout=60)
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("PRAGMA synchronous = FULL")
        self._count = 0
        self._hash = ""
        self._consents: dict[tuple[str, str], _Consent] = {}
        self._reserved: dict[tuple[str, str], dict[tuple[int, int], int]] = {}  # (round, attempt) -> phase
        self._committed: set[tuple[str, str, int, int]] = set()

    @classmethod
    def open(cls, path: Path, head: Path, key: Path) -> Ledger:
        """Open a ledger, or begin one where neither it nor its head nor its key exists.

        Refused where the ledger is not the one that the head was signed for.
        """
        existing = [each for each in (path, head, key) if each.exists()]
        if not existing:
            return cls._begin(path, head, key)
        missing = [each.name for each in (path, head, key) if not each.exists()]
        if missing:
            raise Refused(
                f"ledger {path}: found {', '.join(each.name for each in existing)} but not {', '.join(missing)}; "
                "it was deleted or moved, and without it nothing can be spent"
            )
        try:
            ledger = cls(path, head, _read_key(key))
            with ledger._locked():
                ledger._check_head()
        except sqlite3.DatabaseError as error:
            raise Refused(f"ledger {path}: found a damaged file ({error})") from error
        return ledger

    @classmethod
    def _begin(cls, path: Path, head: Path, key: Path) -> Ledger:
        for each in (path, head, key):
            each.parent.mkdir(parents=True, exist_ok=True)
        private = Ed25519PrivateKey.generate()
        write_atomically(key, _pem(private), mode=0o600)
        ledger = cls(path, head, private)
        with ledger._locked():
            ledger._connection.execute(_TABLE)
            ledger._append({"kind": "open", "schema": SCHEMA, "id": os.urandom(16).hex()})
        return ledger

    def consent(self, budget: Budget, manifest: str, spend: Spend, attempts: Sequence[int]) -> None:
        """Reserve a run's whole spend; Refused past a cap. The same consent again changes nothing."""
        with self._locked():
            given = self._consents.get((budget.name, manifest))
            if given is not None:
                if given != _Consent(spend, tuple(attempts)):
                    raise Refused(f"budget {budget.name}: consented to {manifest[:14]} on other terms")
                return
            self._check_caps(budget, spend)
            self._append(
                {
                    "kind": "consent",
                    "budget": budget.name,
                    "manifest": manifest,
                    "epsilon": spend.epsilon,
                    "delta": spend.delta,
                    "attempts": list(attempts),
                    "cap_epsilon": budget.epsilon,
                    "cap_delta": budget.delta,
                }
            )

    def reserve(self, budget: str, manifest: str, phase: int, round_number: int, attempt: int) -> None:
        """Use up one attempt, durably; Refused without consent, a second time, or beyond the consented number."""
        with self._locked():
            consent = self._consents.get((budget, manifest))
            if consent is None:
                raise Refused(f"budget {budget}: nothing was consented to for {manifest[:14]}")
            taken = self._reserved.get((budget, manifest), {})
            if any(used == attempt for _, used in taken):
                raise Refused(f"budget {budget}: attempt {attempt} was used before: a replay or a rewind")
            if not 0 <= phase < len(consent.attempts):
                raise Refused(
                    f"budget {budget}: phase {phase} is not one of {len(consent.attempts)} consented to"
                )
            if sum(each == phase for each in taken.values()) >= consent.attempts[phase]:
                raise Refused(
                    f"budget {budget}: all {consent.attempts[phase]} attempts of phase {phase} are spent"
                )
            self._append(
                {
                    "kind": "reserve",
                    "budget": budget,
                    "manifest": manifest,
                    "phase": phase,
                    "round": round_number,
                    "attempt": attempt,
                }
            )

    def commit(self, budget: str, manifest: str, round_number: int, attempt: int, update: str) -> None:
        """Record the digest of what a reserved attempt releases; once."""
        with self._locked():
            if (round_number, attempt) not in self._reserved.get((budget, manifest), {}):
                raise Refused(f"budget {budget}: round {round_number} attempt {attempt} was not reserved")
            if (budget, manifest, round_number, attempt) in self._committed:
                raise Refused(f"budget {budget}: round {round_number} attempt {attempt} was committed before")
            self._append(
                {
                    "kind": "commit",
                    "budget": budget,
                    "manifest": manifest,
                    "round": round_number,
                    "attempt": attempt,
                    "update": update,
                }
            )

    def spent(self, budget: str) -> Spend:
        """What a budget has reserved over all runs: ε and δ add up."""
        with self._locked():
            return self._spent(budget)

    def reserved_for(self, budget: str, manifest: str) -> Spend | None:
        """What one run reserved of a budget, or None without consent."""
        with self._locked():
            consent = self._consents.get((budget, manifest))
            return None if consent is None else consent.spend

    def attempts_used(self, manifest: str) -> int:
        """The highest attempt number that any budget has reserved for a run; 0 for none."""
        with self._locked():
            used = [
                attempt
                for (_, run), taken in self._reserved.items()
                if run == manifest
                for _, attempt in taken
            ]
            return max(used, default=0)

    def entries(self) -> Iterator[Entry]:
        """All entries, oldest first."""
        rows = self._connection.execute("SELECT number, body, hash FROM entries ORDER BY number").fetchall()
        for number, body, hash_ in rows:
            yield Entry(number, json.loads(body), hash_)

    def close(self) -> None:
        self._connection.close()

    def _check_caps(self, budget: Budget, spend: Spend) -> None:
        total = self._spent(budget.name) + spend
        for name, needed, cap in (("ε", total.epsilon, budget.epsilon), ("δ", total.delta, budget.delta)):
            if not needed <= cap * (1 + SLACK):
                raise Refused(
                    f"budget {budget.name}: {name} would reach {needed:.4g}, past its cap of {cap:.4g}"
                )

    def _spent(self, budget: str) -> Spend:
        total = Spend(0.0, 0.0)
        for (name, _), consent in self._consents.items():
            if name == budget:
                total += consent.spend
        return total

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One writer at a time over all processes, looking at every entry that others have added."""
        with self.path.with_name(self.path.name + ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                self._catch_up()
            except sqlite3.DatabaseError as error:
                raise Refused(f"ledger {self.path}: found a damaged file ({error})") from error
            yield

    def _catch_up(self) -> None:
        """Verify and take in the entries after the last one known."""
        if not self._connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'entries'").fetchone():
            if self._count:
                raise Refused(f"ledger {self.path}: found no entries, expected {self._count}")
            return
        (count,) = self._connection.execute("SELECT COUNT(*) FROM entries").fetchone()
        if count < self._count:
            raise Refused(f"ledger {self.path}: found {count} entries, expected at least {self._count}")
        rows = self._connection.execute(
            "SELECT number, body, hash FROM entries WHERE number > ? ORDER BY number", (self._count,)
        )
        for number, body, hash_ in rows:
            if number != self._count + 1 or hash_ != _chained(self._hash, number, body):
                raise Refused(f"ledger {self.path} entry {number}: found other bytes than were written")
            self._take_in(number, json.loads(body), hash_)

    def _append(self, body: dict[str, Any]) -> None:
        """Add an entry and sign the new head. Durable when it returns; only under `_locked`."""
        number, text = self._count + 1, json.dumps(body, sort_keys=True, allow_nan=False)
        hash_ = _chained(self._hash, number, text)
        try:
            self._connection.execute("INSERT INTO entries VALUES (?, ?, ?)", (number, text, hash_))
        except sqlite3.Error as error:
            raise Refused(f"ledger {self.path}: could not be written ({error}); nothing was spent") from error
        self._take_in(number, body, hash_)
        self._write_head()

    def _take_in(self, number: int, body: dict[str, Any], hash_: str) -> None:
        kind = body["kind"]
        if kind == "open":
            if number != 1 or body["schema"] != SCHEMA:
                raise Refused(f"ledger {self.path}: found schema {body['schema']}, expected {SCHEMA}")
        else:
            self._take_in_spend(kind, body)
        self._count, self._hash = number, hash_

    def _take_in_spend(self, kind: str, body: dict[str, Any]) -> None:
        key = (body["budget"], body["manifest"])
        if kind == "consent":
            self._consents[key] = _Consent(Spend(body["epsilon"], body["delta"]), tuple(body["attempts"]))
        elif kind == "reserve":
            self._reserved.setdefault(key, {})[body["round"], body["attempt"]] = body["phase"]
        elif kind == "commit":
            self._committed.add((*key, body["round"], body["attempt"]))
        else:
            raise Refused(
                f"ledger {self.path}: found an entry of kind {kind!r}, which this version does not know"
            )

    def _check_head(self) -> None:
        """Refused unless the head was signed for this very chain; a head one entry behind is signed anew."""
        try:
            head = json.loads(self._head.read_bytes())
            count, hash_ = int(head["count"]), str(head["hash"])
            self._key.public_key().verify(bytes.fromhex(head["signature"]), _head_bytes(count, hash_))
        except (OSError, ValueError, KeyError, TypeError, InvalidSignature) as error:
            raise Refused(
                f"ledger head {self._head}: found no valid head ({type(error).__name__})"
            ) from error
        if count > self._count:
            raise Refused(
                f"ledger {self.path}: found {self._count} entries, but {count} were signed: "
                "it was truncated or restored from an older copy"
            )
        row = self._connection.execute("SELECT hash FROM entries WHERE number = ?", (count,)).fetchone()
        if row is None or row[0] != hash_:
            raise Refused(f"ledger {self.path} entry {count}: found another hash than was signed")
        if self._count - count > 1:
            raise Refused(
                f"ledger head {self._head}: found {count}, expected {self._count}: it is an older copy"
            )
        if self._count > count:
            self._write_head()  # killed between the entry and its head

    def _write_head(self) -> None:
        signature = self._key.sign(_head_bytes(self._count, self._hash)).hex()
        head = {"count": self._count, "hash": self._hash, "signature": signature}
        write_atomically(self._head, json.dumps(head).encode())


def _chained(previous: str, number: int, body: str) -> str:
    return hashlib.sha256(f"{previous}\n{number}\n{body}".encode()).hexdigest()


def _head_bytes(count: int, hash_: str) -> bytes:
    return f"fedlora-ledger-head-1\n{count}\n{hash_}".encode()


def _pem(key: Ed25519PrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _read_key(path: Path) -> Ed25519PrivateKey:
    if path.stat().st_mode & 0o077:
        raise Refused(f"{path}: found a key that others can read, expected mode 0600")
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except ValueError as error:
        raise Refused(f"{path}: found no private key ({error})") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise Refused(f"{path}: found a {type(key).__name__}, expected an Ed25519 key")
    return key
