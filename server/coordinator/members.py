"""Who is a member: `members.json`, signed by the coordinator, read anew whenever asked.

A request enrols once. One name, one organisation, one identity and one Flower key belong to one
member: two of a kind would let one organisation count twice in a cohort. An identity that was ever
a member's never comes back under another name, and a revoked one never comes back at all. An entry
is closed, never deleted. Each version has a number that is kept in a second place, so that an older
copy, in which a revoked key is alive, is refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fedlora.common.codec.strict import build
from fedlora.common.disk import locks
from fedlora.common.disk.files import now, read_text, write_atomically
from fedlora.common.errors import BadInput, FedloraError, Refused
from fedlora.common.trust.enrolment import EnrolmentRequest, request_from_text
from fedlora.common.trust.identity import MAX_TEXT_BYTES, Identity, PublicIdentity, seal, unseal
from fedlora.common.trust.organisations import folded
from fedlora.common.trust.rotation import rotation_from_text

MEMBERS_TAG = "fedlora-members-1"
VERSION = 1
REVOKED, ROTATED = "revoked", "rotated"


@dataclass(frozen=True)
class Member:
    """One key of one institution, from its enrolment to its end."""

    name: str
    organisation: str
    identity: PublicIdentity
    flower_key: str
    request: str  # SHA-256 of the request's text
    enrolled: str  # ISO 8601, UTC
    ended: str = ""  # when; "" while it is active
    reason: str = ""  # REVOKED or ROTATED

    @property
    def active(self) -> bool:
        """Whether it was neither revoked nor left."""
        return not self.ended


class Registry:
    """The members of a federation, in one signed file."""

    def __init__(self, path: Path, coordinator: Identity, revision: Path | None = None) -> None:
        """`revision`: where the newest version's number is kept; else beside `path`."""
        self._path, self._coordinator = path, coordinator
        self._revision = revision or path.with_suffix(".revision")

    @classmethod
    def create(cls, path: Path, coordinator: Identity, revision: Path | None = None) -> Registry:
        """Nobody is a member yet; BadInput where a registry lies there."""
        if path.exists():
            raise BadInput(f"{path}: found a registry, expected none")
        registry = cls(path, coordinator, revision)
        registry._replace((), 1)
        return registry

    def members(self) -> tuple[Member, ...]:
        """Every entry, ended ones too, in the order of enrolment.

        Refused where the coordinator did not sign it, or it is an older copy, in which ended keys
        count again.
        """
        rows, where = self._body().get("members", []), f"{self._path.name} member"
        return tuple(build(Member, row, where) for row in rows)

    def _body(self) -> Mapping[str, Any]:
        kept = self._kept()  # first: a change in between then leaves the file ahead, and not behind
        text = read_text(self._path, MAX_TEXT_BYTES, "the registry")
        sealed = unseal(text, MEMBERS_TAG, self._path.name, self._coordinator.public)
        if sealed.table.get("version") != VERSION:
            raise BadInput(f"{self._path.name} version: expected {VERSION}")
        revision = sealed.table.get("revision", 0)
        if type(revision) is not int or revision < kept or (revision > 1 and not kept):
            raise Refused(
                f"{self._path.name} revision: found {revision}, expected"
                f" {kept or 'the number that is kept'} ({self._revision}): it was restored from an"
                " older copy"
            )
        return sealed.table

    def _kept(self) -> int:
        """The newest version's number; 0 where none was kept yet."""
        try:
            return int(self._revision.read_bytes()) if self._revision.exists() else 0
        except ValueError as error:
            raise BadInput(f"{self._revision}: found no number, expected a revision") from error

    def active(self) -> Mapping[str, PublicIdentity]:
        """By name, as of now: asked before every round, so a revocation counts from the next."""
        return {member.name: member.identity for member in self.members() if member.active}

    def former(self, name: str) -> tuple[PublicIdentity, ...]:
        """The keys ended under this name, all of one organisation: names never change hands."""
        return tuple(
            member.identity
            for member in self.members()
            if member.name == name and not member.active
        )

    def flower_keys(self) -> Mapping[str, str]:
        """By name: the OpenSSH line that SuperLink admits each active member's node by."""
        return {member.name: member.flower_key for member in self.members() if member.active}

    def enrol(self, request: str, where: str) -> Member:
        """The member that a request makes; Refused where used, or colliding with another."""
        with self._locked():
            members = self.members()
            new = _entry(request_from_text(request, where), request)
            _check_new(members, new, where)
            self._write((*members, new))
            return new

    def revoke(self, name: str) -> Member:
        """End the active member `name`; BadInput where there is none."""
        with self._locked():
            members = self.members()
            found = _active(members, name)
            ended = replace(found, ended=now(), reason=REVOKED)
            self._write(tuple(ended if member is found else member for member in members))
            return ended

    def rotate(self, rotation: str, where: str) -> Member:
        """Replace a member's key as its old one says; `rotation` is its text, as a file has it."""
        with self._locked():
            members, found = self.members(), rotation_from_text(rotation, where)
            old = _active(members, found.request.name)
            if old.identity != found.old:
                raise Refused(
                    f"{where}: found the signature of {found.old.text}, expected"
                    f" {old.identity.text}"
                )
            if folded(old.organisation) != folded(found.request.organisation):
                raise Refused(
                    f"{where} organisation: found {found.request.organisation!r}, expected"
                    f" {old.organisation!r}"
                )
            ended = replace(old, ended=now(), reason=ROTATED)
            new = _entry(found.request, found.text)
            kept = tuple(ended if member is old else member for member in members)
            _check_new(kept, new, where, predecessor=ended)
            self._write((*kept, new))
            return new

    def _write(self, members: Sequence[Member]) -> None:
        self._replace(members, int(self._body().get("revision", 0)) + 1)

    def _replace(self, members: Sequence[Member], revision: int) -> None:
        """The file first: a kill in between leaves it ahead of the number, which is borne."""
        rows = [asdict(member) | {"identity": member.identity.text} for member in members]
        text = seal(
            self._coordinator,
            MEMBERS_TAG,
            {"version": VERSION, "revision": revision, "members": rows},
        )
        write_atomically(self._path, text.encode())
        write_atomically(self._revision, f"{revision}\n".encode())

    def _locked(self) -> AbstractContextManager[None]:
        """Two operators at once change it one after the other."""
        lock = self._path.with_suffix(".lock")
        held = FedloraError(
            f"{lock}: found it held by another process for {locks.SECONDS:g} s, expected it free;"
            " nothing was changed"
        )
        return locks.exclusive(lock, held, locks.SECONDS)


def _entry(request: EnrolmentRequest, text: str) -> Member:
    digest = hashlib.sha256(text.encode()).hexdigest()
    return Member(
        request.name, request.organisation, request.identity, request.flower_key, digest, now()
    )


def _check_new(
    members: Sequence[Member], new: Member, where: str, predecessor: Member | None = None
) -> None:
    """Refused where `new` would be somebody twice; a `predecessor` leaves its Flower key."""
    if any(member.request == new.request for member in members):
        raise Refused(f"{where}: found a request that was used already, expected a new one")
    for member in members:
        if member.identity == new.identity:
            raise Refused(
                f"{where}: found the identity of {member.name}, which was enrolled before"
            )
        if member.flower_key == new.flower_key and member != predecessor:
            raise Refused(
                f"{where} flower_key: found the key of {member.name}, expected one of its own"
            )
        if member.name == new.name and folded(member.organisation) != folded(new.organisation):
            raise Refused(
                f"{where} name: found {new.name}, which is or was {member.organisation!r};"
                " statements go by names"
            )
        if not member.active:
            continue
        if member.name == new.name:
            raise Refused(
                f"{where} name: found {new.name}, which is a member; rotate its key, or revoke it"
            )
        if folded(member.organisation) == folded(new.organisation):
            raise Refused(
                f"{where} organisation: found {new.organisation!r}, which is the member"
                f" {member.name}"
            )


def _active(members: Sequence[Member], name: str) -> Member:
    for member in members:
        if member.active and member.name == name:
            return member
    names = ", ".join(sorted(member.name for member in members if member.active)) or "nobody"
    raise BadInput(f"member: found {name[:80]!r}, expected one of {names}"[:400])
