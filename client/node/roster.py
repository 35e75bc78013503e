"""The peers whose identities this institution's own operator approved."""

from __future__ import annotations

import tomllib

from fedlora.client.node.folder import NodeFolder
from fedlora.common.config.toml import literal
from fedlora.common.disk.files import MAX_FILE_BYTES, text_of, write_atomically
from fedlora.common.disk.guarded import read_guarded
from fedlora.common.errors import BadInput, Refused
from fedlora.common.trust.enrolment import Peer, request_from_text
from fedlora.common.trust.identity import Identity, PublicIdentity
from fedlora.common.trust.organisations import folded
from fedlora.common.trust.rotation import is_rotation, rotation_from_text


def approve(folder: NodeFolder, text: str, where: str) -> Peer:
    """Admit a peer to this node's own roster: the only way in.

    Name, key and organisation occur once each. `text` is a peer's request, or its rotation: a new
    request under the signature of the key that was approved.
    """
    roster = read_peers(folder)
    if is_rotation(text):
        rotation = rotation_from_text(text, where)
        request, held = rotation.request, roster.pop(rotation.request.name, None)
        if held is None or (held.identity, held.organisation) != (
            rotation.old,
            request.organisation,
        ):
            raise Refused(
                f"{where}: found {request.name} of {request.organisation!r} under the signature of "
                f"{rotation.old.text}, expected that of a peer's approved key"
            )
    else:
        request = request_from_text(text, where)
    peer = Peer(request.name, request.organisation, request.identity)
    own = folder.own_request()
    for each in (
        *roster.values(),
        Peer("", own.organisation, Identity.load(folder.identity).public),
    ):
        if each.identity == peer.identity and each != peer:
            raise Refused(f"{where}: found a key that {each.name or 'this node'} holds already")
        if folded(each.organisation) == folded(peer.organisation) and each.name != peer.name:
            raise Refused(
                f"{where}: found a second key of {peer.organisation!r}, which is"
                f" {each.name or 'this node'} already"
            )
    if roster.get(peer.name, peer) != peer:
        raise Refused(
            f"{where}: found another key of {peer.name}, expected its rotation.json; or remove the"
            " old one first"
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
    """The approved peers, by name; Refused where others could have written the file."""
    if not (folder.peers.exists() or folder.peers.is_symlink()):
        return {}
    data = read_guarded(folder.peers, "the roster of approved peers", MAX_FILE_BYTES)
    try:
        tables = tomllib.loads(text_of(data, folder.peers.name)).get("peers", {})
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


def _write_peers(folder: NodeFolder, roster: dict[str, Peer]) -> None:
    tables = [
        f"[peers.{literal(name)}]\norganisation = {literal(peer.organisation)}\nidentity ="
        f" {literal(peer.identity.text)}\n"
        for name, peer in sorted(roster.items())
    ]
    write_atomically(folder.peers, "\n".join(tables).encode(), mode=0o600)
