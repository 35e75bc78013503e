"""The registry admits each institution once, ends it at once, and notices unsigned changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedlora.common.disk import files
from fedlora.common.errors import BadInput, FedloraError, Refused
from fedlora.common.trust.identity import Identity
from fedlora.common.trust.rotation import rotation_to_text
from fedlora.server.coordinator import members
from fedlora.server.coordinator.members import Registry
from tests.server.enrolments import flower_key, request

NORTH, SOUTH = Identity.generate(), Identity.generate()
COORDINATOR = Identity.generate()


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry.create(tmp_path / "members.json", COORDINATOR)


def test_a_member_is_active_from_enrolment_to_revocation(registry: Registry) -> None:
    assert registry.active() == {}
    key = flower_key()
    registry.enrol(request(NORTH, "north", key=key), "r")
    registry.enrol(request(SOUTH, "south"), "r")
    assert registry.active() == {"north": NORTH.public, "south": SOUTH.public}
    assert registry.flower_keys()["north"] == key
    registry.revoke("north")
    assert registry.active() == {"south": SOUTH.public}  # the same object: read anew
    assert [(m.name, m.active, m.reason) for m in registry.members()] == [
        ("north", False, "revoked"),
        ("south", True, ""),
    ]
    with pytest.raises(BadInput, match="expected one of south"):
        registry.revoke("north")


def test_an_older_copy_is_refused(registry: Registry, tmp_path: Path) -> None:
    """A revoked key would be alive in it."""
    path, revision = tmp_path / "members.json", tmp_path / "members.revision"
    registry.enrol(request(NORTH, "north"), "r")
    older = path.read_bytes()
    registry.revoke("north")
    newer = path.read_bytes()
    path.write_bytes(older)
    with pytest.raises(Refused, match=r"members\.json revision: found 2, expected 3 .*older copy"):
        registry.active()
    with pytest.raises(Refused, match="older copy"):
        registry.enrol(request(SOUTH, "south"), "r")
    path.write_bytes(newer)
    assert registry.active() == {}
    revision.unlink()
    with pytest.raises(Refused, match="older copy"):
        registry.active()
    revision.write_text("x")
    with pytest.raises(BadInput, match="found no number"):
        registry.active()
    revision.write_text("2\n")  # killed between the file and its number
    assert registry.active() == {}
    registry.enrol(request(SOUTH, "south"), "r")
    assert revision.read_text() == "4\n"


def test_a_change_while_it_is_read_is_no_older_copy(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The round loop reads while an operator enrols."""
    read = files.read_text

    def meanwhile(*place: Any) -> str:
        text = read(*place)
        monkeypatch.setattr(members, "read_text", read)
        Registry(tmp_path / "members.json", COORDINATOR).enrol(request(NORTH, "north"), "r")
        return text

    monkeypatch.setattr(members, "read_text", meanwhile)
    assert registry.active() == {}
    assert set(registry.active()) == {"north"}


def test_a_request_is_used_once_also_after_revocation(registry: Registry) -> None:
    text = request(NORTH, "north")
    registry.enrol(text, "r")
    with pytest.raises(Refused, match="used already"):  # enrolment-used-twice
        registry.enrol(text, "r")
    registry.revoke("north")
    with pytest.raises(Refused, match="used already"):
        registry.enrol(text, "r")
    with pytest.raises(Refused, match="enrolled before"):
        registry.enrol(request(NORTH, "north"), "r")
    # its statements would be another's
    with pytest.raises(Refused, match="is or was 'north clinic'"):
        registry.enrol(request(Identity.generate(), "north", "Another clinic"), "r")
    registry.enrol(request(Identity.generate(), "north"), "r")  # a new key, after a telephone call


def test_nobody_is_a_member_twice(registry: Registry) -> None:
    key = flower_key()
    registry.enrol(request(NORTH, "north", "Nord Klinik", key), "r")
    with pytest.raises(Refused, match="identity of north"):  # cohort-duplicate-key
        registry.enrol(request(NORTH, "north2", "Another"), "r")
    with pytest.raises(Refused, match="flower_key"):
        registry.enrol(request(SOUTH, "south", "South", key), "r")
    # cohort-two-keys-one-organisation
    for spelling in ("Nord Klinik", "nord  KLINIK", "\uff2eord Klinik"):
        with pytest.raises(Refused, match="organisation"):
            registry.enrol(request(SOUTH, "south", spelling), "r")
    with pytest.raises(Refused, match="name"):
        registry.enrol(request(SOUTH, "north", "South"), "r")
    assert list(registry.active()) == ["north"]


@pytest.mark.parametrize("same_flower_key", [True, False])
def test_the_old_key_names_its_successor(registry: Registry, same_flower_key: bool) -> None:
    key, new = flower_key(), Identity.generate()
    registry.enrol(request(NORTH, "north", key=key), "r")
    later = request(new, "north", key=key if same_flower_key else "")
    registry.rotate(rotation_to_text(NORTH, later), "r")
    assert registry.active() == {"north": new.public}
    assert (registry.flower_keys()["north"] == key) is same_flower_key
    assert [member.reason for member in registry.members()] == ["rotated", ""]
    with pytest.raises(Refused, match="expected"):  # the old key has no more to say
        registry.rotate(rotation_to_text(NORTH, request(SOUTH, "north")), "r")


def test_rotations_that_are_none_are_refused(registry: Registry) -> None:
    registry.enrol(request(NORTH, "north"), "r")
    registry.enrol(request(SOUTH, "south"), "r")
    new = Identity.generate()
    with pytest.raises(Refused, match="found the signature of"):
        registry.rotate(rotation_to_text(SOUTH, request(new, "north")), "r")
    with pytest.raises(Refused, match="organisation"):
        registry.rotate(rotation_to_text(NORTH, request(new, "north", "Other")), "r")
    with pytest.raises(Refused, match="enrolled before"):
        registry.rotate(rotation_to_text(NORTH, request(SOUTH, "north", "north clinic")), "r")
    with pytest.raises(BadInput, match="expected one of north, south"):
        registry.rotate(rotation_to_text(NORTH, request(new, "east")), "r")
    with pytest.raises(BadInput, match="the old key as the new one"):
        rotation_to_text(NORTH, request(NORTH, "north"))
    text = rotation_to_text(NORTH, request(new, "north"))
    for place in range(0, len(text), 7):
        with pytest.raises(FedloraError):
            registry.rotate(text[:place] + chr(ord(text[place]) ^ 1) + text[place + 1 :], "r")
    assert registry.active() == {"north": NORTH.public, "south": SOUTH.public}


def test_every_flipped_byte_of_the_registry_is_noticed(registry: Registry, tmp_path: Path) -> None:
    registry.enrol(request(NORTH, "north"), "r")
    path = tmp_path / "members.json"
    data = path.read_bytes()
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(FedloraError, match=r"members|ed25519"):
            registry.active()
    path.write_bytes(data)
    with pytest.raises(Refused, match="expected"):
        Registry(path, Identity.generate()).active()
    path.unlink()
    with pytest.raises(BadInput, match="can't be read"):
        registry.active()
