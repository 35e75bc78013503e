"""What commit 2c7535c wrote is read, resumed and verified (fixtures/earlier/README.md)."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path

import pytest

from fedlora.client import cli as node_cli
from fedlora.client.node.folder import NodeFolder, pinned_invitation
from fedlora.client.node.outbox import Outbox
from fedlora.client.node.roster import read_peers
from fedlora.common.errors import BadInput, FedloraError, Refused
from fedlora.common.ledger.ledger import SCHEMA, Budget, Ledger
from fedlora.common.ledger.subject import Subject
from fedlora.common.manifest.manifest import RunManifest
from fedlora.common.privacy.accountant import Spend
from fedlora.common.protocol.messages import Consent, reply_from_bytes
from fedlora.common.secagg.wire import MaskedInput
from fedlora.server import cli as server_cli
from fedlora.server.coordinator.folder import Directory
from fedlora.server.release.from_run import export_run
from fedlora.server.release.verify import verify
from fedlora.simulations import cli as simulations_cli

EARLIER = Path(__file__).parent / "fixtures" / "earlier"
SECRET = (".pem", ".key", ".toml")  # a checkout does not keep their modes
SIGNER = "416707e6 55ba2703 14f5a7e9 ce85e522 614b3d76 949fb977 c60c63ca 389bd93c"
MANIFEST = "sha256:873345110dc37160743ed43b04621e68939e50d2228fc74aeb8529148a27a05c"
ADAPTER = "sha256:cc4d1d5f3905006b2401e423640b96fff106c71230894bb765b1e772c52e04ef"


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    """A copy that may be written to."""
    copy = shutil.copytree(EARLIER, tmp_path / "earlier")
    for path in copy.rglob("*"):
        path.chmod(0o700 if path.is_dir() else 0o600 if path.suffix in SECRET else 0o644)
    return copy


def node_ledger(node: Path) -> Ledger:
    return Ledger.open(node / "ledger.sqlite", node / "head" / "head.json", node / "ledger.key")


def code_of(main: object, monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", list(words))
    with pytest.raises(SystemExit) as stop:
        main()  # type: ignore[operator]
    return int(stop.value.code or 0)


def test_a_killed_run_goes_on(earlier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(earlier / "simulation")
    words = ("fedlora-sim", "run", "run.toml", "--out", "run", "--resume", "--threads", "1")
    assert code_of(simulations_cli.main, monkeypatch, *words) == 0
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [1, 2, 3, 4]
    attempts = [line["attempt"] for line in lines]
    assert attempts[:2] == [1, 2] and attempts[2:] == [4, 5]  # the third was begun and killed
    summary = json.loads(Path("run/summary.json").read_text())
    assert 0 < summary["epsilon"] <= 8.0 and summary["rounds"] == 4


def test_a_ledger_is_opened_and_goes_on(earlier: Path) -> None:
    ledger = node_ledger(earlier / "node")
    before = ledger.entries()
    assert [entry.body["kind"] for entry in before[:2]] == ["open", "consent"]
    spent = ledger.spent("messages")
    assert spent.epsilon == before[1].body["epsilon"] > 2.9
    assert ledger.attempts_used(MANIFEST) == 2
    with pytest.raises(Refused, match="used before"):
        ledger.reserve("messages", MANIFEST, 0, 2, 2)
    ledger.reserve("messages", MANIFEST, 0, 3, 3)
    ledger.close()
    again = node_ledger(earlier / "node")
    assert again.spent("messages") == Spend(spent.epsilon, spent.delta)
    assert again.entries()[:-1] == before and again.attempts_used(MANIFEST) == 3
    # the first consent moves the ledger on, so that a program of its time refuses it
    more = (Budget("messages", 8.0, 1e-3), "sha256:a", Spend(0.5, 1e-6), [1])
    again.consent(*more, Subject("record", "demo"))
    again.close()
    last = node_ledger(earlier / "node").entries()[-2:]
    assert [entry.body["kind"] for entry in last] == ["schema", "consent"]
    assert last[0].body["schema"] == SCHEMA == 3 and last[1].body["federation"] == "demo"


@pytest.mark.parametrize("name", ["ledger.sqlite", "head/head.json"])
def test_a_flipped_byte_of_an_earlier_ledger_is_seen(earlier: Path, name: str) -> None:
    path = earlier / "node" / name
    data = path.read_bytes()
    found = data.rindex(b"sha256:") if name == "ledger.sqlite" else data.index(b'"hash"') + 12
    path.write_bytes(data[:found] + bytes([data[found] ^ 1]) + data[found + 1 :])
    with pytest.raises(Refused):
        node_ledger(earlier / "node").entries()


def test_an_earlier_head_with_another_key_is_refused(earlier: Path) -> None:
    shutil.copy(earlier / "node" / "identity.pem", earlier / "node" / "ledger.key")
    with pytest.raises(Refused, match="none that this key signed"):
        node_ledger(earlier / "node")


def test_a_nodes_folder_is_read(earlier: Path) -> None:
    node = NodeFolder(earlier / "node")
    policy = node.load_policy()
    assert policy.institution == "bank" and pinned_invitation(node).federation == "demo"
    assert sorted(read_peers(node)) == ["hospital", "university"]
    masked = Outbox(node.under(policy.trainer.outbox)).masked(MANIFEST)
    assert list(masked.used()) == [(1, 1), (2, 2)]
    data = masked.get(1, 1)
    assert data is not None and MaskedInput.from_bytes(data).name == "bank"
    signed = (node.run(MANIFEST) / "manifest.signed").read_bytes()
    assert signed.endswith(RunManifest.from_bytes(signed[96:]).to_bytes())


def test_a_nodes_report_is_checked_and_written_anew(
    earlier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = ("fedlora-node", "report", "--check", str(earlier / "report"))
    key = ("--key", str(earlier / "node" / "enrolment.json"))
    assert code_of(node_cli.main, monkeypatch, *checked, *key) == 0
    out = earlier / "new"
    written = ("fedlora-node", "report", "--node", str(earlier / "node"), "--out", str(out))
    assert code_of(node_cli.main, monkeypatch, *written) == 0
    old, new = (
        json.loads((folder / "report.json").read_text())["body"]
        for folder in (earlier / "report", out)
    )
    assert new["budgets"] == old["budgets"]
    assert [each["manifest"] for each in new["runs"]] == [each["manifest"] for each in old["runs"]]


def test_an_export_verifies(earlier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = verify(earlier / "export")
    text = "\n".join(lines)
    assert MANIFEST in text and ADAPTER in text and SIGNER in text
    assert "statements   3" in text and "reports      3" in text
    words = ("fedlora-server", "verify", str(earlier / "export"))
    key = ("--key", str(earlier / "coordinator" / "coordinator.pub"))
    assert code_of(server_cli.main, monkeypatch, *words, *key) == 0


def test_every_changed_file_of_an_earlier_export_is_named(earlier: Path) -> None:
    export = earlier / "export"
    for path in sorted(each for each in export.rglob("*") if each.is_file()):
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2] + b"!" + data[len(data) // 2 + 1 :])
        with pytest.raises(FedloraError, match=path.relative_to(export).as_posix()):
            verify(export)
        path.write_bytes(data)
    assert verify(export)


def test_a_finished_run_is_exported(earlier: Path) -> None:
    directory = Directory.open(earlier / "coordinator")
    assert sorted(directory.registry.active()) == ["bank", "hospital", "university"]
    run = directory.runs()[-1]
    for path in (run / "consents").iterdir():
        reply = reply_from_bytes(path.read_bytes(), "demo", directory.registry.active())
        assert isinstance(reply, Consent) and reply.manifest == MANIFEST
    lines = export_run(directory, run, earlier / "new")
    assert any(ADAPTER in line for line in lines)
    old, new = (
        hashlib.sha256((earlier / folder / "statements" / "bank.json").read_bytes()).hexdigest()
        for folder in ("export", "new")
    )
    assert new == old


def test_an_earlier_checkpoint_that_was_changed_is_refused(earlier: Path) -> None:
    directory = Directory.open(earlier / "coordinator")
    run = directory.runs()[-1]
    path = run / "checkpoint" / "attempts.json"
    path.write_bytes(path.read_bytes().replace(b'\\"total\\": 2', b'\\"total\\": 1'))
    with pytest.raises(BadInput, match="other bytes than were written"):
        export_run(directory, run, earlier / "new")
