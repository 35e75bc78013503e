"""One trainer for an identity, one coordinator, peers by the operator's hand; keys of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedlora.client.node import enrolment, roster
from fedlora.client.node.enrolment import only_trainer
from fedlora.client.node.folder import NodeFolder
from fedlora.common.errors import BadInput, Refused
from fedlora.common.trust.identity import Identity, seal
from tests.client.institution import COORDINATOR, Institution

STRANGER = Identity.generate()


@pytest.fixture
def north(tmp_path: Path) -> Institution:
    return Institution(tmp_path / "node")


def test_two_processes_one_identity(north: Institution) -> None:  # two-processes-one-identity
    with (
        only_trainer(north.folder),
        pytest.raises(Refused, match="another trainer"),
        only_trainer(north.folder),
    ):
        pass
    with only_trainer(north.folder):
        pass


def test_another_coordinator_is_not_pinned_over_the_first(north: Institution) -> None:
    from fedlora.common.trust.enrolment import Invitation, invitation_to_text
    from tests.client.institution import CERTIFICATE

    other = invitation_to_text(STRANGER, Invitation("f", "evil:1", CERTIFICATE, STRANGER.public))
    with pytest.raises(Refused, match="is pinned"):
        enrolment.join(north.folder, other, "i")
    renewed = invitation_to_text(
        COORDINATOR, Invitation("f", "new:2", CERTIFICATE, COORDINATOR.public)
    )
    assert enrolment.join(north.folder, renewed, "i").address == "new:2"


def test_peers_join_by_the_operators_hand_once_each(north: Institution, tmp_path: Path) -> None:
    texts = {}
    for name, organisation in (("south", "Süd"), ("west", "West"), ("twin", "Süd")):
        folder = NodeFolder(tmp_path / name)
        enrolment.init(folder, name, organisation)
        texts[name] = folder.request.read_text()
    for name in ("south", "west", "south"):
        roster.approve(north.folder, texts[name], name)
    with pytest.raises(Refused, match="second key"):  # cohort-two-keys-one-organisation
        roster.approve(north.folder, texts["twin"], "twin")
    assert set(roster.read_peers(north.folder)) == {"south", "west"}
    roster.remove_peer(north.folder, "south")
    assert set(roster.read_peers(north.folder)) == {"west"}


@pytest.mark.parametrize(
    "shown", ["Hospital East\u3164", "H\u0585spital East", "Hosp\u0131tal East"], ids=ascii
)
def test_one_organisation_holds_no_second_key_by_a_name_that_looks_the_same(
    north: Institution, tmp_path: Path, shown: str
) -> None:
    """Before: three keys of one hospital, each approved, and masks over nobody else."""
    texts = []
    for name, organisation in (("east", "Hospital East"), ("other", "Elsewhere")):
        folder = NodeFolder(tmp_path / name)
        enrolment.init(folder, name, organisation)
        texts.append(folder.request.read_text())
    roster.approve(north.folder, texts[0], "east")
    body = json.loads(texts[1])["body"] | {"organisation": shown}
    key = Identity.load(NodeFolder(tmp_path / "other").identity)
    with pytest.raises((Refused, BadInput), match=r"organisation|second key"):
        roster.approve(north.folder, seal(key, "fedlora-enrolment-1", body), "other")


@pytest.mark.parametrize("file", ["peers", "request"])
@pytest.mark.parametrize("how", ["link", "mode", "folder", "dangling"])
def test_a_roster_or_request_that_others_can_write_is_refused(
    north: Institution, tmp_path: Path, file: str, how: str
) -> None:
    """Before: both were read through a link to a file of mode 0666 in a folder of mode 0777."""
    other = NodeFolder(tmp_path / "east")
    enrolment.init(other, "east", "Hospital East")
    roster.approve(north.folder, other.request.read_text(), "east")
    path: Path = getattr(north.folder, file)
    if how in ("link", "dangling"):
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / ("elsewhere" if how == "link" else "nowhere"))
    elif how == "mode":
        path.chmod(0o666)
    else:
        tmp_path.chmod(0o777)
    with pytest.raises(Refused, match=r"found a link|others can write"):
        roster.read_peers(north.folder) if file == "peers" else north.folder.own_request()


def test_a_name_that_an_earlier_version_allowed_is_still_this_nodes_own(north: Institution) -> None:
    body = json.loads(north.folder.request.read_text())["body"] | {
        "organisation": "Nord \u2116 `1`"
    }
    north.folder.request.write_text(seal(north.identity, "fedlora-enrolment-1", body))
    north.restart()
    assert north.folder.own_request().organisation == body["organisation"]
    with pytest.raises(BadInput, match="organisation"):
        enrolment.rotate(north.folder, "north", body["organisation"])


def test_new_keys_are_new_and_the_old_ones_are_kept(north: Institution) -> None:
    old, flower = north.identity.public, (north.folder.relay / "flower_key.pub").read_text()
    request = enrolment.rotate(north.folder, "north", "Nord Klinik")
    assert Identity.load(north.folder.identity).public == request.identity != old
    assert (north.folder.relay / "flower_key.pub").read_text() != flower
    (kept,) = north.folder.root.glob("identity-*.pem")
    assert Identity.load(kept).public == old and kept.stat().st_mode & 0o077 == 0


# key-file-readable-by-others
def test_a_key_that_others_can_read_is_refused(north: Institution) -> None:
    north.folder.identity.chmod(0o644)
    with pytest.raises(Refused, match="others can read"):
        north.restart()
