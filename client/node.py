"""A node's folder: its identity, the federation it pinned, the peers its operator approved.

node.toml          the policy, the operator's to write
identity.pem       Ed25519, 0600: what answers are signed with
enrolment.json     the request to hand to the coordinator
rotation.json      after `init --rotate`: that request under the old key's signature
federation.json    the invitation, as pinned by `join`
peers.toml         the roster; `join --approve` alone adds to it
ledger.sqlite, ledger.key, and the head where the policy says
runs/, outbox/     what was consented to, and the exact bytes that left
refusals.jsonl     every refusal of what the coordinator signed, refusals.json how often; strangers.jsonl: of all else
relay/             all that the relay needs, to be given to its user: Flower's key, CA, address
"""

from __future__ import annotations

import json
import tomllib
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from fedlora.client.policy import Policy, load_policy, policy_template
from fedlora.common import locks
from fedlora.common.base import PACKAGED, resolve_base
from fedlora.common.enrolment import (
    EnrolmentRequest,
    Invitation,
    Peer,
    certificate_fingerprint,
    folded,
    invitation_from_text,
    request_from_text,
    request_to_text,
)
from fedlora.common.errors import BadInput, Refused
from fedlora.common.files import write_atomically
from fedlora.common.identity import Identity, PublicIdentity
from fedlora.common.ledger import Ledger
from fedlora.common.rotation import is_rotation, rotation_from_text, rotation_to_text
from fedlora.common.toml import literal

MAX_TEXT_BYTES = 1 << 16


@dataclass(frozen=True)
class NodeFolder:
    """Where everything of one node lies."""

    root: Path

    @property
    def policy(self) -> Path:
        return self.root / "node.toml"

    @property
    def identity(self) -> Path:
        return self.root / "identity.pem"

    @property
    def request(self) -> Path:
        return self.root / "enrolment.json"

    @property
    def rotation(self) -> Path:
        return self.root / "rotation.json"

    @property
    def federation(self) -> Path:
        return self.root / "federation.json"

    @property
    def peers(self) -> Path:
        return self.root / "peers.toml"

    @property
    def refusals(self) -> Path:
        return self.root / "refusals.jsonl"

    @property
    def strangers(self) -> Path:
        """A log of its own: whoever reaches the trainer may fill it, and its older lines make room."""
        return self.root / "strangers.jsonl"

    @property
    def relay(self) -> Path:
        return self.root / "relay"

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    def run(self, manifest: str) -> Path:
        """A run's own folder, by its manifest's digest."""
        return self.runs / manifest.removeprefix("sha256:")

    def base(self, name: str) -> Path:
        """The folder of a base of the policy: relative ones start in this folder."""
        inside = self.root / name
        return inside if name not in PACKAGED and inside.is_dir() else resolve_base(name)

    def under(self, path: str) -> Path:
        """A path of the policy: relative ones start in this folder."""
        return self.root / path

    def load_policy(self) -> Policy:
        """BadInput where it is another institution's than the one that enrols from this folder."""
        policy = load_policy(self.policy)
        if self.request.exists():
            enrolled = request_from_text(read_text(self.request), self.request.name).name
            if enrolled != policy.institution:
                raise BadInput(
                    f"{self.policy.name} institution: found {policy.institution}, expected {enrolled} as in "
                    f"{self.request.name}"
                )
        return policy

    def open_ledger(self, policy: Policy) -> Ledger:
        head = self.under(policy.trainer.head)
        return Ledger.open(self.root / "ledger.sqlite", head, self.root / "ledger.key")


def init(folder: NodeFolder, name: str, organisation: str) -> EnrolmentRequest:
    """A new node: identity, Flower's key, a policy to fill in, and the request. BadInput where one lies there."""
    folder.root.mkdir(parents=True, exist_ok=True, mode=0o700)
    if folder.identity.exists():
        raise BadInput(
            f"{folder.identity}: found a key, expected none: a new identity would orphan the old one"
        )
    identity = Identity.generate()
    folder.relay.mkdir(exist_ok=True, mode=0o700)
    request = _request(folder, identity, name, organisation, _flower_key(folder))
    if not folder.policy.exists():
        write_atomically(folder.policy, policy_template(name).encode(), mode=0o600)
    identity.write(folder.identity)  # last: a killed beginning begins again
    return request


def rotate(folder: NodeFolder, name: str, organisation: str) -> EnrolmentRequest:
    """New keys, and rotation.json: their request under the signature of the old key.

    The old identity is kept beside them, for what it signed, and so is an earlier rotation, for a coordinator that
    has not taken it yet. BadInput where this node is another one than `name`.
    """
    known = request_from_text(read_text(folder.request), folder.request.name)
    for field, found, expected in (
        ("name", name, known.name),
        ("organisation", organisation, known.organisation),
    ):
        if found != expected:
            raise BadInput(f"{field}: found {found[:200]!r}, expected {expected!r}, whose keys are rotated")
    coming = folder.identity.with_name("identity-next.pem")
    if coming.exists() and folder.rotation.exists():  # a killed rotation: its key may be known by now
        begun = rotation_from_text(read_text(folder.rotation), folder.rotation.name)
        if begun.request.identity == Identity.load(coming).public:
            coming.rename(folder.identity)
            return begun.request
    stamp = f"{datetime.now(UTC):%Y%m%dT%H%M%S}"
    kept = folder.identity.with_name(f"identity-{stamp}.pem")
    if kept.exists():
        raise BadInput(f"{kept}: found a key, expected none")
    old = Identity.load(folder.identity)
    old.write(kept)
    if folder.rotation.exists():
        folder.rotation.rename(folder.rotation.with_name(f"rotation-{stamp}.json"))
    identity = Identity.generate()
    identity.write(coming)  # durable before anybody can hear of it
    request = _request(folder, identity, name, organisation, _flower_key(folder))
    write_atomically(folder.rotation, rotation_to_text(old, read_text(folder.request)).encode())
    coming.rename(folder.identity)
    return request


def join(folder: NodeFolder, text: str, where: str) -> Invitation:
    """Pin a federation. Another coordinator's key than the pinned one is refused: leave first, by hand.

    The same key may renew address and certificate.
    """
    invitation = invitation_from_text(text, where)
    if folder.federation.exists():
        pinned = pinned_invitation(folder)
        if pinned.coordinator != invitation.coordinator or pinned.federation != invitation.federation:
            raise Refused(
                f"{where}: found {invitation.federation} of {invitation.coordinator.fingerprint}, but "
                f"{pinned.federation} of {pinned.coordinator.fingerprint} is pinned; remove {folder.federation} "
                "to join another"
            )
    folder.relay.mkdir(exist_ok=True, mode=0o700)
    write_atomically(folder.federation, text.encode())
    write_atomically(folder.relay / "ca.crt", invitation.ca_certificate.encode())
    link = {"superlink": invitation.address}
    write_atomically(folder.relay / "link.json", json.dumps(link).encode())
    return invitation


def fingerprints(invitation: Invitation) -> dict[str, str]:
    """What two people read to each other."""
    ca = certificate_fingerprint(invitation.ca_certificate, "ca_certificate")
    return {"coordinator's key": invitation.coordinator.fingerprint, "certificate authority": ca}


def pinned_invitation(folder: NodeFolder) -> Invitation:
    """The federation that this node joined; Refused where there is none."""
    if not folder.federation.exists():
        raise Refused(f"{folder.federation}: found no federation; fedlora-node join INVITATION first")
    return invitation_from_text(read_text(folder.federation), folder.federation.name)


def approve(folder: NodeFolder, text: str, where: str) -> Peer:
    """Admit a peer to this node's own roster: the only way in. Name, key and organisation occur once each.

    `text` is a peer's request, or its rotation: a new request under the signature of the key that was approved.
    """
    roster = read_peers(folder)
    if is_rotation(text):
        rotation = rotation_from_text(text, where)
        request, held = rotation.request, roster.pop(rotation.request.name, None)
        if held is None or (held.identity, held.organisation) != (rotation.old, request.organisation):
            raise Refused(
                f"{where}: found {request.name} of {request.organisation!r} under the signature of "
                f"{rotation.old.text}, expected that of a peer's approved key"
            )
    else:
        request = request_from_text(text, where)
    peer = Peer(request.name, request.organisation, request.identity)
    own = request_from_text(read_text(folder.request), folder.request.name)
    for each in (*roster.values(), Peer("", own.organisation, Identity.load(folder.identity).public)):
        if each.identity == peer.identity and each != peer:
            raise Refused(f"{where}: found a key that {each.name or 'this node'} holds already")
        if folded(each.organisation) == folded(peer.organisation) and each.name != peer.name:
            raise Refused(
                f"{where}: found a second key of {peer.organisation!r}, which is {each.name or 'this node'} already"
            )
    if roster.get(peer.name, peer) != peer:
        raise Refused(
            f"{where}: found another key of {peer.name}, expected its rotation.json; or remove the old one first"
        )
    _write_peers(folder, {**roster, peer.name: peer})
    return peer


def remove_peer(folder: NodeFolder, name: str) -> Peer:
    """Take a peer off the roster; who it was."""
    roster = read_peers(folder)
    if name not in roster:
        raise BadInput(f"{folder.peers}: found no peer {name[:80]!r}")
    _write_peers(folder, {key: peer for key, peer in roster.items() if key != name})
    return roster[name]


def read_peers(folder: NodeFolder) -> dict[str, Peer]:
    """The approved peers, by name."""
    if not folder.peers.exists():
        return {}
    try:
        tables = tomllib.loads(read_text(folder.peers)).get("peers", {})
        return {
            name: Peer(
                name,
                str(table["organisation"]),
                PublicIdentity.from_text(table["identity"], f"peers.toml {name}"),
            )
            for name, table in tables.items()
        }
    except (tomllib.TOMLDecodeError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadInput(f"{folder.peers}: found no roster, expected [peers.NAME] tables") from error


def read_text(path: Path) -> str:
    """A small UTF-8 file; BadInput where it is not that."""
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_TEXT_BYTES + 1)
        if len(data) > MAX_TEXT_BYTES:
            raise BadInput(f"{path.name}: found more than {MAX_TEXT_BYTES} bytes")
        return data.decode()
    except UnicodeDecodeError as error:
        raise BadInput(f"{path.name}: found bytes that are not UTF-8") from error
    except OSError as error:
        raise BadInput(f"{path}: can't be read ({error.strerror})") from error


def only_trainer(folder: NodeFolder) -> AbstractContextManager[None]:
    """One trainer for an identity, for as long as this lasts; Refused where another one runs."""
    held = Refused(f"{folder.identity}: found another trainer that uses this identity, expected none")
    return locks.exclusive(folder.root / "trainer.lock", held, 0)


def _request(
    folder: NodeFolder, identity: Identity, name: str, organisation: str, flower_key: str
) -> EnrolmentRequest:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    request = EnrolmentRequest(name, organisation, identity.public, flower_key, now)
    write_atomically(folder.request, request_to_text(identity, request).encode())
    return request


def _flower_key(folder: NodeFolder) -> str:
    """A new ECDSA P-384 key for Flower's node authentication; its public line."""
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    line = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    write_atomically(folder.relay / "flower_key", private, mode=0o600)
    write_atomically(folder.relay / "flower_key.pub", line.encode() + b"\n")
    return line


def _write_peers(folder: NodeFolder, roster: dict[str, Peer]) -> None:
    tables = [
        f"[peers.{literal(name)}]\norganisation = {literal(peer.organisation)}\nidentity = {literal(peer.identity.text)}\n"
        for name, peer in sorted(roster.items())
    ]
    write_atomically(folder.peers, "\n".join(tables).encode(), mode=0o600)
