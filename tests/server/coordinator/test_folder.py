"""A coordinator's folder works as it was made, or is not there."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from fedlora.common.config.load import load_config
from fedlora.common.errors import BadInput, Refused
from fedlora.common.trust.enrolment import invitation_from_text
from fedlora.common.trust.identity import PublicIdentity
from fedlora.server.coordinator import folder as module
from fedlora.server.coordinator.folder import Directory


@pytest.fixture
def made(tmp_path: Path) -> Directory:
    return Directory.create(
        tmp_path / "coordinator", "bank-intents", "127.0.0.1", free_port(), free_port()
    )


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def test_a_new_folder_is_whole_and_opens(made: Directory) -> None:
    opened = Directory.open(made.root)
    assert opened.settings == made.settings
    assert opened.registry.active() == {}
    opened.check_certificate()
    key = PublicIdentity.from_text(
        (made.root / "coordinator.pub").read_text().strip(), "coordinator.pub"
    )
    text = (made.root / "invitation.json").read_text()
    invitation = invitation_from_text(text, "invitation.json")
    assert opened.invitation() == text and invitation.coordinator == key == opened.identity.public
    assert invitation.address == f"127.0.0.1:{made.settings.address.port}"
    assert load_config(made.root / "training.toml").federation.clients == 3
    private = [path for path in made.root.rglob("*") if path.suffix in (".pem", ".key")]
    assert len(private) == 3 and all(path.stat().st_mode & 0o077 == 0 for path in private)
    assert [path.name for path in made.root.parent.iterdir()] == ["coordinator"]
    assert (made.new_run().name, made.new_run().name, len(made.runs())) == ("1", "2", 2)


def test_nothing_is_left_of_a_folder_that_could_not_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, settings: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_proxy", full)
    with pytest.raises(OSError, match="No space"):
        Directory.create(tmp_path / "coordinator", "f", "a.example")
    assert list(tmp_path.iterdir()) == []


def test_what_lies_there_stays(made: Directory, tmp_path: Path) -> None:
    before = (made.root / "keys" / "coordinator.pem").read_bytes()
    with pytest.raises(BadInput, match="found something there"):
        Directory.create(made.root, "f", "a.example")
    assert (made.root / "keys" / "coordinator.pem").read_bytes() == before
    with pytest.raises(BadInput, match="nginx"):
        Directory.create(tmp_path / 'a";b', "f", "a.example")


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ('federation = "bank-intents"', 'federation = "Bank\\n"', "federation"),
        ('federation = "bank-intents"', "", "federation: missing"),
        ('host = "127.0.0.1"', "", r"\[address\] host: missing"),
        ('host = "127.0.0.1"', 'host = "a b"', "host name or an IP address"),
        ("[superlink]", "[superlinks]", "did you mean"),
        ("[superlink] ", "[superlink]\nport = 0 #", "port"),
        ("federation", "\udcff", "UTF-8"),
    ],
)
def test_faults_of_the_settings_are_named(made: Directory, old: str, new: str, fault: str) -> None:
    path = made.root / "coordinator.toml"
    text = path.read_text().replace(old, new, 1)
    if "port = 0" in new:
        text = text[: text.index("port = 0") + 8]
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(BadInput, match=fault):
        Directory.open(made.root)


def test_folders_that_are_none_and_open_keys_are_refused(made: Directory, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="fedlora-server init"):
        Directory.open(tmp_path)
    (made.root / "keys" / "coordinator.pem").chmod(0o644)
    with pytest.raises(Refused, match="others can read"):  # key-file-readable-by-others
        Directory.open(made.root)


def test_a_changed_host_needs_a_renewal(made: Directory) -> None:
    path = made.root / "coordinator.toml"
    path.write_text(path.read_text().replace('"127.0.0.1"', '"fl.example.org"'))
    moved = Directory.open(made.root)
    with pytest.raises(BadInput, match=r"expected fl\.example\.org"):
        moved.check_certificate()
    moved.renew()
    moved.check_certificate()
    assert "fl.example.org" in (made.root / "invitation.json").read_text()
    assert "fl.example.org" in (made.root / "nginx.conf").read_text()
