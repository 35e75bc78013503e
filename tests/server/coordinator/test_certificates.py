"""Certificates that TLS takes for the right host, and a line on what is wrong with others."""

from __future__ import annotations

import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fedlora.common.errors import BadInput, FedloraError, Refused
from fedlora.server.coordinator.certificates import (
    SERVER_CERTIFICATE,
    SERVER_KEY,
    Authority,
    check_server,
    days_left,
    hosts_of,
    issue_server,
)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.create(tmp_path / "ca", "bank-intents")


def handshake(tls: Path, ca: Path, host: str) -> str:
    """The protocol that a client which trusts `ca` and dials `host` agrees on with the server."""
    server_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_side.load_cert_chain(tls / SERVER_CERTIFICATE, tls / SERVER_KEY)
    client_side = ssl.create_default_context(cafile=str(ca))
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = server_side.wrap_bio(up, down, server_side=True)
    client = client_side.wrap_bio(down, up, server_hostname=host)
    for _ in range(5):
        for side in (client, server):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
    return client.version() or ""


@pytest.mark.parametrize("host", ["fl.example.org", "127.0.0.1", "::1"])
def test_tls_accepts_each_host_of_the_certificate(
    tmp_path: Path, authority: Authority, host: str
) -> None:
    issue_server(authority, tmp_path / "tls", ["fl.example.org", "127.0.0.1", "::1"])
    assert handshake(tmp_path / "tls", tmp_path / "ca" / "ca.crt", host) == "TLSv1.3"
    with pytest.raises(ssl.SSLCertVerificationError, match=r"match|not valid for"):
        handshake(tmp_path / "tls", tmp_path / "ca" / "ca.crt", "other.example.org")


def test_keys_are_private_and_an_authority_is_made_once(
    tmp_path: Path, authority: Authority
) -> None:
    issue_server(authority, tmp_path / "tls", ["a.example"])
    for path in (tmp_path / "ca" / "ca.key", tmp_path / "tls" / SERVER_KEY):
        assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(BadInput, match="pinned"):
        Authority.create(tmp_path / "ca", "bank-intents")
    assert Authority.load(tmp_path / "ca").pem == authority.pem
    (tmp_path / "ca" / "ca.key").chmod(0o640)
    with pytest.raises(Refused, match="others can read"):  # key-file-readable-by-others
        Authority.load(tmp_path / "ca")


def test_renewal_keeps_the_key_and_moves_the_end(tmp_path: Path, authority: Authority) -> None:
    tls, start = tmp_path / "tls", datetime.now(UTC)
    first = issue_server(authority, tls, ["a.example"], days=10)
    kept = (tls / SERVER_KEY).read_bytes()
    second = issue_server(authority, tls, hosts_of(first))
    assert (tls / SERVER_KEY).read_bytes() == kept
    assert 9 < days_left(first, start) < 11 < 390 < days_left(second, start) < 398
    check_server(tls, authority.certificate, "a.example")
    issue_server(authority, tls, ["a.example"], new_key=True)
    assert (tls / SERVER_KEY).read_bytes() != kept
    check_server(tls, authority.certificate, "a.example")


def test_faults_of_a_certificate_are_named(tmp_path: Path, authority: Authority) -> None:
    tls, ca, now = tmp_path / "tls", authority.certificate, datetime.now(UTC)
    issue_server(authority, tls, ["a.example"], days=10)
    path = tls / SERVER_CERTIFICATE
    with pytest.raises(BadInput, match=r"server\.crt: expired on"):  # cert-expired
        check_server(tls, ca, "a.example", now + timedelta(days=11))
    with pytest.raises(BadInput, match="clock"):
        check_server(tls, ca, "a.example", now - timedelta(days=1))
    with pytest.raises(BadInput, match=r"found the hosts a\.example, expected b\.example"):
        check_server(tls, ca, "b.example")
    other = Authority.create(tmp_path / "other", "bank-intents")  # the same name, another key
    # wrong-ca
    with pytest.raises(BadInput, match=r"server\.crt: found a certificate of another authority"):
        check_server(tls, other.certificate, "a.example")
    issue_server(authority, tmp_path / "second", ["a.example"])
    path.write_bytes((tmp_path / "second" / SERVER_CERTIFICATE).read_bytes())
    with pytest.raises(BadInput, match=r"server\.crt: found a certificate of another key"):
        check_server(tls, ca, "a.example")  # key-does-not-match-certificate
    path.write_text("-----BEGIN")
    with pytest.raises(BadInput, match="found no certificate"):
        check_server(tls, ca, "a.example")
    path.unlink()
    with pytest.raises(BadInput, match="can't be read"):
        check_server(tls, ca, "a.example")


@pytest.mark.parametrize("host", ["", "a b", "x\ny", "http://a", "-a.example", "a" * 300, "1:2:3"])
def test_a_host_that_is_none_is_bad_input(tmp_path: Path, authority: Authority, host: str) -> None:
    with pytest.raises(FedloraError, match="host"):
        issue_server(authority, tmp_path / "tls", [host])
