"""The trainer over TCP: mutual TLS or nothing, and certificates that are what they must be."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedlora.client.network.channel import Door, TrainerAway
from fedlora.client.node.policy import TrainerPolicy
from fedlora.client.service.endpoint import Service
from fedlora.common.errors import BadInput, Refused
from tests.client.service.authority import Authority


@pytest.fixture
def ours(tmp_path: Path) -> Authority:
    authority = Authority.make(tmp_path, "ca")
    authority.issue("trainer")
    authority.issue("relay")
    return authority


def settings(certificate: str = "trainer", key: str = "trainer") -> TrainerPolicy:
    files = {
        "tls_certificate": f"{certificate}.crt",
        "tls_key": f"{key}.key",
        "tls_clients": "ca.crt",
    }
    return TrainerPolicy(listen="127.0.0.1:0", **files)  # type: ignore[arg-type]


def door(folder: Path, address: str, authority: str, name: str) -> Door:
    return Door(
        address,
        *(str(folder / each) for each in (f"{authority}.crt", f"{name}.crt", f"{name}.key")),
    )


def test_only_a_relay_with_a_certificate_of_ours_is_heard(ours: Authority, tmp_path: Path) -> None:
    other = Authority.make(tmp_path, "other")
    other.issue("stranger")
    ours.issue("old", days=-1)
    heard: list[bytes] = []
    service = Service(lambda data: heard.append(data) or data, settings(), tmp_path)  # type: ignore[func-returns-value]
    service.start()
    try:
        assert door(tmp_path, service.address, "ca", "relay").ask(b"x", 10) == b"x"
        # cert-wrong-ca, cert-expired
        for authority, name in (("ca", "stranger"), ("other", "relay"), ("ca", "old")):
            with pytest.raises(TrainerAway):
                door(tmp_path, service.address, authority, name).ask(b"y", 3)
    finally:
        service.stop(0)
    assert heard == [b"x"]


def test_certificates_that_can_not_serve_are_refused_at_the_start(
    ours: Authority, tmp_path: Path
) -> None:
    ours.issue("old", days=-1)
    with pytest.raises(Refused, match="not valid now"):  # cert-expired
        Service(bytes, settings("old", "old"), tmp_path)
    # key-does-not-match-certificate
    with pytest.raises(BadInput, match="does not match its certificate"):
        Service(bytes, settings("trainer", "relay"), tmp_path)
    with pytest.raises(BadInput, match="can't be read"):
        Service(bytes, settings("none", "relay"), tmp_path)
    (tmp_path / "trainer.key").chmod(0o644)
    with pytest.raises(Refused, match="others can read"):  # key-file-readable-by-others
        Service(bytes, settings(), tmp_path)
