"""The coordinator's commands as a person runs them: results, one-line faults, exit codes."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fedlora.common.errors import BadInput, QuorumLost
from fedlora.common.model.state import AdapterState
from fedlora.common.trust.enrolment import certificate_fingerprint, invitation_from_text
from fedlora.common.trust.identity import Identity, seal
from fedlora.common.trust.rotation import rotation_to_text
from fedlora.server import cli
from fedlora.server.coordinator.folder import Directory
from fedlora.server.release.layout import REPORT_TAG
from tests.server.enrolments import request
from tests.server.releases import SPEC, STATE, adapter, exported, finished_run, party

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Command:
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fedlora-server", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        found = capsys.readouterr()
        return int(ended.value.code or 0), found.out, found.err

    return call


@pytest.fixture
def made(command: Command, tmp_path: Path) -> Directory:
    code, out, _ = command(
        "init", "coordinator", "--federation", "bank-intents", "--host", "127.0.0.1"
    )
    directory = Directory.open(tmp_path / "coordinator")
    assert code == 0 and directory.identity.public.fingerprint in out
    assert directory.authority_fingerprint in out
    return directory


def test_the_authority_s_fingerprint_is_the_one_that_a_node_prints(
    command: Command, made: Directory
) -> None:
    invitation = invitation_from_text(made.invitation(), "invitation.json")
    shown = certificate_fingerprint(invitation.ca_certificate, "ca_certificate")
    code, out, _ = command("members")
    assert code == 0 and shown in out and made.identity.public.fingerprint in out


def test_from_init_to_verify(command: Command, made: Directory, tmp_path: Path) -> None:
    members = {"north": Identity.generate(), "south": Identity.generate()}
    for name, identity in members.items():
        (tmp_path / f"{name}.json").write_text(request(identity, name))
        code, out, _ = command("enrol", f"{name}.json", "--yes")
        assert code == 0 and identity.public.fingerprint in out and f"enrolled     {name}" in out
    finished_run(made, members)
    new = Identity.generate()  # its statement stays what its old key signed
    (tmp_path / "r.json").write_text(rotation_to_text(members["north"], request(new, "north")))
    assert command("rotate", "r.json", "--yes")[0] == 0
    assert command("revoke", "south")[0] == 0
    code, out, _ = command("members")
    assert code == 0 and "revoked" in out and "rotated" in out and new.public.fingerprint in out
    reports = tmp_path / "reports"
    reports.mkdir()
    for name, key, expected in (
        ("south", new, 3),
        ("north", Identity.generate(), 3),
        ("north", new, 0),
    ):
        (reports / f"{name}.json").write_text(seal(key, REPORT_TAG, {"institution": name}))
        code, out, err = command("export", "export", "--reports", "reports")
        assert code == expected and ("one of" in err) == bool(expected), err
        (reports / f"{name}.json").unlink()
    code, out, _ = command("verify", "export", "--key", "coordinator/coordinator.pub")
    assert code == 0 and "verified with the coordinator's key" in out
    code, out, _ = command("verify", "export")
    assert code == 0 and "integrity only" in out and made.identity.public.fingerprint in out
    path = tmp_path / "export" / "adapter" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    code, _, err = command("verify", "export")
    assert (code, len(err.splitlines())) == (3, 1) and "adapter_model.safetensors" in err


def test_a_run_s_adapter_that_was_changed_is_not_released(
    command: Command, made: Directory, tmp_path: Path
) -> None:
    """One bit of a weight, and then what any copy of it would say.

    A description that goes with it.
    """
    members = {"north": Identity.generate(), "south": Identity.generate()}
    for name, identity in members.items():
        made.registry.enrol(request(identity, name), name)
    finished_run(made, members)
    path = made.root / "runs" / "1" / "adapter"
    adapter(path, state=AdapterState(SPEC, 2 * STATE.vector))
    code, _, err = command("export", "export")
    assert (code, len(err.splitlines())) == (3, 1) and "which the run committed" in err
    adapter(path)
    weights = bytearray((path / "adapter_model.safetensors").read_bytes())
    weights[-1] ^= 1
    (path / "adapter_model.safetensors").write_bytes(bytes(weights))
    code, _, err = command("export", "export")
    assert (code, len(err.splitlines())) == (3, 1) and f"expected {STATE.digest}" in err
    assert not (tmp_path / "export").exists()


def test_faults_are_one_line_and_a_code(command: Command, made: Directory, tmp_path: Path) -> None:
    (tmp_path / "north.json").write_text(request(Identity.generate(), "north"))
    (tmp_path / "no.pub").write_text("rsa:AAAA")
    old, new = Identity.generate(), Identity.generate()
    (tmp_path / "r.json").write_text(rotation_to_text(old, request(new, "west")))
    assert command("enrol", "north.json", "--yes")[0] == 0
    for arguments, code, fault in (
        (("enrol", "north.json", "--yes"), 3, "used already"),
        (("enrol", "north.json"), 2, "--yes"),
        (("enrol", "absent.json"), 2, "(No such file or directory), expected a request"),
        (("rotate", "."), 2, "(Is a directory), expected a rotation"),
        (("revoke", "east"), 2, "expected one of north"),
        (
            ("rotate", "north.json"),
            2,
            "north.json: found an enrolment request, expected a rotation",
        ),
        (
            ("enrol", "coordinator/invitation.json"),
            2,
            "invitation.json: found an invitation, expected an enrolment request",
        ),
        (("rotate", "r.json"), 2, "rotate: found no terminal"),
        (("init", "north.json/c", "--federation", "f", "--host", "h"), 2, "north.json"),
        (("members", "--dir", "elsewhere"), 2, "fedlora-server init"),
        (("export", "x"), 2, "found no run"),
        (("verify", "coordinator", "--key", "no.pub"), 2, "no.pub"),
        (("verify", "coordinator"), 2, "release.json"),
        (("init", "coordinator", "--federation", "f", "--host", "h"), 2, "found something there"),
        (("init", "x", "--federation", "f", "--host", "h", "--port", "0"), 2, "port = 0"),
    ):
        found, out, err = command(*arguments)
        assert (found, len(err.splitlines())) == (code, 1), (arguments, err)
        assert fault in err and "Traceback" not in err + out, (arguments, err)


def test_a_private_key_by_mistake_is_not_printed(command: Command, made: Directory) -> None:
    path = made.root / "keys" / "coordinator.pem"
    code, out, err = command("verify", "coordinator", "--key", str(path))
    assert (code, len(err.splitlines())) == (2, 1) and "coordinator.pem: found a private key" in err
    assert path.read_text().splitlines()[1][:8] not in out + err


def test_a_terminal_without_greek_gets_its_lines_all_the_same(
    made: Directory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = party()
    folder, written = exported(tmp_path, of), io.BytesIO()
    monkeypatch.setattr(sys, "argv", ["fedlora-server", "verify", str(folder)])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="latin-1"))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    sys.stdout.flush()
    assert ended.value.code == 0 and b"; ? at most 1.52" in written.getvalue()


def test_files_that_are_missing_or_spoilt_are_named(command: Command, made: Directory) -> None:
    (made.root / "runs").rmdir()
    assert command("status") == (2, "", f"fedlora-server: {made.root}: found no run\n")
    nodes = made.root / "superlink" / "nodes.json"
    for text in ("", "[]", '{"north": 5}', "[" * 10**5):
        nodes.write_text(text)
        with pytest.raises(BadInput, match=f"{nodes}: found no table"):
            made.registered()


def test_both_fingerprints_are_compared_before_a_key_is_replaced(
    command: Command, made: Directory
) -> None:
    old, new = Identity.generate(), Identity.generate()
    made.registry.enrol(request(old, "north"), "north")
    Path("r.json").write_text(rotation_to_text(old, request(new, "north")))
    code, out, err = command("rotate", "r.json")
    assert code == 2 and "expected --yes" in err and made.registry.active() == {"north": old.public}
    assert old.public.fingerprint in out and new.public.fingerprint in out
    assert command("rotate", "r.json", "--yes")[0] == 0
    assert made.registry.active() == {"north": new.public}


def test_renewal_and_invitation(command: Command, made: Directory) -> None:
    before = (made.root / "tls" / "server.crt").read_bytes()
    assert command("renew")[0] == 0
    assert (made.root / "tls" / "server.crt").read_bytes() != before
    assert command("invite")[1] == (made.root / "invitation.json").read_text()


def test_runs_are_handed_on(
    command: Command, made: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, err = command("resume")
    assert code == 2 and "found no run" in err
    calls: list[Path] = []

    def carry_out(directory: Directory, folder: Path, *_: object) -> dict[str, object]:
        calls.append(folder)
        raise QuorumLost("round 1: 0 of 3")

    monkeypatch.setattr("fedlora.server.deployment.supervise.carry_out", carry_out)
    training = "coordinator/training.toml"
    code, _, err = command("run", training)
    assert (
        (code, len(err.splitlines())) == (2, 2)
        and "coordinator/public/test.parquet" in err
        and not made.runs()
    )
    for name in ("test", "validation"):
        (made.root / "public" / f"{name}.parquet").touch()
    code, _, err = command("run", training)
    assert code == 3 and "found 0 active members, expected at least the minimum_cohort of 3" in err
    assert not made.runs() and not calls
    for name in ("north", "south", "west"):
        made.registry.enrol(request(Identity.generate(), name), name)
    code, _, err = command("run", training)
    assert code == 4 and "round 1: 0 of 3" in err
    assert command("resume")[0] == 4
    assert calls == [made.root / "runs" / "1"] * 2
    text = (made.root / "coordinator.toml").read_text()
    (made.root / "coordinator.toml").write_text(text.replace('"127.0.0.1"', '"moved.example"'))
    code, _, err = command("run", training)
    assert code == 2 and "moved.example" in err and len(calls) == 2
