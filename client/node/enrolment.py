"""How a node comes into a federation: keys, request, the coordinator's invitation, rotation."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from datetime import UTC, datetime

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from fedlora.client.node.folder import NodeFolder, pinned_invitation
from fedlora.client.node.policy import policy_template
from fedlora.common.disk import locks
from fedlora.common.disk.files import now, read_text, write_atomically
from fedlora.common.errors import BadInput, Refused
from fedlora.common.trust.enrolment import (
    EnrolmentRequest,
    Invitation,
    certificate_fingerprint,
    invitation_from_text,
    request_to_text,
)
from fedlora.common.trust.identity import Identity
from fedlora.common.trust.rotation import rotation_from_text, rotation_to_text


def init(folder: NodeFolder, name: str, organisation: str) -> EnrolmentRequest:
    """A new node: identity, Flower's key, a policy to fill in, and the request.

    BadInput where one lies there.
    """
    folder.root.mkdir(parents=True, exist_ok=True, mode=0o700)
    if folder.identity.exists():
        raise BadInput(
            f"{folder.identity}: found a key, expected none: a new identity would orphan the"
            " old one"
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

    The old identity is kept beside them, for what it signed, and so is an earlier rotation, for a
    coordinator that has not taken it yet. BadInput where this node is another one than `name`.
    """
    known = folder.own_request()
    for field, found, expected in (
        ("name", name, known.name),
        ("organisation", organisation, known.organisation),
    ):
        if found != expected:
            raise BadInput(
                f"{field}: found {found[:200]!r}, expected {expected!r}, whose keys are rotated"
            )
    coming = folder.identity.with_name("identity-next.pem")
    # a killed rotation: its key may be known by now
    if coming.exists() and folder.rotation.exists():
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
    """Pin a federation.

    Another coordinator's key than the pinned one is refused: leave first, by hand. The same key may
    renew address and certificate.
    """
    invitation = invitation_from_text(text, where)
    if folder.federation.exists():
        pinned = pinned_invitation(folder)
        if (
            pinned.coordinator != invitation.coordinator
            or pinned.federation != invitation.federation
        ):
            raise Refused(
                f"{where}: found {invitation.federation} of {invitation.coordinator.fingerprint},"
                f" but {pinned.federation} of {pinned.coordinator.fingerprint} is pinned; remove"
                f" {folder.federation} to join another"
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


def only_trainer(folder: NodeFolder) -> AbstractContextManager[None]:
    """One trainer for an identity, for as long as this lasts; Refused where another one runs."""
    held = Refused(
        f"{folder.identity}: found another trainer that uses this identity, expected none"
    )
    return locks.exclusive(folder.root / "trainer.lock", held, 0)


def _request(
    folder: NodeFolder, identity: Identity, name: str, organisation: str, flower_key: str
) -> EnrolmentRequest:
    request = EnrolmentRequest(name, organisation, identity.public, flower_key, now())
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
