"""Who is a member: enrolled institutions, signed by the coordinator, read anew whenever it matters.

A name, an organisation and a key each occur once among the active members. A request is used once; a revoked
name may enrol again, with another request. Nodes keep a roster of their own: this one can remove a peer there,
never add one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from fedlora.common.enrolment import EnrolmentRequest, request_from_text
from fedlora.common.errors import BadInput, Refused
from fedlora.common.files import write_atomically
from fedlora.common.identity import Identity, PublicIdentity
from fedlora.common.sealed import seal, unseal

TAG = "fedlora-members-1"


@dataclass(frozen=True)
class Member:
    """An institution as it was enrolled; `request` is the digest of the text that it enrolled with."""

    name: str
    organisation: str
    identity: str  # PublicIdentity.text
    flower_key: str
    request: str
    revoked: bool = False


@dataclass(frozen=True)
class Registry:
    """The list at `path`, signed by `coordinator`."""

    path: Path
    coordinator: Identity

    def members(self) -> tuple[Member, ...]:
        """Everybody who was ever enrolled; Refused where another key signed the list."""
        if not self.path.exists():
            return ()
        text = self.path.read_text(encoding="utf-8")
        sealed = unseal(text, TAG, self.path.name, self.coordinator.public)
        return tuple(Member(**each) for each in sealed.body["members"])

    def active(self) -> Mapping[str, PublicIdentity]:
        """The identities of those who are members now, by name."""
        return {
            each.name: PublicIdentity.from_text(each.identity, self.path.name)
            for each in self.members()
            if not each.revoked
        }

    def flower_keys(self) -> Mapping[str, str]:
        """The OpenSSH keys of the active members' nodes, by name."""
        return {each.name: each.flower_key for each in self.members() if not each.revoked}

    def enrol(self, text: str, where: str) -> EnrolmentRequest:
        """Add a member; Refused for a request that was used, or a name, organisation or key that is taken."""
        request = request_from_text(text, where)
        used = hashlib.sha256(text.encode()).hexdigest()
        members = self.members()
        if any(each.request == used for each in members):
            raise Refused(f"{where}: found a request that was used, expected a new one")
        new = Member(request.name, request.organisation, request.identity.text, request.flower_key, used)
        for each in members:
            if not each.revoked:
                self._check_apart(each, new, where)
            elif new.identity == each.identity:
                raise Refused(f"{where} identity: found a key that was revoked with {each.name}")
        self._write((*members, new))
        return request

    def revoke(self, name: str) -> None:
        """From the next attempt on, `name` is no member; BadInput where it is none now."""
        members = self.members()
        if not any(each.name == name and not each.revoked for each in members):
            raise BadInput(f"{self.path.name}: found no active member {name!r}")
        self._write(tuple(replace(each, revoked=True) if each.name == name else each for each in members))

    def _check_apart(self, old: Member, new: Member, where: str) -> None:
        for field in ("name", "organisation", "identity", "flower_key"):
            if getattr(old, field) == getattr(new, field):
                raise Refused(
                    f"{where} {field}: found that of the active member {old.name}; revoke it first, "
                    "or to rotate its keys"
                )

    def _write(self, members: tuple[Member, ...]) -> None:
        body = {"members": [asdict(each) for each in members]}
        write_atomically(self.path, seal(self.coordinator, TAG, body).encode())
