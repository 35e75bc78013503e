"""A coordinator's folder: certificates, members, and the release that nobody can change unnoticed."""

from __future__ import annotations

import json
import shutil
import stat
import subprocess
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from fedlora.common.enrolment import EnrolmentRequest, invitation_from_text, request_to_text
from fedlora.common.errors import BadInput, Refused
from fedlora.common.identity import Identity, Signed
from fedlora.common.protocol import MANIFEST_TAG, Consent, reply_to_bytes
from fedlora.common.sealed import seal
from fedlora.server.certificates import check_server, issue_server, make_authority
from fedlora.server.directory import Directory, Settings
from fedlora.server.registry import TAG, Registry
from fedlora.server.release import check_release, write_release
from fedlora.server.superlink import SuperLink
from tests.server.fakes import manifest_of


def flower_key() -> str:
    public = ec.generate_private_key(ec.SECP384R1()).public_key()
    return public.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def request_of(name: str, organisation: str, identity: Identity | None = None, key: str = "") -> str:
    identity = identity or Identity.generate()
    moment = datetime.now(UTC).isoformat()
    return request_to_text(
        identity, EnrolmentRequest(name, organisation, identity.public, key or flower_key(), moment)
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made") / "coordinator"
    Directory.create(root, Settings("demo", "127.0.0.1", 19443, 19444))
    return root


# --- the folder ----------------------------------------------------------------------------------------


def test_a_new_folder_is_whole_and_its_keys_are_private(made: Path) -> None:
    directory = Directory.open(made)
    for name in ("keys/coordinator.pem", "ca/ca.key", "tls/server.key"):
        assert stat.S_IMODE((made / name).stat().st_mode) == 0o600
    invitation = invitation_from_text((made / "invitation.json").read_text(), "invitation.json")
    assert invitation.coordinator == directory.identity.public
    assert invitation.address == "127.0.0.1:19443"
    with pytest.raises(BadInput, match="found a coordinator's folder"):
        Directory.create(made, Settings("demo"))


def test_faults_of_the_folder_are_named(made: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="fedlora-server init"):
        Directory.open(tmp_path)
    root = tmp_path / "copy"
    shutil.copytree(made, root)
    (root / "coordinator.toml").write_text('federation = "demo"\nprot = 3\nsuperlink_port = 0\n')
    with pytest.raises(BadInput) as caught:
        Directory.open(root)
    assert len(caught.value.faults) == 2 and "port" in str(caught.value)


def test_the_proxy_lets_institutions_reach_the_fleet_api_only(made: Path) -> None:
    text = (made / "nginx.conf").read_text()
    assert (
        text.count("location ") == 2
        and "location /v1/fleet/ {" in text
        and "location / { return 404; }" in text
    )
    assert "@" not in text
    if shutil.which("nginx") is None:
        pytest.skip("nginx is not installed")
    done = subprocess.run(
        ["nginx", "-t", "-p", str(made), "-c", str(made / "nginx.conf")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_superlink_is_hardened(made: Path) -> None:
    link = SuperLink(Directory.open(made).superlink_files(), 19444)
    command = " ".join(link.superlink_command())
    for part in (
        "--enable-supernode-auth",
        "--isolation process",
        "--superexec-auth-secret-file",
        "--disable-runtime-dependency-installation",
        "--host 127.0.0.1",
        "--ssl-certfile",
    ):
        assert part in command
    assert "--insecure" not in command + " ".join(link.superexec_command())


# --- certificates --------------------------------------------------------------------------------------


def test_certificates_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    pairs = {name: (tmp_path / f"{name}.crt", tmp_path / f"{name}.key") for name in ("ca", "other", "s", "t")}
    make_authority("demo", *pairs["ca"])
    make_authority("demo", *pairs["other"])
    issue_server(["localhost", "127.0.0.1"], pairs["ca"], *pairs["s"])
    issue_server(["localhost"], pairs["ca"], *pairs["t"])
    check_server(*pairs["s"], pairs["ca"][0])
    with pytest.raises(BadInput, match="did not issue"):  # cert-wrong-ca
        check_server(*pairs["s"], pairs["other"][0])
    with pytest.raises(BadInput, match="does not match"):  # key-does-not-match-certificate
        check_server(pairs["s"][0], pairs["t"][1], pairs["ca"][0])
    with pytest.raises(BadInput, match="valid until"):  # cert-expired
        check_server(*pairs["s"], pairs["ca"][0], datetime.now(UTC) + timedelta(days=400))
    pairs["s"][1].chmod(0o644)
    with pytest.raises(Refused, match="expected mode 0600"):
        check_server(*pairs["s"], pairs["ca"][0])


# --- members -------------------------------------------------------------------------------------------


def test_enrolment_revocation_and_return(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "members.json", Identity.generate())
    first = request_of("north", "Nord Klinik")
    assert registry.enrol(first, "a.json").name == "north"
    assert list(registry.active()) == ["north"]
    with pytest.raises(Refused, match="that was used"):  # enrolment-used-twice
        registry.enrol(first, "a.json")
    registry.revoke("north")
    assert not registry.active() and not registry.flower_keys()
    with pytest.raises(Refused, match="that was used"):
        registry.enrol(first, "a.json")
    with pytest.raises(BadInput, match="no active member"):
        registry.revoke("north")
    registry.enrol(request_of("north", "Nord Klinik"), "b.json")  # rotated keys
    assert list(registry.active()) == ["north"]


@pytest.mark.parametrize("taken", ["name", "organisation", "identity", "flower_key"])
def test_what_is_taken_is_not_given_twice(tmp_path: Path, taken: str) -> None:
    """cohort-two-keys-one-organisation, before a cohort is ever formed."""
    registry = Registry(tmp_path / "members.json", Identity.generate())
    identity, key = Identity.generate(), flower_key()
    registry.enrol(request_of("north", "Nord Klinik", identity, key), "a.json")
    values: dict[str, object] = {
        "name": "south",
        "organisation": "Süd Klinik",
        "identity": None,
        "flower_key": "",
    }
    values[taken] = {"name": "north", "organisation": "Nord Klinik", "identity": identity, "flower_key": key}[
        taken
    ]
    text = request_of(*(values[each] for each in ("name", "organisation", "identity", "flower_key")))  # type: ignore[arg-type]
    with pytest.raises(Refused, match=f"^b.json {taken}"):
        registry.enrol(text, "b.json")


def test_a_revoked_key_does_not_come_back(tmp_path: Path) -> None:
    registry, identity = Registry(tmp_path / "members.json", Identity.generate()), Identity.generate()
    registry.enrol(request_of("north", "Nord Klinik", identity), "a.json")
    registry.revoke("north")
    with pytest.raises(Refused, match="key that was revoked"):
        registry.enrol(request_of("north", "Nord Klinik", identity), "b.json")


def test_a_list_that_somebody_else_signed_is_no_list(tmp_path: Path) -> None:
    path = tmp_path / "members.json"
    path.write_text(seal(Identity.generate(), TAG, {"members": []}))
    with pytest.raises(Refused, match="expected ed25519"):
        Registry(path, Identity.generate()).active()


# --- the release ---------------------------------------------------------------------------------------

Change = Callable[[Path], object]


@pytest.fixture(scope="module")
def release(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of a run of two institutions."""
    root = tmp_path_factory.mktemp("release")
    shutil.copytree(made, root / "coordinator")
    directory = Directory.open(root / "coordinator")
    run = directory.new_run()
    manifest = replace(manifest_of(3, mode="record"), federation="demo")
    signed = Signed.by(directory.identity, MANIFEST_TAG, manifest.to_bytes())
    (run / "manifest.signed").write_bytes(signed.to_bytes())
    (run / "adapter").mkdir()
    values = np.random.default_rng(1).standard_normal(64).astype("<f4")
    (run / "adapter" / "adapter_model.safetensors").write_bytes(values.tobytes())
    (run / "consents").mkdir()
    for name in ("north", "south"):
        identity = Identity.generate()
        directory.registry.enrol(request_of(name, f"{name} clinic", identity), name)
        consent = Consent(name, manifest.digest, "sha256:policy", 0.75, 1e-5)
        (run / "consents" / f"{name}.reply").write_bytes(reply_to_bytes(identity, "demo", consent))
    summary = {
        "task": "sequence-classification",
        "rounds": 3,
        "accuracy": 0.8,
        "epsilon": 0.75,
        "epsilon_by_client": {"north": 0.75, "south": 0.75},
        "base_digest": manifest.base_digest,
        "adapter_digest": "sha256:adapter",
        "privacy_statement": ["ε is 0.75."],
    }
    (run / "summary.json").write_text(json.dumps(summary))
    write_release(directory, run, root / "export")
    shutil.copy(directory.root / "coordinator.pub", root / "coordinator.pub")
    return root / "export"


def key_of(release: Path):  # type: ignore[no-untyped-def]
    from fedlora.common.identity import PublicIdentity

    return PublicIdentity.from_text((release.parent / "coordinator.pub").read_text(), "coordinator.pub")


def test_an_export_verifies_and_says_how_much_that_shows(release: Path) -> None:
    assert check_release(release, key_of(release))[-1] == "verified"
    assert "integrity only" in check_release(release, None)[-1]
    with pytest.raises(Refused, match="found the key"):
        check_release(release, Identity.generate().public)


def test_every_change_of_a_release_is_detected(release: Path, tmp_path: Path) -> None:
    """200 changes: bytes flipped in each file in turn, a file added, one removed, a link."""
    source, key = np.random.default_rng(5), key_of(release)
    names = sorted(path.relative_to(release) for path in release.rglob("*") if path.is_file())
    assert len(names) == 7

    def flip(name: Path) -> Change:
        def change(folder: Path) -> None:
            data = bytearray((folder / name).read_bytes())
            data[source.integers(len(data))] ^= 1 << source.integers(8)
            (folder / name).write_bytes(bytes(data))

        return change

    changes: list[Change] = [flip(names[k % len(names)]) for k in range(200 - 2 * len(names) - 4)]
    changes += [lambda folder, name=name: (folder / name).unlink() for name in names]  # type: ignore[misc]
    changes += [lambda folder, name=name: (folder / name).write_bytes(b"") for name in names]  # type: ignore[misc]
    changes += [
        lambda folder: (folder / "more.txt").write_text("x"),
        lambda folder: (folder / "adapter" / "adapter_model.bin").write_bytes(b"x"),
        lambda folder: (folder / "empty").mkdir(),
        lambda folder: (folder / "link").symlink_to("/etc/passwd"),
    ]
    missed = []
    for number, change in enumerate(changes):
        folder = tmp_path / str(number)
        shutil.copytree(release, folder)
        change(folder)
        try:
            check_release(folder, key)
        except (BadInput, Refused):
            continue
        missed.append(number)
    assert len(changes) == 200 and not missed


def test_an_epsilon_below_what_an_institution_states_is_refused(release: Path, tmp_path: Path) -> None:
    """Signed by the coordinator itself, and still a lie."""
    directory = Directory.open(release.parent / "coordinator")
    run = tmp_path / "run"
    shutil.copytree(directory.runs()[-1], run)
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"epsilon": 0.5}))
    write_release(directory, run, tmp_path / "export")
    with pytest.raises(Refused, match="less than an institution's own statement"):
        check_release(tmp_path / "export", key_of(release))
